"""Compile what every launcher launches for NVIDIA GPUs, without having one.

Run as a script: prints one line of JSON for each launch and architecture. A launch is caught
where Triton would look for a device, and compiled with what it was given.
"""

import json
import sys
from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gam_kernels.combine.kernel import launch_combine
from gam_kernels.entries.kernel import launch_kth, launch_products
from gam_kernels.entries.vote import Draw, Vote
from gam_kernels.gram.kernel import launch_gram
from gam_kernels.polar.kernel import launch_polar

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
KINDS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint16: "*u16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def caught(kernel, *arguments, grid, warmup, **named):
    """Stand in for `JITFunction.run`: compile, and print what came out."""
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **named}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = KINDS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif kernel.params[index].is_constexpr or value == 1:
            signature[name] = "constexpr"
            constants[index,] = value
            continue
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            aligned = not isinstance(value, float) and value % 16 == 0
        if aligned:
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    done = triton.compile(source, target=target, options=options)
    record = {"kernel": kernel.fn.__name__, "shared": done.metadata.shared}
    print(json.dumps({**record, "cubin": len(done.asm["cubin"])}))


def main():
    JITFunction.run = caught
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for dtype, working, rank in ((half, single, 16), (half, single, 5), (single, double, 16)):
        columns = [[torch.zeros(4096, rank, dtype=dtype) for _ in range(3)]]
        rows = [[torch.zeros(rank, 4096, dtype=dtype).mT for _ in range(3)]]
        for parts in (columns, rows):
            launch_gram(parts, working)
            launch_combine(parts, torch.zeros(1, 3 * rank, rank), working, dtype)
    wide = [[torch.zeros(4096, 256, dtype=torch.float16)]]
    launch_combine(wide, torch.zeros(1, 256, 256), torch.float32, torch.float16)
    for size in (16, 32, 64):
        launch_polar(torch.zeros(2, size, size, dtype=torch.float64))
    for dtype in (single, double):
        votes = [Vote(torch.zeros(512, 16, dtype=dtype), torch.zeros(16, 256, dtype=dtype))]
        launch_kth(votes, 100)
        launch_products(votes, True, torch.zeros(256, 24, dtype=dtype), transposed=False)
        drawn = [replace(vote, draw=Draw((1, 2), 0.5)) for vote in votes]
        launch_products(drawn, False, torch.zeros(512, 80, dtype=dtype), transposed=True)


if __name__ == "__main__":
    main()

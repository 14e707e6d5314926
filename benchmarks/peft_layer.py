"""PEFT's `add_weighted_adapter`, on one module or on one decoder layer, for scale.

Run as a script it prints the CPU seconds of a layer as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

import peft
import torch
from models import modules

DENSITY = 0.2  # of what merges of single entries keep


def module_merge(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], combination: str
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Return a function that merges adapters of one linear layer by PEFT, in float32.

    Args:
        factors: A [r, in] and B [out, r] of each adapter, of scaling 1.
        combination: "svd" of their mean, or "ties_svd".

    Returns:
        A function without arguments that gives A [r, in] and B [out, r] of the merge.
    """
    (rank, width), out = factors[0][0].shape, len(factors[0][1])
    base = torch.nn.Module()
    base.register_module("layer", torch.nn.Linear(width, out, bias=False))
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    names = [str(index) for index in range(len(factors))]
    adapted = peft.PeftModel(base.to(factors[0][0].device), settings, adapter_name=names[0])
    layer = adapted.base_model.model.layer
    for name, (a, b) in zip(names, factors, strict=True):
        if name != names[0]:
            adapted.add_adapter(name, settings)
        layer.lora_A[name].weight.data = a.float()
        layer.lora_B[name].weight.data = b.float()
    # PEFT divides by the number of entries that agree, and by no weights: ones give the mean.
    weight = 1.0 if combination == "ties_svd" else 1 / len(names)

    def merge() -> tuple[torch.Tensor, torch.Tensor]:
        adapted.base_model.add_weighted_adapter(
            names, [weight] * len(names), "merged", combination, svd_rank=rank, density=DENSITY
        )
        found = layer.lora_A["merged"].weight.data, layer.lora_B["merged"].weight.data
        adapted.delete_adapter("merged")  # a name that is there already is not merged again
        return found

    return merge


def main(model: str, rank: int, count: int, combination: str) -> None:
    """Merge ``count`` random adapters on a stack of linear layers of the model's shapes."""
    torch.manual_seed(0)
    base = torch.nn.Module()
    for name, (out, width) in modules(model, 1).items():
        base.register_module(name.rsplit(".", 1)[1], torch.nn.Linear(width, out, bias=False))
    targets = [name for name, _ in base.named_children()]
    settings = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False
    )
    adapted = peft.PeftModel(base, settings, adapter_name="0")
    for index in range(1, count):
        adapted.add_adapter(str(index), settings)
    names = [str(index) for index in range(count)]
    density = {"density": DENSITY} if combination.startswith("ties") else {}
    start, cpu = time.perf_counter(), time.process_time()
    adapted.base_model.add_weighted_adapter(
        names, [1 / count] * count, "merged", combination, svd_rank=rank, **density
    )
    seconds = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    print(json.dumps({**seconds, "peft": peft.__version__}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

"""PEFT's `add_weighted_adapter` on one decoder layer, for scale: prints CPU seconds as JSON."""

from __future__ import annotations

import json
import sys
import time

import peft
import torch
from models import modules


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
    density = {"density": 0.2} if combination.startswith("ties") else {}
    start, cpu = time.perf_counter(), time.process_time()
    adapted.base_model.add_weighted_adapter(
        names, [1 / count] * count, "merged", combination, svd_rank=rank, **density
    )
    seconds = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    print(json.dumps({**seconds, "peft": peft.__version__}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

"""The merged weights of every method, against those of earlier code.

`numerics.json` holds, for each merge of the example adapters, a SHA-256 of the merged factors as
this project once made them, and the update's products with fixed vectors. On the kind of machine
that made the digests the bytes must be the same; elsewhere, where a processor or a library rounds
otherwise, the products must agree. A change of either needs an entry under *Numerics* in the
changelog with its size, and where bytes change, a higher `gam.version.NUMERICS`. Then

    python tests/gam/test_numerics.py

measures again and prints how far each merge has moved.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gam import Adapter, load_adapter, merge_adapters
from gam.strategies import STRATEGIES

RECORD = Path(__file__).with_name("numerics.json")
ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"
NAMES = ("reverse", "sort", "rotate")

CASES: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in STRATEGIES},
    "gam, consensus": {"reference": "consensus"},
    "gam, retract": {"retract": True},
    "gam, weights": {"weights": [0.5, -0.2, 0.3], "normalize": False, "scale": 1.5},
    "gam, energy": {"rank": "energy=0.9"},
    "gam, pico": {"calibrate": "pico"},
    "gam, two": {"weights": [1, 1, 0], "missing": "renormalize"},
    "ties, density": {"method": "ties", "density": 0.5, "rank": 4},
    "linear, sum": {"method": "linear", "rank": "sum"},
    "linear, mean size": {"method": "linear", "size": "mean"},
    "ties, mean size": {"method": "ties", "size": "mean", "rank": 4},
}


def machine() -> dict[str, str]:
    """Return what decides how sums round: the processor and the libraries."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    found = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", first, re.MULTILINE))
    names = ("vendor_id", "cpu family", "model")
    return {
        "processor": " ".join([platform.machine(), *(found.get(name, "?") for name in names)]),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def inputs(dtype: torch.dtype) -> list[Adapter]:
    """Return the example adapters, their factors in a dtype."""
    adapters = []
    for name in NAMES:
        adapter = load_adapter(ADAPTERS / name)
        modules = {
            path: replace(u, lora_a=u.lora_a.to(dtype), lora_b=u.lora_b.to(dtype))
            for path, u in adapter.modules.items()
        }
        adapters.append(replace(adapter, modules=modules))
    return adapters


def measure(case: str, dtype: str) -> tuple[str, list[float]]:
    """Return the SHA-256 of the merged factors, and products of the updates with vectors."""
    merged = merge_adapters(inputs(getattr(torch, dtype)), **CASES[case])
    digest = hashlib.sha256()
    products = [0.0] * 8
    for name, module in sorted(merged.modules.items()):
        for factor in (module.lora_a, module.lora_b):
            digest.update(factor.contiguous().view(torch.uint8).numpy().tobytes())
        delta = module.delta().double()
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        draw = np.random.RandomState(seed)  # whose stream never changes
        for place in range(len(products)):
            left, right = (torch.from_numpy(draw.standard_normal(n)) for n in delta.shape)
            products[place] += float(left @ delta @ right)
    return digest.hexdigest(), [float(f"{product:.9g}") for product in products]


def moved(products: list[float], recorded: list[float]) -> float:
    """Return how far products have moved, over their size."""
    one, two = np.array(products), np.array(recorded)
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_what_they_were(case: str, dtype: str) -> None:
    record = json.loads(RECORD.read_text())
    digest, products = measure(case, dtype)
    recorded = record["cases"][f"{case}; {dtype}"]
    # Elsewhere an entry may round the other way, and with it what is at a threshold.
    assert moved(products, recorded["products"]) < (1e-4 if dtype == "float32" else 2e-2)
    if machine() in record["machines"]:
        assert digest == recorded["sha256"]


if __name__ == "__main__":
    old = json.loads(RECORD.read_text())["cases"] if RECORD.exists() else {}
    cases = {}
    for case in CASES:
        for dtype in ("float32", "bfloat16"):
            key = f"{case}; {dtype}"
            digest, products = measure(case, dtype)
            cases[key] = {"sha256": digest, "products": products}
            if key in old and old[key]["sha256"] != digest:
                sys.stdout.write(f"{key}: moved by {moved(products, old[key]['products']):.1e}\n")
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(case)}" for key, case in cases.items())
    RECORD.write_text(f'{{"machines": {json.dumps([machine()])},\n"cases": {{\n{lines}\n}}}}\n')

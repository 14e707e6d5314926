"""Measure whole merges against the I/O floor, and append what was measured to results.jsonl.

    python benchmarks/run.py --model qwen3-8b --rank 16 --rank 64 --method gam --method linear
    python benchmarks/run.py --peft svd --rank 16

Every merge is checked against the paper's algorithm on dense float64 matrices first, an
inspection against dense singular vectors. Nothing is written where the check fails, or where the
checkout has changes that are not committed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import literal
import torch
from inputs import make_adapters
from models import MODELS, modules
from records import check_clean, quantiles, write

from gam import Adapter, inspect_adapters, load_adapter
from gam.strategies import STRATEGIES

HERE = Path(__file__).parent
SCRIPTS = Path(sysconfig.get_path("scripts"))  # this environment's, on PATH or not
INSPECT = "gam-inspect"  # measured beside the methods, though it merges nothing
METHODS = (*STRATEGIES, INSPECT)
# Rounding of the output, and with room for what half-precision inputs allow the fast path.
_BOUND = {"bfloat16": 4e-3}
_OVERLAP_BOUND = 1e-4
_LITERAL = {"gam": literal.gam, "linear": literal.linear}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--rank", type=int, action="append")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--adapters", type=int, action="append")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peft", choices=["svd", "ties_svd"], help="time PEFT on one layer")
    parser.add_argument("--runs", type=int, default=5, help="whole merges of each method")
    parser.add_argument("--inputs", type=Path, help="folder that keeps the inputs")
    parser.add_argument("--dry", action="store_true", help="print the records; write nothing")
    options = parser.parse_args()
    check_clean(options.dry)
    with tempfile.TemporaryDirectory() as scratch:
        for rank in options.rank or [16]:
            for count in options.adapters or [3]:
                root = options.inputs or Path(scratch)
                shape = {"model": options.model, "rank": rank, "adapters": count}
                if options.peft:
                    records = measure_peft(shape, options.peft)
                else:
                    methods = options.method or ["gam", "linear"]
                    records = measure(
                        shape, methods, options.runs, root, Path(scratch), options.device
                    )
                write(records, options.dry)


def measure(
    shape: dict[str, Any],
    methods: list[str],
    runs: int,
    root: Path,
    scratch: Path,
    device: str,
) -> list[dict[str, Any]]:
    """Return records of the floor and of each method, their runs taken in turn."""
    folders = make_adapters(root, shape["model"], shape["rank"], shape["adapters"])
    files = [str(folder / "adapter_model.safetensors") for folder in folders]
    out = scratch / "out"
    commands = {
        "floor": [sys.executable, str(HERE / "floor.py"), str(scratch / "floor"), *files]
    } | {
        method: [str(SCRIPTS / INSPECT), *map(str, folders), "--json"]
        if method == INSPECT
        else [
            *(str(SCRIPTS / "gam-merge"), *map(str, folders), "-o", str(out), "--quiet"),
            *("--method", method, "--device", device),
        ]
        for method in methods
    }
    devices = {name: device if name in STRATEGIES else "cpu" for name in commands}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    errors = {}
    shutil.rmtree(out, ignore_errors=True)
    for name, command in commands.items():  # what is on disk comes into the cache
        _spawn([*command, *(["--dry-run"] if name in STRATEGIES else [])])
    for run in range(runs):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            found[name].append(_spawn(command))
            if not run and name != "floor":
                errors[name] = check(folders, out, name, shape)
    return [
        {
            "op": "inspect" if name == INSPECT else "merge",
            "impl": name if devices[name] == "cpu" else f"{name} on {device}",
            "shape": shape,
            "dtype": "bfloat16",
            "metric": metric,
            "unit": metric.rsplit("_", 1)[1],
            **quantiles([usage[metric] for usage in usages]),
            "err_fp64": errors.get(name),
            "device": devices[name],
        }
        for name, usages in found.items()
        for metric in ("cpu_s", "wall_s", "peak_bytes")
    ]


def check(folders: list[Path], out: Path, method: str, shape: dict[str, Any]) -> float | None:
    """Return the relative error of the smallest module against the dense algorithm, if known."""
    if method == INSPECT:
        return check_inspection(folders, shape)
    if method not in _LITERAL:
        return None  # the tests compare it with the dense algorithm
    name = min(modules(shape["model"]), key=lambda key: sum(modules(shape["model"])[key]))
    updates = [adapter.modules[name] for adapter in map(load_adapter, folders)]
    deltas = [update.scale * update.lora_b.double() @ update.lora_a.double() for update in updates]
    expected = _LITERAL[method](deltas, shape["rank"])
    merged: Adapter = load_adapter(out)
    update = merged.modules[name]
    result = update.lora_b.double() @ update.lora_a.double()
    error = float((result - expected).norm() / expected.norm())
    bound = _BOUND[str(update.lora_b.dtype).removeprefix("torch.")]
    if not error < bound:
        sys.exit(f"{method}: module {name} is off by {error:.1e}, expected below {bound:.1e}")
    return error


def check_inspection(folders: list[Path], shape: dict[str, Any]) -> float:
    """Return the error of the overlaps of the smallest module against dense singular vectors."""
    report = inspect_adapters(folders)
    module = min(report.modules, key=lambda module: sum(module.shape))
    bases = []
    for adapter in map(load_adapter, folders):
        update = adapter.modules[module.name]
        left, _, right = torch.linalg.svd(update.lora_b.double() @ update.lora_a.double())
        bases.append((left[:, : shape["rank"]], right[: shape["rank"]].mT))
    errors = []
    for pair, (one, two) in zip(module.pairs, itertools.combinations(bases, 2), strict=True):
        for side, first, second in zip((pair.left, pair.right), one, two, strict=True):
            overlap = float((first.mT @ second).square().sum()) / shape["rank"]
            errors.append(abs(side.overlap - overlap))
    if not max(errors) < _OVERLAP_BOUND:
        sys.exit(f"{INSPECT}: overlaps of {module.name} are off by {max(errors):.1e}")
    return max(errors)


def measure_peft(shape: dict[str, Any], combination: str) -> list[dict[str, Any]]:
    """Return records of PEFT's own merge of one layer; one run, it takes minutes."""
    command = [sys.executable, str(HERE / "peft_layer.py"), shape["model"]]
    command += [str(shape["rank"]), str(shape["adapters"]), combination]
    seconds = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return [
        {
            "op": "merge",
            "impl": f"peft {seconds['peft']} add_weighted_adapter {combination}",
            "shape": {**shape, "layers": 1},
            "dtype": "float32",
            "metric": metric,
            "unit": "s",
            **quantiles([seconds[metric]]),
            "err_fp64": None,
        }
        for metric in ("cpu_s", "wall_s")
    ]


def _spawn(command: list[str]) -> dict[str, float]:
    """Run a command to its end and return what the operating system accounts to it."""
    spawner = [sys.executable, str(HERE / "spawn.py"), *command]
    done = subprocess.run(spawner, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


if __name__ == "__main__":
    main()

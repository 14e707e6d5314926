"""Records of measurements: where they were made, and the file that keeps them."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
CHECKOUT = (HERE.parent / ".git").exists()
"""Whether there is a history to name; a source distribution has none."""


def check_clean(dry: bool) -> None:
    """Exit where records would name no commit, or one that is not what was measured."""
    if not dry and not CHECKOUT:
        sys.exit("no history here that a record could name; run it in a checkout or pass --dry")
    if not dry and _git("status", "--porcelain", "--untracked-files=no"):
        sys.exit("the checkout has changes that are not committed; commit them or pass --dry")


def write(records: Iterable[dict[str, Any]], dry: bool) -> None:
    """Print records as they come, and append them to the file unless it is a dry run."""
    for record in records:
        text = json.dumps(_describe(record))
        print(text, flush=True)
        if not dry:
            with RESULTS.open("a") as file:
                file.write(text + "\n")


def quantiles(values: list[float]) -> dict[str, Any]:
    """Return the 20 %, 50 % and 80 % quantiles, and how many values there are."""
    if len(values) == 1:
        return {"p20": values[0], "p50": values[0], "p80": values[0], "n": 1}
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7], "n": len(values)}


def _describe(record: dict[str, Any]) -> dict[str, Any]:
    """Add what ran it, and where. A record names the GPU that it was made on, or none."""
    on_gpu = record.pop("device", "cpu") == "cuda"
    return {
        **{key: round(v, 4) if isinstance(v, float) else v for key, v in record.items()},
        "err_fp64": record["err_fp64"],
        "commit": _git("rev-parse", "HEAD") if CHECKOUT else None,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "command": _command(sys.argv),
    }


def _command(words: list[str]) -> str:
    """Return what measures it again; where inputs were kept is of no interest to others."""
    text = " ".join(["python", f"benchmarks/{Path(words[0]).name}", *words[1:]])
    return re.sub(r" --inputs[ =]\S+", "", text)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the name of the CPU, with what tells generations of one name apart on Linux."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    found = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", first, re.MULTILINE))
    if not {"model name", "cpu family", "model", "flags"} <= found.keys():
        return found.get("model name", platform.processor())
    flags = found["flags"].split()
    vectors = next((name for name in ("avx512f", "avx2", "avx") if name in flags), "sse")
    return "{model name} (family {cpu family}, model {model}, {0})".format(vectors, **found)


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=HERE, check=True, capture_output=True, text=True
    ).stdout.strip()

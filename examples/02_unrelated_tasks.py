"""When adapters of unrelated tasks are merged: add them up, do not average them.

Three adapters of one small base model learned one task each, and nothing of the others' (see
`make_adapters.py`). This merges them by several methods, loads each result with PEFT and scores
it on all the tasks. Needs `transformers` and `peft`, and half a minute on one core:
`python examples/02_unrelated_tasks.py`.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tasks import TASKS, accuracy
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from gam import merge_adapters

HERE = Path(__file__).resolve().parent
ADAPTERS = [HERE / "adapters" / name for name in ("reverse", "sort", "rotate")]
QUESTIONS = 512
MERGES: dict[str, dict[str, Any]] = {
    "concat": {"method": "concat"},
    "linear --scale 3": {"method": "linear", "scale": 3.0},
    "tsv": {"method": "tsv"},
    "linear": {"method": "linear"},
    "linear --size mean": {"method": "linear", "size": "mean"},
    "gam": {"method": "gam"},  # by the equations of the paper
    "gam --size mean": {"method": "gam", "size": "mean"},
    "ties": {"method": "ties"},
    "knots_ties": {"method": "knots_ties"},
    "coverage": {"method": "coverage"},
    "karcher": {"method": "karcher"},
}
EXPLAINED = f"""
copy to rotate  share of {QUESTIONS} questions of a task answered exactly, in %, with a standard
                error of at most 2.2; no adapter was trained on copy, which the base knows
size            Frobenius norm of the update against the mean of the three adapters
rank            the largest of a module: what the merge costs when it is used

The base hardly ever gets rotate right, so that task shows what a merge keeps. In a sum every
adapter keeps its whole update; in an average it has a third of it, and that is not enough: every
method that averages loses most of rotate, gam included, at any size.

What to do: for adapters of unrelated tasks take concat, which is the exact sum, or
`linear --scale N` for N adapters, the same sum at the rank of the largest. For adapters that aim
at the same thing, such as the preference deltas of 01_preference_deltas.py, a sum is too large:
take an average at their mean size there. Score two or three methods on tasks of your own.
"""


def score(adapter: Path | None) -> list[str]:
    """Return the accuracy of the base model with an adapter on every task, in %."""
    model = LlamaForCausalLM.from_pretrained(HERE / "tiny-base", dtype=torch.float32)
    tuned = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    tuned.eval()
    return [f"{100 * accuracy(tuned, task, QUESTIONS):.0f}" for task in TASKS]


def line(title: str, *cells: str) -> None:
    """Print a row, as soon as it is known."""
    print(f"{title:20}" + "".join(f"{cell:>9}" for cell in cells), flush=True)


def main() -> None:
    """Print the table and what it says."""
    line("", *TASKS, "size", "rank")
    line("base model", *score(None))
    for path in ADAPTERS:
        line(f"adapter {path.name}", *score(path))
    for title, options in MERGES.items():
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "merged"
            merged = merge_adapters(ADAPTERS, output=output, **options)
            rank = max(module.rank for module in merged.modules.values())
            line(title, *score(output), f"{merged.report.norm_ratio:.2f}", str(rank))
    print(EXPLAINED)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # those of the libraries
    disable_progress_bar()
    torch.set_num_threads(1)  # the model is too small to share out
    main()

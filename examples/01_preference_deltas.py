"""What merging is for: three preference deltas of one student, merged into one adapter.

A student and three LoRA adapters ("deltas") of it are in `pda_miniature/record/world-0`. Each delta
was trained on answers that two weaker models prefer, and each makes the student better. This scores
the student, each delta and merges of all three on the same questions, and prints a table. Needs
`transformers` and `peft`, and a minute on one core: `python examples/01_preference_deltas.py`.
"""

import argparse
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from gam import merge_adapters

MINIATURE = Path(__file__).resolve().parent / "pda_miniature"
sys.path.insert(0, str(MINIATURE))
from world import PRESETS, questions  # noqa: E402

WORLD = MINIATURE / "record" / "world-0"
POLICIES = {"own": "each delta from its own start", "shared": "all from one start"}
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "linear --size mean": {"method": "linear", "size": "mean"},
    "gam (the paper's equations)": {"method": "gam"},
    "gam --size mean": {"method": "gam", "size": "mean"},
    "ties": {"method": "ties"},
    "knots_ties": {"method": "knots_ties"},
    "tsv": {"method": "tsv"},
    "coverage": {"method": "coverage"},
    "concat": {"method": "concat"},
}
EXPLAINED = """
right      share of the {count} questions answered exactly, in %, and its standard error
over best  difference to the best single delta on the same questions, in points, and its
           standard error; below two standard errors it may be chance
size       Frobenius norm of the merged update against the mean of the three deltas

The base is the student, right on {student:.1f} % without an adapter. The deltas come in two
kinds: each trained from random LoRA weights of its own, as adapters of different people are, or
all from the same ones.
"""
ADVICE = """
Deltas that aim at the same thing lift each other, but their sum (concat) is too large and their
average (linear) too small: what does best here has a size of 1 to 1.6. `--size mean` brings any
method to 1. gam by the paper's equations makes the update smaller the less the deltas share,
so it loses most where each has its own start; gam --size mean is above every delta.

What to do with deltas of your own: merge them by two or three of the methods named above, score
the results on questions you keep for it, as this script does, and take the best: which one that
is changes from student to student (pda_miniature/candidates/table.md has three of them). For
adapters of unrelated tasks see 02_unrelated_tasks.py.
"""


class Exam:
    """The student and the questions that it is asked."""

    def __init__(self, per_skill: int) -> None:
        """Load the student; make the questions again, from the seed of their world."""
        self.rows = questions(PRESETS["cpu"], "0", "test", per_skill)
        self.model = AutoModelForCausalLM.from_pretrained(WORLD / "student", dtype=torch.float32)
        self.model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(WORLD / "student", padding_side="left")
        prompts = [row["prompt"] for row in self.rows]
        self.prompts = self.tokenizer(prompts, padding=True, return_tensors="pt")

    def score(self, adapter: Path | None = None) -> list[float]:
        """Return 100 for each question that the student gets right with an adapter, else 0."""
        model = self.model if adapter is None else PeftModel.from_pretrained(self.model, adapter)
        ids, mask = self.prompts["input_ids"], self.prompts["attention_mask"]
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False
            )
        if adapter is not None:
            model.unload()
        said = self.tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
        pairs = zip(said, self.rows, strict=True)
        return [100.0 * (text.strip() == row["answer"]) for text, row in pairs]


def estimate(values: Sequence[float], sign: str = "") -> str:
    """Return a mean and its standard error as text."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):{sign}.1f} ± {error:.1f}"


def over(scores: Sequence[float], best: Sequence[float]) -> list[float]:
    """Return the paired differences."""
    return [one - other for one, other in zip(scores, best, strict=True)]


def line(title: str, *cells: str) -> None:
    """Print a row, as soon as it is known."""
    print(f"{title:28}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def verdict(differences: dict[str, list[list[float]]]) -> str:
    """Return which merges are above and which below the best single delta, of both kinds."""
    above, below = [], []
    for title, pair in differences.items():
        steps = [
            statistics.fmean(values) * math.sqrt(len(values)) / statistics.stdev(values)
            for values in pair
        ]
        if min(steps) > 2:
            above.append(title)
        if min(steps) < -2:
            below.append(title)
    text = "Above every single delta, of both kinds: " + (", ".join(above) or "none") + "."
    return text + "\nBelow the best single delta, of one kind or both: " + ", ".join(below) + "."


def main() -> None:
    """Print the table and what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-skill", type=int, default=500, help="questions of each of 6 skills")
    exam = Exam(parser.parse_args().per_skill)
    print(f"{'':28}" + "".join(f"  {text:^34}" for text in POLICIES.values()))
    line("", *["right", "over best", "size"] * 2)
    student = exam.score()
    line("student", *[estimate(student), "", ""] * 2)
    scores = {
        policy: {name: exam.score(WORLD / f"{name}-{policy}") for name in "ABC"}
        for policy in POLICIES
    }
    for name in "ABC":
        line(f"delta {name}", *[c for p in POLICIES for c in (estimate(scores[p][name]), "", "")])
    best = {policy: max(found.values(), key=statistics.fmean) for policy, found in scores.items()}
    differences: dict[str, list[list[float]]] = {}
    for title, options in MERGES.items():
        cells: list[str] = []
        for policy in POLICIES:
            with tempfile.TemporaryDirectory() as folder:
                deltas = [WORLD / f"{name}-{policy}" for name in "ABC"]
                merged = merge_adapters(deltas, **options)
                merged.save(folder, overwrite=True)
                found = exam.score(Path(folder))
            step = over(found, best[policy])
            differences.setdefault(title, []).append(step)
            cells += [estimate(found), estimate(step, "+"), f"{merged.report.norm_ratio:.2f}"]
        line(title, *cells)
    print(EXPLAINED.format(count=len(student), student=statistics.fmean(student)))
    print(verdict(differences))
    print(ADVICE)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # those of the libraries
    disable_progress_bar()
    torch.set_num_threads(1)  # the model is too small to share out
    main()

"""What merging is for: three preference deltas of one student, merged into one adapter.

A student and three LoRA adapters ("deltas") of it are in `pda_miniature/record/world-0`. Each delta
was trained on answers that two weaker models prefer, and each makes the student better. This scores
the student, each delta and merges of all three on 3000 questions, and prints a table. Needs
`transformers` and `peft`, and half a minute on one core: `python examples/01_preference_deltas.py`.
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
PER_SKILL = 500  # questions of each of six skills, half of those of the record
LABEL = 20  # width of the first column
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "linear --size mean": {"method": "linear", "size": "mean"},
    "gam": {"method": "gam"},  # by the equations of the paper
    "gam --size mean": {"method": "gam", "size": "mean"},
    "ties": {"method": "ties"},
    "knots_ties": {"method": "knots_ties"},
    "tsv": {"method": "tsv"},
    "coverage": {"method": "coverage"},
    "concat": {"method": "concat"},
}
EXPLAINED = """
right      share of the {count} questions answered exactly, in %, ± standard error
over best  difference to the best single delta on the same questions, in points, ± standard
           error; below two standard errors it may be chance
size       Frobenius norm of the merged update against the mean of the three deltas

The base is the student, right on {student:.1f} % without an adapter.

Above every single delta: {above}.
Not above, or by less than two standard errors: {others}.

Deltas that aim at the same thing lift each other, but their sum (concat) is too large and their
average (linear) too small: what does best here has a size of 1 to 1.6. `--size mean` brings any
method to about 1. gam, here by the paper's equations, makes the update smaller the less the
deltas share: least with those from one start (--start shared), and too much here.

What to do with deltas of your own: merge them by two or three of the methods named above, score
the results on questions that you keep for it, as this script does, and take the best: which one
that is changes from student to student (pda_miniature/candidates/table.md has three of them).
For adapters of unrelated tasks see 02_unrelated_tasks.py.
"""


class Exam:
    """The student and the questions that it is asked."""

    def __init__(self) -> None:
        """Load the student; make the questions again, from the seed of their world."""
        self.rows = questions(PRESETS["cpu"], "0", "test", PER_SKILL)
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


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def estimate(values: Sequence[float], sign: str = "") -> str:
    """Return a mean and its standard error as text."""
    return f"{statistics.fmean(values):{sign}.1f} ± {standard_error(values):.1f}"


def line(title: str, *cells: str) -> None:
    """Print a row, as soon as it is known."""
    print(f"{title:{LABEL}}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def main() -> None:
    """Print the table and what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--start",
        choices=["own", "shared"],
        default="own",
        help="LoRA weights that the deltas were trained from: of their own, or the same ones",
    )
    start = parser.parse_args().start
    deltas = {name: WORLD / f"{name}-{start}" for name in "ABC"}
    exam = Exam()
    line("", "right", "over best", "size")
    student = exam.score()
    line("student", estimate(student))
    scores = {name: exam.score(folder) for name, folder in deltas.items()}
    for name, found in scores.items():
        line(f"delta {name}", estimate(found))
    best = max(scores.values(), key=statistics.fmean)
    above: dict[bool, list[str]] = {True: [], False: []}
    for title, options in MERGES.items():
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "merged"
            merged = merge_adapters(deltas, output=output, **options)
            found = exam.score(output)
        step = [one - other for one, other in zip(found, best, strict=True)]
        above[statistics.fmean(step) > 2 * standard_error(step)].append(title)
        line(title, estimate(found), estimate(step, "+"), f"{merged.report.norm_ratio:.2f}")
    names = {"above": ", ".join(above[True]) or "none", "others": ", ".join(above[False]) or "none"}
    print(EXPLAINED.format(count=len(student), student=statistics.fmean(student), **names))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # those of the libraries
    disable_progress_bar()
    torch.set_num_threads(1)  # the model is too small to share out
    main()

"""Exact match and token F1 of answers, with standard errors and paired differences."""

from __future__ import annotations

import math
import re
import string
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gam.errors import OptionError
from gam.pda.generate import Generation, Local, Model, old_names, open_model
from gam.pda.prompts import Prompt
from gam.pda.records import DataError, Row, write_json, write_rows

if TYPE_CHECKING:
    from gam.adapter import Adapter

EXTRACTORS: Mapping[str, str] = {
    "text": r"(.*)",
    "number": r".*?(-?\d[\d,]*(?:\.\d+)?)(?!.*\d)",
    "boxed": r".*\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}",
    "letter": r".*\b([A-J])\b",
    "answer": r".*<answer>(.*?)</answer>",
}
"""Where the answer stands in a text: all of it, its last number, the last ``\\boxed{}``, the last
single capital, or the last ``<answer>`` tag."""


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its standard error."""

    mean: float
    error: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values and its standard error, with n - 1 in the variance."""
    count = len(values)
    mean = math.fsum(values) / count
    spread = math.fsum((value - mean) ** 2 for value in values)
    return Estimate(mean, math.sqrt(spread / (count - 1) / count) if count > 1 else math.nan)


def difference(first: Sequence[Row], second: Sequence[Row], score: str = "exact") -> Estimate:
    """Return the mean of first minus second over the same questions, question by question."""
    other = {row["id"]: row[score] for row in second}
    if {row["id"] for row in first} != other.keys():
        raise OptionError("a paired difference needs two scores of the same questions.")
    return estimate([row[score] - other[row["id"]] for row in first])


def extract(text: str, extractor: str) -> str:
    """Return the answer in a text, or "" where there is none.

    Args:
        text: What the model said.
        extractor: A name in `EXTRACTORS`, or a regular expression whose first group is the answer.
    """
    try:
        found = re.match(EXTRACTORS.get(extractor, extractor), text, re.DOTALL)
    except re.error as error:
        raise OptionError(f"extractor {extractor!r}: {error}") from error
    if found is None:
        return ""
    return (found.group(1) if found.re.groups else found.group()).strip()


def exact_match(answer: str, truth: str) -> float:
    """Return 1 where two answers agree but for case, spaces and thousands separators."""

    def plain(text: str) -> str:
        return " ".join(re.sub(r"(?<=\d),(?=\d{3})", "", text).casefold().split())

    return float(plain(answer) == plain(truth))


def token_f1(answer: str, truth: str) -> float:
    """Return the F1 of the words of two answers, without case, punctuation and articles.

    Source: Rajpurkar et al. 2016, arXiv 1606.05250.
    """

    def words(text: str) -> Counter[str]:
        bare = "".join(c for c in text.casefold() if c not in string.punctuation)
        return Counter(re.sub(r"\b(a|an|the)\b", " ", bare).split())

    said, true = words(answer), words(truth)
    common = (said & true).total()
    if not said or not true:
        return float(said == true)
    return 2 * common / (said.total() + true.total())


def score_answers(
    model: Model, questions: Sequence[Prompt], settings: Generation, extractor: str = "text"
) -> list[Row]:
    """Ask a model and score what it says.

    Args:
        model: To ask.
        questions: Prompts whose rows hold ``answer``, a text or a list of texts that all count.
        settings: Of the answers.
        extractor: See `extract`.

    Returns:
        A row for each question, in their order: ``id``, ``text``, ``answer``, ``exact``, ``f1``.

    Raises:
        DataError: A question has no ``answer``, or got none from the model.
    """
    truths = {question.id: _truths(question) for question in questions}
    said = {row["id"]: row for batch in model.answer(questions, settings) for row in batch}
    rows = []
    for question in questions:
        reply = said[question.id]
        if reply["finish"] == "error":
            raise DataError(f"question {question.id!r} got no answer: {reply['error']}")
        answer = extract(reply["text"], extractor)
        rows.append(
            {
                "id": question.id,
                "text": reply["text"],
                "answer": answer,
                "exact": max(exact_match(answer, truth) for truth in truths[question.id]),
                "f1": max(token_f1(answer, truth) for truth in truths[question.id]),
            }
        )
    return rows


@contextmanager
def adapted(model: Local, adapter: str | Path | Adapter | None) -> Iterator[Local]:
    """Give a local model an adapter for a while.

    Args:
        model: The student.
        adapter: An adapter folder, an adapter in memory, or None for the student as it is.
    """
    if adapter is None:
        yield model
        return
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder, old_names():
        if not isinstance(adapter, str | Path):
            adapter.save(folder, overwrite=True)
            adapter = folder
        wrapped: Any = PeftModel.from_pretrained(model.model, str(adapter)).eval()
    try:
        yield Local(wrapped, model.tokenizer)
    finally:
        wrapped.unload()


def score_adapters(
    model: str,
    adapters: Sequence[str | Path | Adapter],
    questions: Sequence[Prompt],
    settings: Generation,
    extractor: str = "text",
    *,
    dtype: str = "auto",
    output: Path | None = None,
) -> list[Row]:
    """Score a model alone and with each of several adapters.

    Args:
        model: See `gam.pda.generate.open_model`; only local weights can take adapters.
        adapters: Folders, or adapters in memory.
        questions: See `score_answers`.
        settings: Of the answers.
        extractor: See `extract`.
        dtype: Of local weights.
        output: Folder for ``scores.json`` and a file of answers for each row.

    Returns:
        A row for the model and for each adapter: ``name``, ``exact``, ``f1``, ``over_first`` (the
        difference in exact match), each a mean and a standard error.
    """
    opened = open_model(model, dtype)
    if adapters and not isinstance(opened, Local):
        raise OptionError(f"a server cannot take adapters, got {len(adapters)} for {model!r}.")
    scored: list[list[Row]] = []
    results: list[Row] = []
    for adapter in (None, *adapters):
        if isinstance(opened, Local):
            with adapted(opened, adapter) as answering:
                rows = score_answers(answering, questions, settings, extractor)
        else:
            rows = score_answers(opened, questions, settings, extractor)
        scored.append(rows)
        name = model if adapter is None else getattr(adapter, "name", str(adapter))
        results.append(
            {
                "name": name,
                "questions": len(rows),
                "exact": asdict(estimate([row["exact"] for row in rows])),
                "f1": asdict(estimate([row["f1"] for row in rows])),
                "over_first": asdict(difference(rows, scored[0])),
            }
        )
    if output is not None:
        for index, rows in enumerate(scored):
            write_rows(output / f"answers-{index}.jsonl", rows)
        write_json(output / "scores.json", results)
    return results


def _truths(question: Prompt) -> list[str]:
    truth = question.row.get("answer")
    truths = [truth] if isinstance(truth, str | int | float) else truth
    if not isinstance(truths, list) or not truths:
        raise DataError(f"question {question.id!r}: 'answer' is {truth!r}, expected text.")
    return [str(text) for text in truths]

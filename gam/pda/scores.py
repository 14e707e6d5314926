"""Exact match and token F1 of an answer; means, standard errors and paired differences."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gam.errors import OptionError
from gam.pda.files import Row

SCORES = ("exact", "f1")
"""What `score_answers` gives every answer."""

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


def compiled(pattern: str | None, what: str) -> re.Pattern[str] | None:
    """Return a regular expression whose dot matches everything; None for None.

    Raises:
        OptionError: It is none; the message begins with ``what``.
    """
    try:
        return None if pattern is None else re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise OptionError(f"{what} {pattern!r}: not a regular expression: {error}.") from None


def extractor_pattern(extractor: str) -> re.Pattern[str]:
    """Return the regular expression of an extractor; an `OptionError` where it is none."""
    found = compiled(EXTRACTORS.get(extractor, extractor), "extractor")
    assert found is not None
    return found


def extract(text: str, extractor: str) -> str:
    """Return the answer in a text, or "" where there is none.

    Args:
        text: What the model said.
        extractor: A name in `EXTRACTORS`, or a regular expression whose first group is the answer.
    """
    found = extractor_pattern(extractor).match(text)
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

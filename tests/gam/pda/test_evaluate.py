"""Scores against values worked by hand."""

import math
import statistics
from pathlib import Path

import pytest
from helpers.adapters import assert_refused
from helpers.pda import sums, write_lines, write_model

from gam.errors import OptionError
from gam.pda.evaluate import (
    difference,
    estimate,
    exact_match,
    extract,
    score_adapters,
    token_f1,
)
from gam.pda.files import DataError
from gam.pda.models import Generation
from gam.pda.prompts import load_prompts


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        ("text", " 42 \n", "42"),
        ("number", "First 3, then 1,234.5 apples.", "1,234.5"),
        ("number", "It is -7.", "-7"),
        ("number", "none", ""),
        ("boxed", r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("letter", "A or B? The answer is (C).", "C"),
        ("answer", "<answer>no</answer> hm <answer>\n yes</answer>", "yes"),
        (r".*= (\w+)", "x = 1\ny = two", "two"),
    ],
)
def test_extract(extractor: str, text: str, answer: str) -> None:
    assert extract(text, extractor) == answer


def test_a_broken_extractor_is_named() -> None:
    assert_refused(lambda: extract("x", "("), OptionError, "extractor '('")


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "f1"),
    [
        ("Paris", "paris", 1, 1),
        ("1,000", "1000", 1, 1),
        ("-5", "5", 0, 1),
        # Said {cat, sat}, true {cat, sat, down}: precision 1, recall 2/3, F1 = 4/5.
        ("The cat sat", "a cat sat down.", 0, 0.8),
        # Said {to, be, to, be}, true {to, be}: 2 common of 4 and 2, F1 = 2/3.
        ("to be to be", "to be", 0, 2 / 3),
        ("", "x", 0, 0),
        ("the", "a", 0, 1),
    ],
)
def test_scores(answer: str, truth: str, exact: float, f1: float) -> None:
    assert exact_match(answer, truth) == exact
    assert token_f1(answer, truth) == pytest.approx(f1)


def test_estimates_are_those_of_the_textbook() -> None:
    values = [1.0, 0.0, 1.0, 1.0]
    found = estimate(values)
    assert found.mean == 0.75
    assert found.error == pytest.approx(statistics.stdev(values) / 2)
    assert math.isnan(estimate([1.0]).error)


def test_a_paired_difference_pairs_by_question() -> None:
    first = [{"id": "a", "exact": 1.0}, {"id": "b", "exact": 1.0}, {"id": "c", "exact": 0.0}]
    second = [{"id": "c", "exact": 0.0}, {"id": "a", "exact": 0.0}, {"id": "b", "exact": 1.0}]
    found = difference(first, second)
    assert found.mean == pytest.approx(1 / 3)
    assert found.error == pytest.approx(1 / 3)  # of 1, 0, 0: variance 1/3, over 3 questions
    assert_refused(lambda: difference(first, second[:2]), OptionError, "same questions")


def test_questions_need_answers(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "model"))
    questions = load_prompts(str(write_lines(tmp_path / "q.jsonl", [{"prompt": "1+1="}])))
    assert_refused(
        lambda: score_adapters(model, [], questions, Generation(max_new_tokens=2)),
        DataError,
        "'answer': got None",
    )


def test_a_server_takes_no_adapters(tmp_path: Path) -> None:
    questions = load_prompts(str(write_lines(tmp_path / "q.jsonl", sums(2))))
    assert_refused(
        lambda: score_adapters("m@http://127.0.0.1:1/v1", ["a"], questions, Generation()),
        OptionError,
        "cannot take adapters",
    )

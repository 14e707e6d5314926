"""Score models, and a student with its adapters, on questions that have answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gam.errors import OptionError
from gam.pda.checks import check_chats, check_folder, check_models
from gam.pda.files import DataError, Row, write_json, write_rows
from gam.pda.libraries import need
from gam.pda.models import Generation, Model, is_server, open_model
from gam.pda.models.local import LIBRARIES, Local, adapted
from gam.pda.prompts import Prompt, truths_of
from gam.pda.scores import difference, estimate, exact_match, extract, extractor_pattern, token_f1

if TYPE_CHECKING:
    from gam.adapter import Adapter

CONFIG_NAME = "adapter_config.json"


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
    truths = {question.id: truths_of(question) for question in questions}
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
        model: See `gam.pda.models.open_model`; only local weights can take adapters.
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
    _check(model, adapters, questions, extractor, output)
    opened = open_model(model, dtype)
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


def _check(
    model: str,
    adapters: Sequence[str | Path | Adapter],
    questions: Sequence[Prompt],
    extractor: str,
    output: Path | None,
) -> None:
    """Check what an evaluation needs, before a model is loaded: libraries first."""
    if adapters and is_server(model):
        raise OptionError(f"a server cannot take adapters, got {len(adapters)} for {model!r}.")
    if not is_server(model):
        need(*LIBRARIES, *(["peft"] if adapters else []))
        check_chats([questions])
    extractor_pattern(extractor)
    for question in questions:
        truths_of(question)
    check_models({"model": model})
    for adapter in adapters:
        if isinstance(adapter, str | Path) and not (Path(adapter) / CONFIG_NAME).is_file():
            raise DataError(f"the folder {str(adapter)!r} holds no adapter: no {CONFIG_NAME}.")
    if output is not None:
        check_folder(output)

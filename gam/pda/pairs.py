"""Preference pairs from two models: the weak one's answer is chosen, the weaker one's rejected."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gam.pda.checks import check_models
from gam.pda.files import DataError, Row, write_json, write_rows
from gam.pda.journal import Journal
from gam.pda.libraries import library_versions
from gam.pda.models import Generation, open_model
from gam.pda.prompts import Prompt, Text
from gam.pda.provenance import claim, content_digest, digest
from gam.pda.scores import compiled

Progress = Callable[[str, int, int], None]


def make_pairs(
    prompts: Sequence[Prompt],
    weak: str,
    weaker: str,
    output: Path,
    settings: Generation,
    *,
    keep: str | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Row:
    """Ask two models the same prompts and write preference pairs for TRL.

    Nothing looks at whether an answer is right. The folder gets ``weak.jsonl`` and
    ``weaker.jsonl`` (answers, appended as they come), then ``pairs.jsonl`` and ``pairs.json``
    (provenance and summary). Called again after it was stopped, at whatever point, it asks only
    what has no answer yet.

    Args:
        prompts: To ask.
        weak: Model whose answers are chosen; see `gam.pda.models.open_model`.
        weaker: Model whose answers are rejected.
        output: Folder to write, or to go on with.
        settings: Of the answers.
        keep: Regular expression that a chosen answer must match somewhere; pairs whose chosen
            answer does not are dropped. Rejected answers may look like anything.
        dtype: Of local weights.
        progress: Called with the model's role and the numbers of answers had and wanted.

    Returns:
        What ``pairs.json`` holds.

    Raises:
        DataError: Some prompts got no answer (the others are kept), or no pair is left.
        OptionError: The folder holds answers made with other settings.
    """
    pattern, models = compiled(keep, "keep"), {"weak": weak, "weaker": weaker}
    record = {
        "models": {role: {"source": m, "sha256": content_digest(m)} for role, m in models.items()},
        "generation": settings.record(),
        "dtype": dtype,
        "prompts": digest([[prompt.id, prompt.text] for prompt in prompts]),
    }
    check_models(models)
    claim(output, record)
    answers = _both_answers(prompts, models, output, settings, dtype, progress)
    both = answers["weak"], answers["weaker"]
    rows, drops = _pair(prompts, *both, pattern, settings.chat_template)
    if not rows:
        raise DataError(f"no pair is left of {len(prompts)} prompts; dropped: {drops}.")
    write_rows(output / "pairs.jsonl", rows)
    summary = {
        **record,
        "keep": keep,
        "versions": library_versions(),
        "summary": _summary(len(prompts), len(rows), drops, answers),
        "sha256": content_digest(output / "pairs.jsonl"),
    }
    write_json(output / "pairs.json", summary)
    return summary


def _summary(
    prompts: int, pairs: int, drops: Mapping[str, int], answers: Mapping[str, dict[str, Row]]
) -> Row:
    return {
        "prompts": prompts,
        "pairs": pairs,
        "dropped": drops,
        "agreement": drops["identical"] / prompts,
        **{role: _lengths([*rows.values()]) for role, rows in answers.items()},
    }


def _both_answers(
    prompts: Sequence[Prompt],
    models: Mapping[str, str],
    output: Path,
    settings: Generation,
    dtype: str,
    progress: Progress | None,
) -> dict[str, dict[str, Row]]:
    """Return the answers of both models; a `DataError` where one did not answer every prompt."""
    answers, failed = {}, {}
    for role, model in models.items():
        # Of its own seed: with the same draws two models would agree more than they do.
        own = replace(settings, seed=settings.seed_of(role))
        answers[role], failed[role] = _answers(prompts, role, model, output, own, dtype, progress)
    for role, rows in failed.items():
        if rows:
            raise DataError(
                f"{len(rows)} of {len(prompts)} prompts got no answer from the {role} model "
                f"{models[role]!r}, the first: {rows[0]['error']}. The others are kept in "
                f"{str(output)!r}; run the same command again to ask these."
            )
    return answers


def _answers(
    prompts: Sequence[Prompt],
    role: str,
    model: str,
    output: Path,
    settings: Generation,
    dtype: str,
    progress: Progress | None,
) -> tuple[dict[str, Row], list[Row]]:
    """Return the answers to all prompts by id, and those that failed."""
    failed: list[Row] = []
    with Journal(output / f"{role}.jsonl") as journal:
        if any(prompt.id not in journal.rows for prompt in prompts):
            for batch in open_model(model, dtype).answer(prompts, settings, journal.rows):
                journal.append(row for row in batch if row["finish"] != "error")
                failed += [row for row in batch if row["finish"] == "error"]
                if progress is not None:
                    progress(role, len(journal.rows), len(prompts))
        return journal.rows, failed


def _pair(
    prompts: Sequence[Prompt],
    chosen: dict[str, Row],
    rejected: dict[str, Row],
    keep: re.Pattern[str] | None,
    chat_template: Mapping[str, Any],
) -> tuple[list[Row], dict[str, int]]:
    rows: list[Row] = []
    drops = {"identical": 0, "format": 0}
    for prompt in prompts:
        pair = chosen[prompt.id]["text"], rejected[prompt.id]["text"]
        if pair[0] == pair[1]:
            drops["identical"] += 1
        elif keep is not None and not keep.search(pair[0]):
            drops["format"] += 1
        else:
            rows.append({"id": prompt.id, **_preference(prompt.text, *pair, chat_template)})
    return rows, drops


def _preference(prompt: Text, chosen: str, rejected: str, chat_template: Mapping[str, Any]) -> Row:
    """Return a pair in TRL's format: plain text, or messages where the prompt is messages."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    chat: dict[str, Any] = {"prompt": list(prompt)}
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        chat[name] = [{"role": "assistant", "content": text}]
    if chat_template:
        chat["chat_template_kwargs"] = dict(chat_template)
    return chat


def _lengths(rows: Sequence[Row]) -> dict[str, float]:
    lengths = [len(row["text"]) for row in rows]
    return {
        "mean_characters": round(statistics.fmean(lengths), 2),
        "median_characters": statistics.median(lengths),
        "longest_characters": max(lengths),
        "cut": sum(row["finish"] == "length" for row in rows),
    }

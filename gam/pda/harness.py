"""Scores of lm-evaluation-harness, for the tasks that it defines (gsm8k, gpqa, mmlu, ...)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gam.pda.files import Row
from gam.pda.libraries import need


def run_harness(
    model: str,
    tasks: Sequence[str],
    *,
    adapter: str | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    limit: int = 0,
    few_shot: int | None = None,
    chat: bool = False,
    include: Path | None = None,
) -> list[Row]:
    """Score a model, with an adapter or without, on tasks of lm-evaluation-harness.

    Args:
        model: Folder, or Hub id ``user/name[@revision]``.
        tasks: Names of tasks or of groups.
        adapter: Adapter folder.
        dtype: Of the model's weights.
        batch_size: Requests at a time.
        limit: Only the first so many questions of each task; 0 for all.
        few_shot: Examples before each question; None for the task's own number.
        chat: Apply the chat template.
        include: Folder with more tasks.

    Returns:
        A row for each metric: ``task``, ``metric``, ``mean``, ``error``, ``questions``.

    Raises:
        OptionError: The harness is not installed.
    """
    need("lm_eval", extra="harness")
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    source, _, revision = model.partition("@")
    arguments: dict[str, Any] = {"pretrained": source, "dtype": dtype}
    if revision:
        arguments["revision"] = revision
    if adapter is not None:
        arguments["peft"] = adapter
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=[*tasks],
        num_fewshot=few_shot,
        batch_size=batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        limit=limit or None,
        apply_chat_template=chat,
        task_manager=TaskManager(include_path=None if include is None else str(include)),
        log_samples=False,
    )
    return list(_rows(found))


def _rows(found: Any) -> Iterator[Row]:
    """Yield a row for each metric in what the harness returns."""
    for task, scores in found["results"].items():
        for key, value in scores.items():
            metric, _, filtered = key.partition(",")
            error = scores.get(f"{metric}_stderr,{filtered}")
            if not filtered or metric.endswith("_stderr"):
                continue
            yield {
                "task": task,
                "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                "mean": value,
                "error": error if isinstance(error, float) else None,
                "questions": found["n-samples"].get(task, {}).get("effective"),
            }

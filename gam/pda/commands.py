"""The command `gam-pda`; the only place of the loop that prints or exits."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click

from gam.commands.terminal import Command, Option
from gam.commands.text import shown, table
from gam.figures import number, percent
from gam.pda.files import Row
from gam.pda.models.base import DTYPES, Generation
from gam.pda.prompts import Prompt, PromptSettings
from gam.pda.scores import EXTRACTORS
from gam.pda.train import Training
from gam.version import __version__

_MODEL = """\b
A model is a folder, a Hub id user/name[@revision], or NAME@URL for the model NAME of a
server that speaks OpenAI's protocol, such as qwen@http://localhost:8000/v1.
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gam-pda")
def main() -> None:
    """Preference Delta Aggregation: make a student better with the answers of weaker models."""
    if not sys.stderr.isatty():
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def _settings(kind: type, heading: str, skip: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for each field of a settings class."""

    def decorate(command: Any) -> Any:
        for entry in reversed(fields(kind)):
            if entry.name in skip:
                continue
            names = "--" + entry.name.replace("_", "-")
            default: Any = entry.default
            kind_of: Any = type(default)
            if default is MISSING:  # a mapping
                kind_of, default = _JsonObject(), {}
            if entry.metadata["choices"]:
                kind_of = click.Choice(entry.metadata["choices"])
            if isinstance(default, bool):
                names += "/--no-" + entry.name.replace("_", "-")
            command = click.option(
                names,
                type=kind_of,
                default=default,
                show_default=default != {},
                help=entry.metadata["help"],
                cls=Option,
                heading=heading,
            )(command)
        return command

    return decorate


class _JsonObject(click.ParamType):  # type: ignore[type-arg]
    """A JSON object on the command line."""

    name = "JSON"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """Return the object."""
        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.fail(f'{value!r} is not a JSON object such as {{"enable_thinking": false}}.')
        return found


def _option(*names: str, heading: str = "What to do", **more: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=Option, heading=heading, **more)


_PROMPTS = _settings(PromptSettings, "Prompts")
_DTYPE = _option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    heading="Answers",
    help="Number format of local weights.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@main.command(cls=Command, epilog=_MODEL)
@click.argument("prompts")
@_option("--weak", required=True, help="Model whose answers are chosen.")
@_option("--weaker", required=True, help="Model whose answers are rejected.")
@_option("-o", "--output", required=True, type=Path, help="Folder to write or to go on with.")
@_option("--keep", help="Regular expression that a chosen answer must match, or the pair is out.")
@_settings(Generation, "Answers")
@_DTYPE
@_PROMPTS
@_JSON
def pairs(prompts: str, weak: str, weaker: str, output: Path, **options: Any) -> None:
    """Ask two models the PROMPTS and write preference pairs.

    PROMPTS is a JSON-lines file, or a data set of the Hub as NAME:SPLIT or NAME:CONFIG:SPLIT.
    Started again after it was stopped, the command goes on where it was.
    """
    from gam.pda.pairs import make_pairs

    keep, dtype, as_json = (options.pop(name) for name in ("keep", "dtype", "as_json"))
    found = _load(prompts, options)
    record = make_pairs(
        found,
        weak,
        weaker,
        output,
        Generation(**options),
        keep=keep,
        dtype=dtype,
        progress=_progress,
    )
    if as_json:
        click.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    summary = record["summary"]
    click.echo(
        f"Wrote {shown(str(output / 'pairs.jsonl'))}: {summary['pairs']} pairs of "
        f"{summary['prompts']} prompts"
    )
    click.echo(f"\nidentical answers, dropped   {summary['dropped']['identical']}")
    click.echo(f"chosen out of format, dropped {summary['dropped']['format']}\n")
    head = ("answers", "mean characters", "median", "longest", "cut")
    rows = [(role, *map(str, summary[role].values())) for role in ("weak", "weaker")]
    for line in table(head, rows):
        click.echo(line)


@main.command(cls=Command)
@click.argument("student")
@click.argument("pairs", type=click.Path(exists=True, dir_okay=False))
@_option("-o", "--output", required=True, type=Path, help="Adapter folder to write.")
@_option("--start", type=click.Path(exists=True), help="Adapter to go on training.")
@_option("--swap", is_flag=True, help="Exchange chosen and rejected, as a control.")
@_settings(Training, "Training (defaults: arXiv 2606.00357)")
@_JSON
def train(
    student: str,
    pairs: str,
    output: Path,
    start: str | None,
    swap: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a LoRA adapter of STUDENT on PAIRS, a JSON-lines file.

    Runs unchanged under `accelerate launch -m gam.pda train ...`, on several GPUs or nodes.
    Started again with the same settings, it goes on from its last checkpoint.
    """
    from gam.pda.train import train_adapter

    record = train_adapter(
        student, pairs, output, Training(**settings), start=start, swap=swap, progress=_progress
    )
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes one speaks
    if as_json:
        click.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    click.echo(
        f"Wrote {shown(str(output))}: {record['settings']['objective']}, {record['steps']} steps "
        f"on {record['pairs_used']} pairs, last loss {number(record['log'][-1]['loss'])}"
    )


@main.command(cls=Command, epilog=_MODEL)
@click.argument("model")
@click.argument("questions")
@_option("--adapter", "adapters", multiple=True, help="Adapter folder to score; may be repeated.")
@_option("-o", "--output", type=Path, help="Folder for every answer and the scores.")
@_option(
    "--extractor",
    default="text",
    show_default=True,
    help=f"Where the answer stands: {', '.join(EXTRACTORS)}, or a regular expression.",
)
@_settings(Generation, "Answers")
@_DTYPE
@_PROMPTS
@_JSON
def evaluate(
    model: str,
    questions: str,
    adapters: Sequence[str],
    output: Path | None,
    extractor: str,
    **options: Any,
) -> None:
    """Score MODEL, and MODEL with each adapter, on QUESTIONS.

    QUESTIONS is a JSON-lines file whose objects hold the prompt and "answer", a text or a list
    of texts that all count. Differences are to the first row, question by question.
    """
    from gam.pda.evaluate import score_adapters

    dtype, as_json = (options.pop(name) for name in ("dtype", "as_json"))
    found = _load(questions, options)
    scores = score_adapters(
        model, adapters, found, Generation(**options), extractor, dtype=dtype, output=output
    )
    if as_json:
        click.echo(json.dumps(scores, indent=2, ensure_ascii=False))
        return
    head = ("", "exact match", "over the first", "token F1")
    rows = [
        (
            shown(row["name"]),
            _estimate(row["exact"]),
            _estimate(row["over_first"]),
            _estimate(row["f1"]),
        )
        for row in scores
    ]
    for line in table(head, rows):
        click.echo(line)
    click.echo(
        f"\n±: standard error over the {scores[0]['questions']} questions. Over the first: exact "
        "match minus\nthat of the first row, question by question."
    )


@main.command(cls=Command)
@click.argument("model")
@click.argument("tasks", nargs=-1, required=True)
@_option("--adapter", type=click.Path(exists=True, file_okay=False), help="Adapter folder.")
@_option("--limit", type=int, default=0, help="Only the first so many questions of each task.")
@_option("--few-shot", type=int, help="Examples before each question  [default: the task's].")
@_option("--chat", is_flag=True, help="Apply the chat template.")
@_option("--batch-size", type=int, default=16, show_default=True, help="Requests at a time.")
@_option("--include", type=click.Path(exists=True, path_type=Path), help="Folder of more tasks.")
@_DTYPE
@_JSON
def harness(model: str, tasks: Sequence[str], as_json: bool, **options: Any) -> None:
    """Score MODEL on TASKS of lm-evaluation-harness (extra `harness`), such as gsm8k."""
    from gam.pda.harness import run_harness

    rows = run_harness(model, tasks, **options)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    cells = [
        (
            row["task"],
            row["metric"],
            number(row["mean"]),
            "" if row["error"] is None else number(row["error"]),
        )
        for row in rows
    ]
    for line in table(("task", "metric", "mean", "standard error"), cells):
        click.echo(line)


@main.command(cls=Command)
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_option("-o", "--output", type=Path, help='Folder of the run [default: "run" beside RECIPE].')
@_JSON
def run(recipe: Path, output: Path | None, as_json: bool) -> None:
    """Do everything in RECIPE (YAML) that is not done yet, and report.

    What the stages need (libraries, models, files, the options of every merge) is checked before
    the first one begins. A stage that is done is not done again, so a run that was stopped goes
    on where it was.
    """
    from gam.pda.loop import Run
    from gam.pda.recipe import read_run_recipe
    from gam.pda.report import EXPLANATION, report_cells, write_report

    where = output or recipe.parent / "run"
    done = Run(read_run_recipe(recipe), where, lambda line: click.echo(line, err=True))
    results = done.results()
    write_report(results, where)
    if as_json:
        click.echo(json.dumps(results, ensure_ascii=False))
        return
    for line in table(*report_cells(results)):
        click.echo(line)
    click.echo(f"\n{EXPLANATION}\nWrote {shown(str(where / 'report.md'))}, .json and .png")


def _load(source: str, options: Row) -> list[Prompt]:
    """Return the prompts; takes the settings of prompts out of the options."""
    from gam.pda.prompts import load_prompts

    names = [entry.name for entry in fields(PromptSettings)]
    return load_prompts(source, **{name: options.pop(name) for name in names})


def _estimate(value: dict[str, float]) -> str:
    return f"{percent(value['mean'])} ± {percent(value['error'])}"


def _progress(what: str, done: int, wanted: int) -> None:
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        click.echo(f"\r{what}: {done} of {wanted}", nl=done == wanted, err=True)

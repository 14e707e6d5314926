"""The model card of a merged adapter: what it is made of, and how to make and load it."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from gam.figures import number, percent
from gam.hub.names import HubName, hub_name
from gam.report.markdown import block, code, printable, table, yaml_text
from gam.report.rerun import needs_record, rerun_line
from gam.version import __version__

if TYPE_CHECKING:
    from gam.adapter import Adapter
    from gam.report.types import InputReport, MergeReport, ModuleReport

_N = TypeVar("_N", int, float)

_HUB = "https://huggingface.co"
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts


def model_card(adapter: Adapter) -> str:
    """Return the model card of a merged adapter, Markdown with YAML front matter.

    The same adapter always gives the same text: no dates, and adapters by name, not by path.

    Args:
        adapter: The result of a merge; its ``report`` is not None.

    Returns:
        The text of ``README.md``.
    """
    report = adapter.report
    assert report is not None
    base = adapter.facts.base
    sections = [
        _front_matter(report, base),
        f"# Merged LoRA adapter ({report.method})",
        f"{len(report.inputs)} LoRA adapters merged into one by gam-merge {__version__}. "
        + (f"It belongs on the base model {_model(base)}." if base else "")
        + " `gam_merge.json` in this folder records every module.",
        "## What was merged",
        _inputs_table(report),
        "## How",
        _method(report),
        block("bash", rerun_line(report)),
        *_other_methods(report),
        "## The result",
        "\n".join(_numbers(adapter)),
        _kinds_table(report),
        *_warnings(report),
        "## Use",
        _usage(adapter, base),
        "## Limits",
        "Merging adds weights up and trains nothing. Test the result on your own tasks before "
        "you use it. It fits only the base model that the adapters were trained on. The "
        "licences of that model and of every merged adapter apply to it.",
    ]
    return "\n\n".join(sections) + "\n"


def _warnings(report: MergeReport) -> list[str]:
    if not report.warnings:
        return []
    return ["## Warnings", "\n".join(f"- {printable(warning)}" for warning in report.warnings)]


def _front_matter(report: MergeReport, base: Any) -> str:
    # Also the adapters: this is how the Hub links a model to those that it was made from. It
    # refuses a card with anything that is not the name of a repository.
    names = [base, *(name.repo for entry in report.inputs if (name := _hub_name(entry)))]
    names = [n for n in dict.fromkeys(names) if isinstance(n, str) and _REPOSITORY.fullmatch(n)]
    lines = ["---"]
    if len(names) == 1:
        lines += [f"base_model: {yaml_text(names[0])}"]
    elif names:
        lines += ["base_model:", *(f"- {yaml_text(name)}" for name in names)]
    lines += ["base_model_relation: adapter"] if names else []
    lines += ["library_name: peft", "tags:"]
    tags = ["lora", "peft", "merge", "gam-merge", report.method]
    lines += [f"- {yaml_text(tag)}" for tag in tags]
    return "\n".join([*lines, "---"])


def _hub_name(entry: InputReport) -> HubName | None:
    return hub_name(f"hf://{entry.source}") if entry.commit else None


def _model(base: Any) -> str:
    known = isinstance(base, str) and "/" in base and _REPOSITORY.fullmatch(base)
    return f"[{code(base)}]({_HUB}/{base})" if known else code(base)


def _inputs_table(report: MergeReport) -> str:
    rows = [
        (
            code(entry.name),
            "varies" if entry.weight is None else f"{entry.weight:.4g}",
            str(entry.modules),
            ", ".join(str(rank) for rank in entry.ranks),
            _origin(entry),
            number(report.cosines.get(entry.name, math.nan)),
        )
        for entry in report.inputs
    ]
    head = ("Adapter", "Weight", "Modules", "Rank", "From", "Cosine with the result")
    return table([head, ("---", *["---:"] * 3, "---", "---:"), *rows])


def _origin(entry: InputReport) -> str:
    name = _hub_name(entry)
    if name is not None and entry.commit is not None:
        parts = [_HUB, name.repo, "tree", entry.commit, quote(name.folder)]
        page = "/".join(filter(None, parts))
        text = name.repo + (f":{name.folder}" if name.folder else "")
        return f"[{code(text)}]({page}) at {code(entry.commit[:12])}"
    return f"SHA-256 {code(entry.sha256[:12])}" if entry.sha256 else "in memory"


def _method(report: MergeReport) -> str:
    linked = re.sub(r"arXiv[: ](\d{4}\.\d{5})", r"[\g<0>](https://arxiv.org/abs/\1)", report.paper)
    paper = f" ({printable(linked)})" if linked else ""
    package = f" of the package {code(report.package)}" if report.package else ""
    again = "To make it again, give the same adapters in this order"
    if needs_record(report):
        again = "Some modules have options of their own. To make it again, run in this folder"
    elif all(entry.commit for entry in report.inputs):
        again = "To make it again, run"
    recipe = " (or give `gam_merge.json` to `--config`)"
    return f"Method: `{report.method}`{package}{paper}. {again}{recipe}:"


def _other_methods(report: MergeReport) -> list[str]:
    """Return a sentence on the methods of single modules, if any."""
    named = [
        f"`{name}`" + (f" ({printable(paper)})" if paper else "")
        for name, paper in report.papers.items()
    ]
    return [f"Single modules were merged by {', '.join(named)}."] if named else []


def _numbers(adapter: Adapter) -> Iterator[str]:
    report = adapter.report
    assert report is not None
    ranks = sorted({module.rank for module in adapter.modules.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    yield f"- {len(adapter.modules)} modules, rank {span}, {report.dtype}, scaling 1."
    yield (
        f"- Size: {number(report.norm_ratio)} times the mean size of the adapters that were "
        "merged. Size is the Frobenius norm of the update."
    )
    yield (
        f"- Energy kept: {percent(report.energy_kept)}, the share of the squared size of the "
        "exact merge that this rank can hold."
    )
    yield f"- Writing in {report.dtype} changed the update by {percent(report.rounding_error)}."


def _kinds_table(report: MergeReport) -> str:
    """Return the report's modules by the last part of their names."""
    kinds: dict[str, list[ModuleReport]] = {}
    for module in report.modules:
        kinds.setdefault(module.name.rpartition(".")[2], []).append(module)
    head = (
        "Modules",
        "Count",
        "Rank",
        "Size",
        "Energy kept, at least",
        "Change by writing, at most",
    )
    rows = [
        (
            code(kind),
            str(len(modules)),
            _range([module.rank for module in modules], str),
            _range([module.norm_ratio for module in modules], number),
            percent(min(_finite([module.energy_kept for module in modules]))),
            percent(max(_finite([module.rounding_error for module in modules]))),
        )
        for kind, modules in sorted(kinds.items())
    ]
    return table([head, ("---", *["---:"] * 5), *rows])


def _range(values: Sequence[_N], text: Callable[[_N], str]) -> str:
    known = _finite(values)
    low, high = text(min(known)), text(max(known))
    return low if low == high else f"{low} to {high}"


def _finite(values: Sequence[_N]) -> Sequence[_N]:
    """Return the values that are numbers; all of them if none is."""
    return [value for value in values if math.isfinite(value)] or values


def _usage(adapter: Adapter, base: Any) -> str:
    name = str(base) if base else "BASE-MODEL"
    model = "AutoModel"
    if adapter.facts.task == "CAUSAL_LM":
        model = "AutoModelForCausalLM"
    rank = max(module.rank for module in adapter.modules.values())
    parts = [
        "With PEFT:",
        block(
            "python",
            "from peft import PeftModel",
            f"from transformers import {model}",
            "",
            f"model = {model}.from_pretrained({json.dumps(printable(name))})",
            'adapter = "path/to/this/folder"  # or the name of this repository on the Hub',
            "model = PeftModel.from_pretrained(model, adapter)",
        ),
    ]
    fitting = [allowed for allowed in _VLLM_RANKS if allowed >= rank]
    if fitting:
        words = ["vllm", "serve", printable(name), "--enable-lora"]
        words += ["--max-lora-rank", str(fitting[0])]
        words += ["--lora-modules", "merged=path/to/this/folder"]
        parts += [
            "With vLLM, by that folder or repository:",
            block("bash", shlex.join(words)),
        ]
    return "\n\n".join(parts)

"""The model card of a merged adapter: what it is made of, and how to make and load it."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from gam.hub.names import HubName, hub_name
from gam.version import __version__

if TYPE_CHECKING:
    from gam.adapter import Adapter
    from gam.report.types import InputReport, MergeReport, ModuleReport

CARD_NAME = "README.md"

_N = TypeVar("_N", int, float)

# Options in the rerun command: always written, or only where they differ from the default.
_ALWAYS = ("method", "weights", "dtype")
_DEFAULTS = {
    "normalize": None,
    "scale": 1.0,
    "rank": None,
    "uniform_rank": False,
    "device": "auto",
    "missing": "zero",
    "calibrate": "none",
    "alpha": None,
    "allow_pickle": False,
    "allow_base_mismatch": False,
}

_HUB = "https://huggingface.co"
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
# What YAML takes for text without quotes, and what it takes for something else.
_BARE = re.compile(r"\w[\w.-]*/[\w.-]+|[a-zA-Z][\w.-]*", re.ASCII)
_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})
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
    base = adapter.config.get("base_model_name_or_path")
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
        "```bash\n" + _command(report) + "\n```",
        *_other_methods(report),
        "## The result",
        "\n".join(_numbers(adapter)),
        _kinds_table(report),
        *_warnings(report),
        "## Use",
        _usage(adapter, base),
        "## Limits",
        "Merging combines weights and trains nothing: measure the result on your tasks before "
        "you rely on it. It fits only the base model that the adapters were trained on. The "
        "licences of that model and of every merged adapter apply to it.",
    ]
    return "\n\n".join(sections) + "\n"


def _warnings(report: MergeReport) -> list[str]:
    if not report.warnings:
        return []
    return ["## Warnings", "\n".join(f"- {_plain(warning)}" for warning in report.warnings)]


def _front_matter(report: MergeReport, base: Any) -> str:
    # Also the adapters: this is how the Hub links a model to those that it was made from. It
    # refuses a card with anything that is not the name of a repository.
    names = [base, *(name.repo for entry in report.inputs if (name := _hub_name(entry)))]
    names = [n for n in dict.fromkeys(names) if isinstance(n, str) and _REPOSITORY.fullmatch(n)]
    lines = ["---"]
    if len(names) == 1:
        lines += [f"base_model: {_yaml(names[0])}"]
    elif names:
        lines += ["base_model:", *(f"- {_yaml(name)}" for name in names)]
    lines += ["base_model_relation: adapter"] if names else []
    lines += ["library_name: peft", "tags:"]
    tags = ["lora", "peft", "merge", "gam-merge", report.method]
    lines += [f"- {_yaml(tag)}" for tag in tags]
    return "\n".join([*lines, "---"])


def _yaml(text: str) -> str:
    """Return text as the client's own writer does, so that it finds nothing to change."""
    bare = _BARE.fullmatch(text) and text.lower() not in _WORDS
    return text if bare else json.dumps(text)


def _hub_name(entry: InputReport) -> HubName | None:
    return hub_name(f"hf://{entry.source}") if entry.commit else None


def _model(base: Any) -> str:
    known = isinstance(base, str) and "/" in base and _REPOSITORY.fullmatch(base)
    return f"[{_code(base)}]({_HUB}/{base})" if known else _code(base)


def _inputs_table(report: MergeReport) -> str:
    rows = [
        (
            _code(entry.name),
            "varies" if entry.weight is None else f"{entry.weight:.4g}",
            str(entry.modules),
            ", ".join(str(rank) for rank in entry.ranks),
            _origin(entry),
            _number(report.cosines.get(entry.name, math.nan)),
        )
        for entry in report.inputs
    ]
    head = ("Adapter", "Weight", "Modules", "Rank", "From", "Cosine with the result")
    return _table([head, ("---", *["---:"] * 3, "---", "---:"), *rows])


def _origin(entry: InputReport) -> str:
    name = _hub_name(entry)
    if name is not None and entry.commit is not None:
        parts = [_HUB, name.repo, "tree", entry.commit, quote(name.folder)]
        page = "/".join(filter(None, parts))
        text = name.repo + (f":{name.folder}" if name.folder else "")
        return f"[{_code(text)}]({page}) at {_code(entry.commit[:12])}"
    return f"SHA-256 {_code(entry.sha256[:12])}" if entry.sha256 else "in memory"


def _method(report: MergeReport) -> str:
    linked = re.sub(r"arXiv (\d{4}\.\d{5})", r"[\g<0>](https://arxiv.org/abs/\1)", report.paper)
    paper = f" ({_plain(linked)})" if linked else ""
    package = f" of the package {_code(report.package)}" if report.package else ""
    again = "To make it again, give the same adapters in order"
    if _refined(report):
        again = "Single modules have options of their own. To make it again, from this folder"
    elif all(entry.commit for entry in report.inputs):
        again = "To make it again"
    recipe = " (the recipe is also in `gam_merge.json`, for `--config`)"
    return f"Method `{report.method}`{package}{paper}. {again}{recipe}:"


def _refined(report: MergeReport) -> bool:
    """Tell whether the options cannot be given on a command line."""
    lists = any(isinstance(weight, list) for weight in report.options["weights"])
    return lists or any(module.settings for module in report.modules)


def _other_methods(report: MergeReport) -> list[str]:
    """Return a sentence on the methods of single modules, if any."""
    named = [
        f"`{name}`" + (f" ({_plain(paper)})" if paper else "")
        for name, paper in report.papers.items()
    ]
    return [f"Single modules were merged by {', '.join(named)}."] if named else []


def _command(report: MergeReport) -> str:
    """Return the command line that gives this result, names in place of paths if it has any."""
    if _refined(report):
        return "gam-merge --config gam_merge.json -o OUT"
    options = dict(report.options)
    used = map(repr, options.pop("weights"))
    # Labels count adapters of one name; the folders or files themselves do not.
    words = ["gam-merge", *map(_argument, report.inputs), "-o", "OUT"]
    words += ["--method", options.pop("method"), f"--weights={','.join(used)}"]
    words += ["--dtype", report.dtype]
    options.pop("dtype")
    for name, default in _DEFAULTS.items():
        value = options.pop(name, default)
        if value == default:
            continue
        flag = "--" + name.replace("_", "-")
        if name == "normalize":
            words.append("--normalize" if value else "--no-normalize")
        else:
            words += [flag] if isinstance(default, bool) else [f"{flag}={value}"]
    for name, value in options.items():
        if value is not None:
            words += ["-p", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return shlex.join(words)


def _argument(entry: InputReport) -> str:
    source = entry.source or entry.name
    return _plain(source if entry.commit else PurePath(source).name)


def _numbers(adapter: Adapter) -> Iterator[str]:
    report = adapter.report
    assert report is not None
    ranks = sorted({module.rank for module in adapter.modules.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    yield f"- {len(adapter.modules)} modules, rank {span}, {report.dtype}, scaling 1."
    yield (
        f"- Size: {_number(report.norm_ratio)} of the mean size of the merged updates "
        "(Frobenius norm)."
    )
    yield f"- {_percent(report.energy_kept)} of the exact merge's squared norm fits this rank."
    yield f"- Change from rounding to {report.dtype}: {_percent(report.rounding_error)}."


def _kinds_table(report: MergeReport) -> str:
    """Return the report's modules by the last part of their names."""
    kinds: dict[str, list[ModuleReport]] = {}
    for module in report.modules:
        kinds.setdefault(module.name.rpartition(".")[2], []).append(module)
    head = ("Modules", "Count", "Rank", "Size", "Least energy kept", "Most change from rounding")
    rows = [
        (
            _code(kind),
            str(len(modules)),
            _range([module.rank for module in modules], str),
            _range([module.norm_ratio for module in modules], _number),
            _percent(min(_finite([module.energy_kept for module in modules]))),
            _percent(max(_finite([module.rounding_error for module in modules]))),
        )
        for kind, modules in sorted(kinds.items())
    ]
    return _table([head, ("---", *["---:"] * 5), *rows])


def _range(values: Sequence[_N], text: Callable[[_N], str]) -> str:
    known = _finite(values)
    low, high = text(min(known)), text(max(known))
    return low if low == high else f"{low} to {high}"


def _finite(values: Sequence[_N]) -> Sequence[_N]:
    """Return the values that are numbers; all of them if none is."""
    return [value for value in values if math.isfinite(value)] or values


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _usage(adapter: Adapter, base: Any) -> str:
    name = str(base) if base else "BASE-MODEL"
    model = "AutoModel"
    if adapter.config.get("task_type") == "CAUSAL_LM":
        model = "AutoModelForCausalLM"
    rank = max(module.rank for module in adapter.modules.values())
    parts = [
        "With PEFT:",
        _block(
            "python",
            "from peft import PeftModel",
            f"from transformers import {model}",
            "",
            f"model = {model}.from_pretrained({json.dumps(_plain(name))})",
            'adapter = "path/to/this/folder"  # or the name of this repository on the Hub',
            "model = PeftModel.from_pretrained(model, adapter)",
        ),
    ]
    fitting = [allowed for allowed in _VLLM_RANKS if allowed >= rank]
    if fitting:
        words = ["vllm", "serve", _plain(name), "--enable-lora"]
        words += ["--max-lora-rank", str(fitting[0])]
        words += ["--lora-modules", "merged=path/to/this/folder"]
        parts += ["With vLLM (its path may be that name, too):", _block("bash", shlex.join(words))]
    return "\n\n".join(parts)


def _block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "undefined"


def _percent(value: float) -> str:
    if 0 < value < 1e-5:
        return "below 0.001 %"
    return f"{100 * value:.4g} %" if math.isfinite(value) else "undefined"


def _plain(text: Any) -> str:
    """Return text on one line that any encoding of Unicode can hold."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def _code(text: Any) -> str:
    """Return a code span that also holds in a table."""
    plain = _plain(text).replace("|", "\\|")
    return f"`` {plain} ``" if "`" in plain else f"`{plain}`"

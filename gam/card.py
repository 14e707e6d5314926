"""The model card of a merged adapter: what it is made of, and how to make and load it."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from gam import __version__

if TYPE_CHECKING:
    from gam.adapter import Adapter
    from gam.report import MergeReport

# Options in the rerun command: always written, or only where they differ from the default.
_ALWAYS = ("method", "weights", "dtype")
_DEFAULTS = {
    "normalize": None,
    "scale": 1.0,
    "rank": None,
    "uniform_rank": False,
    "missing": "zero",
    "calibrate": "none",
    "alpha": None,
    "allow_pickle": False,
    "allow_base_mismatch": False,
}

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
    report: MergeReport = adapter.report
    base = adapter.config.get("base_model_name_or_path")
    sections = [
        _front_matter(report, base),
        f"# Merged LoRA adapter ({report.method})",
        f"{len(report.inputs)} LoRA adapters merged into one by gam-merge {__version__}. "
        + (f"It belongs on the base model {_code(base)}." if base else "")
        + " `gam_merge.json` in this folder records every module.",
        "## What was merged",
        _inputs_table(report),
        "## How",
        _method(report),
        "```bash\n" + _command(report) + "\n```",
        "## The result",
        "\n".join(_numbers(adapter)),
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
    lines = ["---"]
    # The Hub refuses a card whose base model is not the name of a repository.
    if isinstance(base, str) and _REPOSITORY.fullmatch(base):
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    lines += ["library_name: peft", "tags:"]
    tags = ["lora", "peft", "merge", "gam-merge", report.method]
    lines += [f"- {json.dumps(tag)}" for tag in tags]
    return "\n".join([*lines, "---"])


def _inputs_table(report: MergeReport) -> str:
    rows = [
        (
            _code(entry["name"]),
            "varies" if entry["weight"] is None else f"{entry['weight']:.4g}",
            str(entry["modules"]),
            ", ".join(str(rank) for rank in entry["ranks"]),
            _code(entry["sha256"][:12]) if entry["sha256"] else "in memory",
            _number(report.cosines.get(entry["name"], math.nan)),
        )
        for entry in report.inputs
    ]
    head = ("Adapter", "Weight", "Modules", "Rank", "SHA-256", "Cosine with the result")
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [head, ("---", *["---:"] * 3, "---", "---:"), *rows]
    )


def _method(report: MergeReport) -> str:
    paper = f" ({_plain(report.paper)})" if report.paper else ""
    package = f" of the package {_code(report.package)}" if report.package else ""
    again = "To make it again, give the same adapters in order:"
    if _refined(report):
        again = "Single modules have options of their own. To make it again, from this folder:"
    return f"Method `{report.method}`{package}{paper}. {again}"


def _refined(report: MergeReport) -> bool:
    """Tell whether the options cannot be given on a command line."""
    lists = any(isinstance(weight, list) for weight in report.options["weights"])
    return lists or any(module.settings for module in report.modules)


def _command(report: MergeReport) -> str:
    """Return the command line that gives this result, names in place of paths if it has any."""
    if _refined(report):
        return "gam-merge --config gam_merge.json -o OUT"
    options = dict(report.options)
    used = map(repr, options.pop("weights"))
    # Labels count adapters of one name; the folders or files themselves do not.
    sources = [entry["source"] or entry["name"] for entry in report.inputs]
    words = ["gam-merge", *(_plain(PurePath(source).name) for source in sources), "-o", "OUT"]
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


def _numbers(adapter: Adapter) -> Iterator[str]:
    report: MergeReport = adapter.report
    ranks = sorted({module.rank for module in adapter.modules.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    yield f"- {len(adapter.modules)} modules, rank {span}, {report.dtype}, scaling 1."
    yield (
        f"- Size: {_number(report.norm_ratio)} of the mean size of the merged updates "
        "(Frobenius norm)."
    )
    yield f"- {_percent(report.energy_kept)} of the exact merge's squared norm fits this rank."
    yield f"- Change from rounding to {report.dtype}: {_percent(report.rounding_error)}."


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
            'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
        ),
    ]
    fitting = [allowed for allowed in _VLLM_RANKS if allowed >= rank]
    if fitting:
        words = ["vllm", "serve", _plain(name), "--enable-lora"]
        words += ["--max-lora-rank", str(fitting[0])]
        words += ["--lora-modules", "merged=path/to/this/folder"]
        parts += ["With vLLM:", _block("bash", shlex.join(words))]
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

"""The command line that makes a merge again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from gam.merging.options import DEFAULTS, OPTIONS
from gam.report.markdown import printable

if TYPE_CHECKING:
    from gam.report.types import InputReport, MergeReport


def rerun_line(report: MergeReport) -> str:
    """Return the command line that gives this result, for the same adapters in order.

    Adapters are called by their names on the Hub, or by the names of their files without the
    folders: the line says nothing of the machine.
    """
    if needs_record(report):
        return "gam-merge --config gam_merge.json -o OUT"
    options = {**report.options, "dtype": report.dtype}
    words = ["gam-merge", *map(_argument, report.inputs), "-o", "OUT"]
    for name, option in OPTIONS.items():
        value = options.pop(name, DEFAULTS[name])
        changed = value != DEFAULTS[name]
        if option.rerun == "always" or (option.rerun == "changed" and changed):
            words += _flag(name, value)
    for name, value in options.items():  # parameters of the method
        if value is not None:
            words += ["-p", f"{name}={_text(value)}"]
    return shlex.join(words)


def needs_record(report: MergeReport) -> bool:
    """Tell whether the options cannot be given on a command line."""
    gradients = any(isinstance(weight, list) for weight in report.options["weights"])
    refined = bool(report.options.get("modules"))
    return gradients or refined or any(module.settings for module in report.modules)


def _argument(entry: InputReport) -> str:
    # Labels count adapters of one name; the folders or files themselves do not.
    source = entry.source or entry.name
    return printable(source if entry.commit else PurePath(source).name)


def _flag(name: str, value: Any) -> Iterator[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{flag}" if value else f"--no-{flag}"
    else:
        yield f"--{flag}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(repr, value))
    return str(value).lower() if isinstance(value, bool) else str(value)

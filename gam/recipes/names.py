"""Which names a recipe may use: options of a merge, and parameters of the methods."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gam import strategies
from gam.errors import OptionError, PluginError
from gam.merging.options import MODULE_OPTIONS, OPTIONS
from gam.recipes.document import KeyPath, line_of


def methods(options: Mapping[str, Any]) -> list[str]:
    """Return the methods that options name, that of the run first."""
    refined = options.get("modules")
    parts = list(refined.values()) if isinstance(refined, Mapping) else []
    named = [part["method"] for part in parts if isinstance(part, Mapping) and part.get("method")]
    return [options.get("method", "gam"), *named]


def check_names(options: Mapping[str, Any], lines: Mapping[KeyPath, int], where: str) -> None:
    """Refuse options that no merge has, all of them at once.

    Args:
        options: As a recipe has them.
        lines: Path of an option to its line.
        where: What to call the recipe in messages.

    Raises:
        OptionError: There are unknown names; the message has their lines.
    """
    wrong = []
    lists: dict[str, None] = {}  # each is shown once
    for path, known in _used(options):
        if path[-1] in known:
            continue
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        wrong.append((line_of(lines, path), f"{path[-1]!r}", hint))
        if not near:
            lists[f"; known {'in modules ' if path[1:] else ''}are {', '.join(known)}"] = None
    end = "." if lists else ""
    if len(wrong) == 1:
        line, name, hint = wrong[0]
        raise OptionError(f"{where}, line {line}: unknown option {name}{hint}{''.join(lists)}{end}")
    if wrong:
        listed = ", ".join(f"{name} (line {line}{hint})" for line, name, hint in wrong)
        raise OptionError(f"{where}: unknown options: {listed}{''.join(lists) or '.'}{end}")


def _used(options: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Sequence[str]]]:
    """Yield the path of every option, with the names that it may have there."""
    parameters: set[str] = set()
    for method in strategies.names():
        with contextlib.suppress(PluginError):  # a broken method is refused when it is used
            parameters.update(param.name for param in strategies.get(method).params)
    known = ["adapters", *OPTIONS, *sorted(parameters)]
    for name in options:
        yield (name,), known
    inner = [*MODULE_OPTIONS, *sorted(parameters)]
    refined = options.get("modules")
    for pattern, own in refined.items() if isinstance(refined, Mapping) else ():
        for name in own if isinstance(own, Mapping) else ():
            yield ("modules", pattern, name), inner

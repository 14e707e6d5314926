"""Recipes: the options of a merge in a file, written by hand or recorded by a merge."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gam import strategies
from gam.errors import AdapterError, OptionError
from gam.files import REPORT_NAME
from gam.hub.names import HubName, parse_name
from gam.merging.options import OPTIONS
from gam.merging.plan import Given, check_label
from gam.recipes.document import KeyPath, line_of, parse
from gam.recipes.mergekit import check_foreign
from gam.recipes.names import check_names, methods
from gam.report.record import Record, is_record

_Adapters = Sequence[Given] | Mapping[str, Given]


@dataclass(frozen=True)
class Recipe:
    """Adapters and options of a merge, as far as a file gives them.

    Attributes:
        where: What the user calls the file.
        adapters: As a merge takes them; None where the file has none. For a record all are
            there, None those that were in memory.
        own: The options in the file, by the names of the flags.
        lines: Path of an option to its line, where lines are known.
        record: The record of a merge, where the file is one.
    """

    where: str = ""
    adapters: Sequence[Given] | Mapping[str, Given | None] | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    record: Record | None = None

    def inputs(self, given: _Adapters | None) -> _Adapters:
        """Return the adapters in force: those given, under the labels of the recipe, or its own.

        Raises:
            OptionError: There are none, or not as many as the recipe has labels for.
            AdapterError: One that the record names is not there.
        """
        if given:
            return self._labelled(given)
        own = self.adapters
        if not own:
            at = "" if own is None else self._at("adapters")
            raise OptionError(f"{at}adapters: got none; give at least one to merge.")
        if not isinstance(own, Mapping):
            return own
        found: dict[str, Given] = {}
        for label, place in own.items():
            recorded = self.record is not None
            if place is None or (recorded and isinstance(place, Path) and not place.exists()):
                lost = f"is not at {os.fspath(place)!r} any more" if place else "was in memory only"
                raise AdapterError(
                    f"{self.where}: adapter {label!r} {lost}. Give all adapters before --config, "
                    f"in this order: {', '.join(own)}."
                )
            found[label] = place
        return found

    def _labelled(self, given: _Adapters) -> _Adapters:
        """Return given adapters under the labels of the recipe, if it has any."""
        own = self.adapters
        if not isinstance(own, Mapping):
            return given
        if isinstance(given, Mapping):
            if given.keys() != own.keys():
                raise OptionError(
                    f"adapters: got {', '.join(given)}, but {self.where} merges {', '.join(own)}."
                )
            return {label: given[label] for label in own}
        if len(given) != len(own):
            raise OptionError(
                f"adapters: got {len(given)}, but {self.where} merges {len(own)}: "
                f"{', '.join(own)}. Give all of them, in this order."
            )
        return dict(zip(own, given, strict=True))

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options in force; to be called under `located`.

        Args:
            given: By the names of the flags; they win over those of the recipe. With another
                method, the parameters that the recipe gives to its own method do not count.

        Raises:
            OptionError: A method is unknown.
        """
        options = {**self.own, **given}
        if "method" not in given:
            return options
        kept = {*OPTIONS, *given}
        for strategy in map(strategies.get, methods(options)):
            kept.update(param.name for param in strategy.params)
        return {name: value for name, value in options.items() if name in kept}

    @property
    def expect(self) -> Mapping[str, tuple[str | None, str | None]] | None:
        """For a record: label to the SHA-256 of weights and config that were merged."""
        return None if self.record is None else self.record.expect

    def check_programs(self, options: Mapping[str, Any]) -> None:
        """Refuse to follow a record with programs that may give another result than it had.

        To be called under `located`; without a record nothing is checked.

        Args:
            options: From `options`.

        Raises:
            OptionError: A method is unknown.
            AdapterError: The numerics of gam-merge, or the package of a method, are not those
                of the record.
        """
        if self.record is not None:
            packages = {name: strategies.get(name).package for name in methods(options)}
            self.record.check_programs(packages, self.where)

    @contextlib.contextmanager
    def located(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Say of an error in an option that comes from the file where it stands.

        Args:
            given: Options that win over those of the file, and so are not to blame it.
        """
        try:
            yield
        except OptionError as error:
            if not error.path or error.path[0] in given or error.path[0] not in self.own:
                raise
            raise OptionError(f"{self._at(*error.path)}{error}", *error.path) from None

    def _at(self, *path: str) -> str:
        """Return the file and, where it is known, the line of an option."""
        line = f", line {line_of(self.lines, path)}" if self.lines else ""
        return f"{self.where}{line}: "


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe (YAML or JSON), or the record of an earlier merge.

    Args:
        path: The file; for a record also the folder that holds it.

    Returns:
        The recipe. Relative paths of adapters start at the folder that the file is in.

    Raises:
        OptionError: It cannot be read, or is no recipe.
    """
    file = Path(path)
    file = file / REPORT_NAME if file.is_dir() else file
    where = os.fspath(file)
    text = _text(file, where)
    if (found := _as_json(text)) is not None:
        if is_record(found):
            return _recorded(Record.read(found, where), file, where)
        _check_kind(found, where)
        text = text.replace("\t", " ")  # as white space, which YAML allows less of
    value, lines = parse(text, where)
    if not isinstance(value, dict):
        kind = "nothing" if value is None else "a list" if isinstance(value, list) else "one value"
        raise OptionError(f"{where}: got {kind}, expected options such as method or weights.")
    check_foreign(value, where)
    options = {name.replace("-", "_"): option for name, option in value.items()}
    lines = {(path[0].replace("-", "_"), *path[1:]): line for path, line in lines.items()}
    check_names(options, lines, where)
    adapters = options.pop("adapters", None)
    return Recipe(where, _adapters(adapters, lines, file, where), _given(options), lines)


def _text(file: Path, where: str) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OptionError(f"config {where!r}: cannot read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise OptionError(f"config {where!r}: not UTF-8 text.") from None


def _recorded(record: Record, file: Path, where: str) -> Recipe:
    """Return the recipe of a recorded merge."""
    for index, entry in enumerate(record.inputs):
        check_label(entry.name, f"{where}: inputs[{index}].name: ")
    places = record.places(file.resolve().parent)
    return Recipe(where, places, _given(record.options), record=record)


def _as_json(text: str) -> dict[str, Any] | None:
    """Return a JSON object; None for any other text."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _check_kind(value: Mapping[str, Any], where: str) -> None:
    """Refuse an object that is one of the other files that lie about a merge."""
    kind = None
    if "peft_type" in value:
        kind = "the config of an adapter"
    elif {"options", "inputs", "modules"} <= value.keys():
        kind = "the plan that --dry-run --json prints"
    if kind is not None:
        raise OptionError(
            f"{where}: got {kind}, expected a recipe, or the {REPORT_NAME} of a merge."
        )


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _adapters(value: Any, lines: Mapping[KeyPath, int], file: Path, where: str) -> _Adapters | None:
    if value is None:
        return None
    items = list(value.items()) if isinstance(value, dict) else value
    places = [place for _, place in items] if isinstance(value, dict) else items
    if not isinstance(places, list) or not all(isinstance(p, str) and p for p in places):
        raise OptionError(
            f"{where}, line {lines['adapters',]}: adapters: got {value!r}, expected a list of "
            "paths or names on the Hub, or labels with one each."
        )
    for label in value if isinstance(value, dict) else ():
        check_label(label, f"{where}, line {line_of(lines, ('adapters', label))}: ")
    found = [_place(place, file.parent) for place in places]
    return dict(zip(value, found, strict=True)) if isinstance(value, dict) else found


def _place(text: str, folder: Path) -> Path | HubName:
    """Return the path that is there, seen from a folder; else a name on the Hub, if it is one."""
    path = folder / Path(text).expanduser()
    name = parse_name(text)
    return path if name is None or (path.exists() and not text.startswith("hf://")) else name

"""Recipes: the options of a merge in a file, written by hand or recorded by a merge."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gam import strategies
from gam.errors import AdapterError, OptionError, PluginError
from gam.files import REPORT_NAME
from gam.hub.names import HubName, parse_name
from gam.merging.options import MODULE_OPTIONS
from gam.merging.plan import Given, Plan, check_label, plan_merge
from gam.recipes.document import parse
from gam.version import __version__

_Adapters = Sequence[Given] | Mapping[str, Given]
_Path = tuple[str, ...]

# Options of a merge that a recipe may have, besides its adapters.
_OPTIONS = [
    name
    for name, parameter in inspect.signature(plan_merge).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "expect"
]

# What a record holds, by what messages call it.
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "an object": dict,
    "a list": list,
    "text": str,
    "text or null": (str, type(None)),
}


@dataclass(frozen=True)
class Recipe:
    """Adapters and options of a merge, as far as a file gives them.

    Attributes:
        where: What the user calls the file.
        adapters: As `plan_merge` takes them; None where the file has none. For a record all
            are there, None those that were in memory.
        options: By the names of the flags.
        lines: Path of an option to its line, where lines are known.
        expect: For a record: label to the SHA-256 of weights and config that were merged.
        version: For a record: the version of gam-merge that made it.
        packages: For a record: method to the package that brought it; "" for gam's own.
    """

    where: str = ""
    adapters: Sequence[Given] | Mapping[str, Given | None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[_Path, int] = field(default_factory=dict)
    expect: Mapping[str, tuple[str | None, str | None]] | None = None
    version: str = __version__
    packages: Mapping[str, str] = field(default_factory=dict)

    def inputs(self, given: _Adapters | None) -> _Adapters:
        """Return the adapters in force: those given, under the labels of the recipe, or its own.

        Raises:
            OptionError: There are none, or not as many as the recipe has labels for.
            AdapterError: One that the record names is not there.
        """
        own = self.adapters
        if given:
            if not isinstance(own, Mapping):
                return given
            if isinstance(given, Mapping):
                if given.keys() != own.keys():
                    raise OptionError(
                        f"adapters: got {', '.join(given)}, but {self.where} merges "
                        f"{', '.join(own)}"
                    )
                return {label: given[label] for label in own}
            if len(given) != len(own):
                raise OptionError(
                    f"adapters: got {len(given)}, but {self.where} merges {len(own)}: "
                    f"{', '.join(own)}. Give all of them, in this order"
                )
            return dict(zip(own, given, strict=True))
        if not own:
            at = "" if own is None else self._at("adapters")
            raise OptionError(f"{at}adapters: got none; give at least one to merge")
        if not isinstance(own, Mapping):
            return own
        found: dict[str, Given] = {}
        for label, place in own.items():
            recorded = self.expect is not None
            if place is None or (recorded and isinstance(place, Path) and not place.exists()):
                lost = f"is not at {os.fspath(place)!r} any more" if place else "was in memory only"
                raise AdapterError(
                    f"{self.where}: adapter {label!r} {lost}. Give all adapters before --config, "
                    f"in this order: {', '.join(own)}"
                )
            found[label] = place
        return found

    def plan(self, adapters: _Adapters, *, allow_changes: bool = False, **given: Any) -> Plan:
        """Plan the merge that the recipe describes.

        Args:
            adapters: From `inputs`.
            allow_changes: Go on where something differs from what the record says was merged.
            **given: As for `plan_merge`; they win over the recipe's.

        Raises:
            OptionError: Something in the recipe or given is refused; the message has the
                line.
            AdapterError: An adapter is refused, or differs from the recorded one.
        """
        options = {**self.options, **given}
        with self._located(given):
            if "method" in given:
                # The recipe's parameters are for the recipe's method.
                kept = {*_OPTIONS, *given}
                for strategy in map(strategies.get, _methods(options)):
                    kept.update(param.name for param in strategy.params)
                options = {name: value for name, value in options.items() if name in kept}
            if self.expect is not None and not allow_changes:
                self._check_programs(_methods(options))
                options.setdefault("expect", self.expect)
            return plan_merge(adapters, **options)

    def _check_programs(self, methods: Sequence[str]) -> None:
        found = [(f"gam-merge {self.version}", f"gam-merge {__version__}")]
        for method in methods:
            have = strategies.get(method).package
            found.append((self.packages.get(method, have), have))
        for made, have in found:
            if made != have:
                raise AdapterError(
                    f"{self.where}: made by {made or 'gam-merge itself'}, but this is "
                    f"{have or 'gam-merge itself'}, and the result may differ. "
                    "Pass --allow-changes to merge all the same"
                )

    @contextlib.contextmanager
    def _located(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Say of an error in an option that comes from the file where it stands."""
        try:
            yield
        except OptionError as error:
            if not error.path or error.path[0] in given or error.path[0] not in self.options:
                raise
            raise OptionError(f"{self._at(*error.path)}{error}", *error.path) from None

    def _at(self, *path: str) -> str:
        """Return the file and, where it is known, the line of an option."""
        line = f", line {_line(self.lines, path)}" if self.lines else ""
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
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OptionError(f"config {where!r}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OptionError(f"config {where!r}: not UTF-8 text") from None
    if (record := _as_json(text)) is not None:
        if "gam_merge" in record:
            return _read_record(record, file, where)
        _check_kind(record, where)
        text = text.replace("\t", " ")  # as white space, which YAML allows less of
    value, lines = parse(text, where)
    if not isinstance(value, dict):
        kind = "nothing" if value is None else "a list" if isinstance(value, list) else "one value"
        raise OptionError(f"{where}: got {kind}, expected options such as method or weights")
    options = {name.replace("-", "_"): option for name, option in value.items()}
    lines = {(path[0].replace("-", "_"), *path[1:]): line for path, line in lines.items()}
    _check_names(options, lines, where)
    adapters = options.pop("adapters", None)
    return Recipe(where, _adapters(adapters, lines, file, where), _given(options), lines)


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
            f"{where}: got {kind}, expected a recipe, or the {REPORT_NAME} of a merge"
        )


def _line(lines: Mapping[_Path, int], path: _Path) -> int:
    """Return the line of an option, or of what it is in where an alias stands for that."""
    return next(lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines)


def _methods(options: Mapping[str, Any]) -> list[str]:
    """Return the methods that options name."""
    refined = options.get("modules")
    parts = list(refined.values()) if isinstance(refined, Mapping) else []
    named = [part["method"] for part in parts if isinstance(part, Mapping) and part.get("method")]
    return [options.get("method", "gam"), *named]


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_names(options: Mapping[str, Any], lines: Mapping[_Path, int], where: str) -> None:
    """Refuse options that no merge has, all of them at once."""
    parameters: set[str] = set()
    for method in strategies.names():
        with contextlib.suppress(PluginError):  # a broken method is refused when it is used
            parameters.update(param.name for param in strategies.get(method).params)
    known = ["adapters", *_OPTIONS, *sorted(parameters)]
    paths: list[tuple[_Path, list[str]]] = [((name,), known) for name in options]
    refined = options.get("modules")
    if isinstance(refined, Mapping):
        inner = [*MODULE_OPTIONS, *sorted(parameters)]
        paths += [
            (("modules", pattern, name), inner)
            for pattern, own in refined.items()
            if isinstance(own, Mapping)
            for name in own
        ]
    wrong = []
    lists: dict[str, None] = {}  # each is shown once
    for path, names in paths:
        if path[-1] not in names:
            near = difflib.get_close_matches(path[-1], names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            wrong.append((_line(lines, path), f"{path[-1]!r}", hint))
            if not near:
                lists[f"; known {'in modules ' if path[1:] else ''}are {', '.join(names)}"] = None
    if len(wrong) == 1:
        line, name, hint = wrong[0]
        raise OptionError(f"{where}, line {line}: unknown option {name}{hint}{''.join(lists)}")
    if wrong:
        listed = ", ".join(f"{name} (line {line}{hint})" for line, name, hint in wrong)
        raise OptionError(f"{where}: unknown options: {listed}{''.join(lists)}")


def _adapters(value: Any, lines: Mapping[_Path, int], file: Path, where: str) -> _Adapters | None:
    if value is None:
        return None
    items = list(value.items()) if isinstance(value, dict) else value
    places = [place for _, place in items] if isinstance(value, dict) else items
    if not isinstance(places, list) or not all(isinstance(p, str) and p for p in places):
        raise OptionError(
            f"{where}, line {lines['adapters',]}: adapters: got {value!r}, expected a list of "
            "paths or names on the Hub, or labels with one each"
        )
    for label in value if isinstance(value, dict) else ():
        check_label(label, f"{where}, line {_line(lines, ('adapters', label))}: ")
    found = [_place(place, file.parent) for place in places]
    return dict(zip(value, found, strict=True)) if isinstance(value, dict) else found


def _place(text: str, folder: Path) -> Path | HubName:
    """Return the path that is there, seen from a folder; else a name on the Hub, if it is one."""
    path = folder / Path(text).expanduser()
    name = parse_name(text)
    return path if name is None or (path.exists() and not text.startswith("hf://")) else name


def _from(folder: Path, source: str) -> Path:
    """Return a recorded place, its steps up taken; the folder has no links."""
    return Path(os.path.normpath(folder / source))


def _read_record(record: Mapping[str, Any], file: Path, where: str) -> Recipe:
    """Return the recipe of a recorded merge."""
    options = dict(_field(record, "options", "an object", where))
    for name in ("adapters", "expect"):  # what the inputs say
        if name in options:
            got = reprlib.repr(options[name])
            raise _not_a_record(f"options.{name}", got, "no such option", where)
    entries = _objects(record, "inputs", where)
    if not entries:
        raise _not_a_record("inputs", "[]", "at least one", where)
    adapters: dict[str, Path | HubName | None] = {}
    expect = {}
    # What --json printed says where the folder of the record is.
    folder = Path(_field({"output": "", **record}, "output", "text", where))
    folder = folder if "output" in record else file.resolve().parent
    for at, entry in entries:
        label = _field(entry, f"{at}.name", "text", where)
        check_label(label, f"{where}: {at}.name: ")
        source = _field(entry, f"{at}.source", "text or null", where)
        expect[label] = (
            _field(entry, f"{at}.sha256", "text or null", where),
            _field(entry, f"{at}.config_sha256", "text or null", where),
        )
        if _field({"commit": None, **entry}, f"{at}.commit", "text or null", where):
            adapters[label] = parse_name(source or "")
            if adapters[label] is None:
                got = reprlib.repr(source)
                raise _not_a_record(f"{at}.source", got, "a name on the Hub", where)
        else:
            adapters[label] = _from(folder, source) if source else None
    method = _field(options, "options.method", "text", where)
    packages = {method: _field({"package": "", **record}, "package", "text", where)}
    for at, module in _objects(record, "modules", where):
        own = _field(module, f"{at}.settings", "an object", where)
        if "method" in own:
            own = {"package": "", **own}
            method = _field(own, f"{at}.settings.method", "text", where)
            packages[method] = _field(own, f"{at}.settings.package", "text", where)
    version = str(record["gam_merge"])
    return Recipe(where, adapters, _given(options), {}, expect, version, packages)


def _objects(record: Mapping[str, Any], name: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a list in a record, each with what to call it."""
    items = {f"{name}[{i}]": item for i, item in enumerate(_field(record, name, "a list", where))}
    return [(at, _field(items, at, "an object", where)) for at in items]


def _field(owner: Mapping[str, Any], path: str, expected: str, where: str) -> Any:
    """Return the value at the end of a path in a record, refused where it is another kind."""
    name = path.rpartition(".")[2]
    if name in owner and isinstance(owner[name], _KINDS[expected]):
        return owner[name]
    got = reprlib.repr(owner[name]) if name in owner else "nothing"
    raise _not_a_record(path, got, expected, where)


def _not_a_record(path: str, got: str, expected: str, where: str) -> OptionError:
    return OptionError(
        f"{where}: not a complete record of a merge: {path}: got {got}, expected {expected}"
    )

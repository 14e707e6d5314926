"""The record of a merge, `gam_merge.json`: written beside the result, read to make it again."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gam.errors import AdapterError, OptionError
from gam.files import REPORT_NAME
from gam.hub.names import HubName, parse_name
from gam.version import NUMERICS, __version__

if TYPE_CHECKING:
    from gam.adapter import Adapter, Source

# What a value can be, by what messages call it.
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "an object": dict,
    "a list": list,
    "text": str,
    "text or null": (str, type(None)),
    "a whole number": int,
}


@dataclass(frozen=True)
class RecordedInput:
    """An input of a recorded merge, as far as making it again needs it.

    Attributes:
        name: Its label.
        source: Where it is, seen from the folder of the record, or its name on the Hub; None
            for an adapter that was in memory.
        sha256: Of the weights file.
        config_sha256: Of its config.
        commit: On the Hub; None for an adapter that is not from there.
    """

    name: str
    source: str | None
    sha256: str | None
    config_sha256: str | None
    commit: str | None = None


@dataclass(frozen=True)
class Record:
    """What `gam_merge.json` holds.

    The attributes are what making the merge again needs; they have the names of the file.

    Attributes:
        gam_merge: The version of gam-merge that made it.
        numerics: How that version computed: see `gam.version.NUMERICS`.
        method: Name of the method.
        options: Every option in force, by the name of its flag.
        inputs: At least one.
        packages: Method to the package that brought it; "" for gam's own. From ``package``,
            and the ``settings`` of single modules.
        output: The folder of the record, in what ``--json`` printed; None in the file.
        values: All that the file holds, in its order: the version, the numerics, and the
            fields of `gam.report.types.MergeReport` in plain types.
    """

    gam_merge: str
    numerics: int
    method: str
    options: Mapping[str, Any]
    inputs: Sequence[RecordedInput]
    packages: Mapping[str, str]
    output: str | None
    values: Mapping[str, Any]

    @classmethod
    def of(cls, adapter: Adapter, folder: Path) -> Record:
        """Return the record of a merge.

        Args:
            adapter: The result of a merge; its ``report`` is not None.
            folder: Where the record will be, without links; places of inputs are relative to
                it.
        """
        report = adapter.report
        assert report is not None
        values = {"gam_merge": __version__, "numerics": NUMERICS, **report.as_dict()}
        known = {(source.name, source.sha256): source for source in adapter.inputs}
        for entry in values["inputs"]:
            source = known.get((entry["source"], entry["sha256"]))
            if source is not None:
                entry["source"] = _seen_from(folder, source)
        return cls.read(values, str(folder / REPORT_NAME))

    @classmethod
    def parse(cls, text: str, where: str) -> Record:
        """Return the record that a text is; `read` says what is refused.

        Args:
            text: Of the file.
            where: What to call the file in messages.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise OptionError(f"{where}: not a record of a merge: not JSON.") from None
        if not is_record(values):
            raise OptionError(f"{where}: not a record of a merge: no object with 'gam_merge'.")
        return cls.read(values, where)

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Record:
        """Check what a record holds, as far as making the merge again needs it.

        Args:
            values: The object in the file.
            where: What to call the file in messages.

        Raises:
            OptionError: A value is missing or of another kind; the message has its name.
        """
        reader = _Reader(where)
        options = dict(reader.value(values, "options", "an object"))
        for name in ("adapters", "expect"):  # what the inputs say
            if name in options:
                got = reprlib.repr(options[name])
                raise reader.refusal(f"options.{name}", got, "no such option")
        # What `--size` is now was a parameter of gam alone.
        if options.pop("match_norm", False) is True:
            options["size"] = "mean"
        inputs = [reader.input(entry, at) for at, entry in reader.objects(values, "inputs")]
        if not inputs:
            raise reader.refusal("inputs", "[]", "at least one")
        # A record without the number is older than the number.
        numerics = reader.value({"numerics": 1, **values}, "numerics", "a whole number")
        has_output = "output" in values
        return cls(
            gam_merge=str(values["gam_merge"]),
            numerics=numerics,
            output=reader.value(values, "output", "text") if has_output else None,
            method=reader.value(options, "options.method", "text"),
            options=options,
            inputs=inputs,
            packages=reader.packages(values, options),
            values=values,
        )

    def text(self) -> str:
        """Return the text of the file, each module on a line: that is quick, and reads well."""
        fields = {
            key: json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n  ")
            for key, value in self.values.items()
            if key != "modules"
        }
        modules = [json.dumps(module, allow_nan=False) for module in self.values["modules"]]
        fields["modules"] = "[\n    " + ",\n    ".join(modules) + "\n  ]"
        return "{\n" + ",\n".join(f'  "{key}": {text}' for key, text in fields.items()) + "\n}\n"

    @property
    def expect(self) -> dict[str, tuple[str | None, str | None]]:
        """Label to the SHA-256 of weights and config that were merged."""
        return {entry.name: (entry.sha256, entry.config_sha256) for entry in self.inputs}

    def places(self, folder: Path) -> dict[str, Path | HubName | None]:
        """Return label -> where the input is; None for one that was in memory.

        Args:
            folder: That of the file, without links; ``output`` goes before it.
        """
        folder = folder if self.output is None else Path(self.output)
        found: dict[str, Path | HubName | None] = {}
        for entry in self.inputs:
            if entry.commit:
                found[entry.name] = parse_name(entry.source or "")
            else:
                found[entry.name] = _found_from(folder, entry.source) if entry.source else None
        return found

    def check_programs(self, packages: Mapping[str, str], where: str) -> None:
        """Refuse to make the merge again with programs that may give another result.

        Args:
            packages: Method to the package that brings it now; "" for gam's own.
            where: What to call the file in messages.

        Raises:
            AdapterError: The numerics, or the package of a method, are not those recorded.
        """
        if self.numerics != NUMERICS:
            raise AdapterError(
                f"{where}: made with numerics {self.numerics} (gam-merge {self.gam_merge}), but "
                f"this gam-merge has numerics {NUMERICS}, and the result may differ: see "
                "Numerics in the changelog. Pass --allow-changes to merge all the same."
            )
        for method, have in packages.items():
            made = self.packages.get(method, have)
            if made != have:
                raise AdapterError(
                    f"{where}: made by {made or 'gam-merge itself'}, but this is "
                    f"{have or 'gam-merge itself'}, and the result may differ. "
                    "Pass --allow-changes to merge all the same."
                )


def is_record(value: Any) -> bool:
    """Tell whether a value is the object of a record, complete or not."""
    return isinstance(value, dict) and "gam_merge" in value


def _seen_from(folder: Path, source: Source) -> str:
    """Return where an input is, so that it is found from the folder of the result.

    A relative path says nothing of the folders above both, and holds when all are moved.
    """
    if source.commit is not None:
        return source.name
    typed = Path(source.name).name == source.path.name
    place = source.path if typed else source.path.parent
    try:
        return Path(os.path.relpath(place, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return place.as_posix()


def _found_from(folder: Path, source: str) -> Path:
    """Return a recorded place, its steps up taken; the folder has no links."""
    return Path(os.path.normpath(folder / source))


class _Reader:
    """Takes values out of a record, and refuses what is another kind."""

    def __init__(self, where: str) -> None:
        self._where = where

    def value(self, owner: Mapping[str, Any], path: str, expected: str) -> Any:
        """Return the value at the end of a path, of one of `_KINDS`."""
        name = path.rpartition(".")[2]
        found = owner.get(name)
        # True and False are whole numbers to Python.
        if name in owner and isinstance(found, _KINDS[expected]) and not isinstance(found, bool):
            return found
        got = reprlib.repr(found) if name in owner else "nothing"
        raise self.refusal(path, got, expected)

    def objects(self, owner: Mapping[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the objects of a list, each with what to call it."""
        for index, item in enumerate(self.value(owner, name, "a list")):
            at = f"{name}[{index}]"
            yield at, self.value({at: item}, at, "an object")

    def input(self, entry: Mapping[str, Any], at: str) -> RecordedInput:
        found = RecordedInput(
            name=self.value(entry, f"{at}.name", "text"),
            source=self.value(entry, f"{at}.source", "text or null"),
            sha256=self.value(entry, f"{at}.sha256", "text or null"),
            config_sha256=self.value(entry, f"{at}.config_sha256", "text or null"),
            commit=self.value({"commit": None, **entry}, f"{at}.commit", "text or null"),
        )
        if found.commit and parse_name(found.source or "") is None:
            got = reprlib.repr(found.source)
            raise self.refusal(f"{at}.source", got, "a name on the Hub")
        return found

    def packages(self, values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, str]:
        found = {options["method"]: self.value({"package": "", **values}, "package", "text")}
        for at, module in self.objects(values, "modules"):
            own = self.value(module, f"{at}.settings", "an object")
            if "method" in own:
                own = {"package": "", **own}
                method = self.value(own, f"{at}.settings.method", "text")
                found[method] = self.value(own, f"{at}.settings.package", "text")
        return found

    def refusal(self, path: str, got: str, expected: str) -> OptionError:
        return OptionError(
            f"{self._where}: not a complete record of a merge: {path}: got {got}, "
            f"expected {expected}."
        )

"""Files of the loop: JSON lines that survive a kill, JSON written whole, and content hashes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from gam.errors import GamError, OptionError

Row = dict[str, Any]
Settings = TypeVar("Settings")

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")


class DataError(GamError, ValueError):
    """A file of the loop is missing, damaged, or does not hold what it should."""


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Return the objects of a JSON-lines file.

    Raises:
        DataError: The file cannot be read, or a line is not a JSON object.
    """
    return list(_parse(Path(path), read_text(path)))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return what a JSON file holds; a `DataError` says what is wrong with it."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not JSON: {error}") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file that is complete or absent."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file that is complete or absent."""
    write_text(path, "".join(map(_line, rows)))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file that is complete or absent, and make its folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


class Journal:
    """A JSON-lines file that is only ever appended to, one object for each key.

    A process killed while it writes leaves at most one line without its end; opening the file
    again cuts that line off. `rows` holds what has been written so far, by key.

    Args:
        path: The file; made where it is missing.
        key: Name of the field that tells the objects apart.

    Raises:
        DataError: A whole line is not a JSON object that has the key.
    """

    def __init__(self, path: Path, key: str = "id") -> None:
        """Open or make the file, and read what it holds."""
        self.key = key
        self.rows: dict[str, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for row in _parse(path, whole.decode("utf-8")):
            if key not in row:
                raise DataError(f"{str(path)!r} holds an object without {key!r}: {row!r}")
            self.rows.setdefault(row[key], row)
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def append(self, rows: Iterable[Row]) -> None:
        """Append the rows whose key is new; they are in the hands of the system on return."""
        new = {row[self.key]: row for row in rows if row[self.key] not in self.rows}
        self._file.write("".join(map(_line, new.values())).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.update(new)

    def __enter__(self) -> Journal:
        """Return the journal."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()


def digest(value: Any) -> str:
    """Return the SHA-256 of a value that JSON can hold, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def content_digest(source: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder.

    A name that is no path here, such as a Hub id, is its own digest.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".md")
        return digest({str(p.relative_to(path)): content_digest(p) for p in files})
    if not path.is_file():
        return str(source)
    found = path.stat()
    return _file_digest(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _file_digest(path: Path, _size: int, _modified_ns: int) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def setting(default: Any, text: str, *choices: str) -> Any:
    """Return a field of a settings class, with what the command line says about it.

    Args:
        default: Its default, or the type of an empty container.
        text: Its help.
        choices: The values it may have; any where none is given.
    """
    metadata = {"help": text, "choices": choices}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_choices(settings: Any) -> None:
    """Raise an `OptionError` for a value that is none of its choices."""
    for entry in fields(settings):
        value, choices = getattr(settings, entry.name), entry.metadata["choices"]
        if choices and value not in choices:
            raise OptionError(f"{entry.name}: got {value!r}, expected {', '.join(choices)}.")


def settings_from(kind: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Return settings from names and values; an `OptionError` names what is unknown."""
    known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise OptionError(f"{where}: unknown {name!r}; expected {', '.join(known)}.")
    return kind(**values)


def claim(folder: Path, record: Row) -> None:
    """Note what the work in a folder is made from, or check that it still is.

    Raises:
        OptionError: The folder holds work that was begun with something else.
    """
    path = folder / "inputs.json"
    record = json.loads(json.dumps(record))
    if not path.exists():
        write_json(path, record)
        return
    found = read_json(path)
    differ = sorted(key for key in record if found.get(key) != record[key])
    if differ:
        raise OptionError(
            f"{str(folder)!r} holds work that was begun with other inputs: {', '.join(differ)} "
            "changed. Choose another output folder."
        )


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that can change an answer or an adapter."""
    from gam import __version__

    versions = {"gam-merge": __version__}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def need(*modules: str, extra: str = "pda") -> None:
    """Raise an `OptionError` that says what to install where a module is missing."""
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Run: pip install 'gam-merge[{extra}]'"
        )


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file; a `DataError` says why it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"cannot read {os.fspath(path)!r}: {reason}") from error


def _parse(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines: an answer may hold characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{str(path)!r}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{str(path)!r}, line {number}: got {line!r}, expected an object")
        yield row

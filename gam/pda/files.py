"""JSON and JSON-lines files of the loop, each complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gam.errors import GamError
from gam.files import write_file

Row = dict[str, Any]


class DataError(GamError, ValueError):
    """A file of the loop is missing, damaged, or does not hold what it should."""


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Return the objects of a JSON-lines file.

    Raises:
        DataError: The file cannot be read, or a line is not a JSON object.
    """
    return list(parse_rows(Path(path), read_text(path)))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return what a JSON file holds; a `DataError` says what is wrong with it."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not JSON: {error}.") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file that is complete or absent."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file that is complete or absent."""
    write_text(path, "".join(map(row_line, rows)))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file that is complete or absent, and make its folder."""
    write_file(path, text)


def row_line(row: Mapping[str, Any]) -> str:
    """Return an object as a line, its end included."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file; a `DataError` says why it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"cannot read {os.fspath(path)!r}: {reason}.") from error


def parse_rows(path: Path, text: str) -> Iterator[Row]:
    """Yield the objects of JSON lines; a `DataError` names the file and the line."""
    # Not splitlines: an answer may hold characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{str(path)!r}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{str(path)!r}, line {number}: got {line!r}, expected an object.")
        yield row

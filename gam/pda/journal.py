"""A file of answers that survives a kill: JSON lines, only ever appended to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from gam.pda.files import DataError, Row, parse_rows, row_line


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
        for row in parse_rows(path, whole.decode("utf-8")):
            if key not in row:
                raise DataError(f"{str(path)!r} holds an object without {key!r}: {row!r}.")
            self.rows.setdefault(row[key], row)
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def append(self, rows: Iterable[Row]) -> None:
        """Append the rows whose key is new; they are in the hands of the system on return."""
        new = {row[self.key]: row for row in rows if row[self.key] not in self.rows}
        self._file.write("".join(map(row_line, new.values())).encode("utf-8"))
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

"""What work was made from: content hashes, and the claim of a folder by its inputs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from gam.errors import OptionError
from gam.pda.files import Row, read_json, write_json


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

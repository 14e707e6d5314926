"""What is wrong with a file is said."""

from pathlib import Path

import pytest
from helpers.adapters import assert_refused

from gam.pda.files import DataError, read_rows


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"id": 1}\n{"id"\n', ("line 2", "not JSON")),
        (b'{"id": 1}\n[2]\n', ("line 2", "'[2]'", "expected an object")),
        (b"\xff\n", ("not UTF-8",)),
    ],
    ids=["damaged", "list", "bytes"],
)
def test_damage_is_named(content: bytes, parts: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert_refused(lambda: read_rows(path), DataError, str(path), *parts)


def test_missing_file(tmp_path: Path) -> None:
    assert_refused(lambda: read_rows(tmp_path / "x"), DataError, "x'", "No such file")

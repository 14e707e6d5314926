"""Files that survive a kill, and hashes of what they hold."""

import json
from pathlib import Path

import pytest
from helpers.adapters import assert_refused
from helpers.pda import read_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from gam.errors import OptionError
from gam.pda.records import (
    DataError,
    Journal,
    claim,
    content_digest,
    digest,
    read_rows,
    write_rows,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=6), data=st.data())
def test_a_journal_cut_at_any_byte_is_completed(
    texts: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("journal") / "answers.jsonl"
    with Journal(path) as journal:
        journal.append(rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with Journal(path) as journal:
        assert all(row in rows for row in journal.rows.values())
        journal.append(rows)
        assert [*journal.rows.values()] == rows
    assert path.read_bytes() == whole
    assert read_lines(path) == rows == read_rows(path)


def test_a_journal_keeps_the_first_answer(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append([{"id": "1", "text": "first"}])
        journal.append([{"id": "1", "text": "again"}, {"id": "2", "text": "other"}])
    assert [row["text"] for row in read_lines(tmp_path / "a.jsonl")] == ["first", "other"]


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


def test_a_damaged_line_inside_a_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "1"}\n{"text": "x"}\n')
    assert_refused(lambda: Journal(path), DataError, str(path), "without 'id'")


def test_missing_file(tmp_path: Path) -> None:
    assert_refused(lambda: read_rows(tmp_path / "x"), DataError, "x'", "No such file")


def test_digests_see_contents_and_not_order(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": [2]}) == digest(json.loads('{"b": [2], "a": 1}'))
    assert digest({"a": 1}) != digest({"a": 1.5})
    for name, text in (("x", "1"), ("y", "1")):
        write_rows(tmp_path / name / "rows.jsonl", [{"text": text}])
        (tmp_path / name / "README.md").write_text(name)
    assert content_digest(tmp_path / "x") == content_digest(tmp_path / "y")
    write_rows(tmp_path / "y" / "rows.jsonl", [{"text": "2"}])
    assert content_digest(tmp_path / "x") != content_digest(tmp_path / "y")
    assert content_digest("user/name") == "user/name"


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    claim(tmp_path, {"seed": 1, "shape": (2, 3)})
    claim(tmp_path, {"seed": 1, "shape": (2, 3)})
    assert_refused(
        lambda: claim(tmp_path, {"seed": 2, "shape": (2, 3)}), OptionError, "seed", "other inputs"
    )

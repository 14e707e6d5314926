"""A journal survives a kill at any byte."""

from pathlib import Path

import pytest
from helpers.adapters import assert_refused
from helpers.pda import read_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from gam.pda.files import DataError, read_rows
from gam.pda.journal import Journal

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


def test_a_damaged_line_inside_a_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "1"}\n{"text": "x"}\n')
    assert_refused(lambda: Journal(path), DataError, str(path), "without 'id'")

"""Files and folders that are complete or absent."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers.adapters import assert_refused

from gam.errors import OutputError
from gam.files import new_folder, write_file, write_new, writing


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def broken(*blocks: bytes) -> Iterable[bytes]:
    yield from blocks
    raise OSError(28, "No space left on device")


def test_a_file_replaces_another(tmp_path: Path) -> None:
    file = tmp_path / "x" / "a.txt"
    write_file(file, "é\n")
    assert file.read_bytes() == "é\n".encode()
    write_file(file, b"\0")
    assert file.read_bytes() == b"\0"
    assert names(file.parent) == ["a.txt"]


def test_a_file_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "a", "old")
    monkeypatch.setattr("os.fsync", lambda _: next(iter(broken())))
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_long_names(tmp_path: Path) -> None:
    write_file(tmp_path / ("x" * 250), "a")
    with new_folder(tmp_path / ("y" * 250)):
        pass
    assert names(tmp_path) == ["x" * 250, "y" * 250]


def test_a_folder_is_there_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "x" / "out"
    with new_folder(out) as folder:
        write_new(folder / "a", [b"1", memoryview(b"2")])
        assert not out.exists()
        assert folder.parent == out.parent
    assert names(tmp_path / "x") == ["out"]
    assert (out / "a").read_bytes() == b"12"


def test_a_folder_that_fails_is_absent(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"), new_folder(tmp_path / "x" / "out") as folder:
        write_new(folder / "a", broken(b"1"))
    assert names(tmp_path) == []


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text, overwrite in (("old", False), ("new", True)):
        with new_folder(out, overwrite) as folder:
            write_file(folder / text, text)
    assert names(out) == ["new"]
    with pytest.raises(OSError, match="out"), new_folder(out) as folder:
        write_file(folder / "other", "")
    with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True):
        raise KeyboardInterrupt
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_new_file_must_be_new(tmp_path: Path) -> None:
    write_new(tmp_path / "a", [b"1"])
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", [b"2"])
    assert (tmp_path / "a").read_bytes() == b"1"


def test_faults_are_one_line_that_says_what_to_do() -> None:
    def call(error: Exception) -> None:
        with writing("plot 'x.png'"):
            raise error

    full = OSError(28, "No space left on device")
    for error, part in (
        (full, "No space left on device. Free some space or choose another place."),
        (PermissionError(13, "Permission denied"), "Permission denied. Choose another place."),
        (ValueError("a\nb"), "a b. Choose another place."),
        (OutputError("ours."), "ours."),
    ):
        assert_refused(lambda error=error: call(error), OutputError, part)

"""Files and folders that are complete or absent: written beside, flushed, and renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from gam.errors import GamError, OutputError, one_line

# What a merge leaves beside its weights; reports write them, and the Hub knows a merge by them.
REPORT_NAME = "gam_merge.json"
CARD_NAME = "README.md"

_LONG_NAME = 200  # bytes; a name that is longer leaves no room for what is added to it


def write_file(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file that is complete or absent; one that is there is replaced.

    Args:
        path: The file; the folders above it are made.
        data: All of it; text is written as UTF-8.

    Raises:
        OSError: It cannot be written; an old file is as it was. See `writing`.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    (temporary,) = _beside(final, "tmp")
    try:
        write_new(temporary, [data.encode() if isinstance(data, str) else data])
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(final.parent)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden folder to fill, which takes its name at the end, or vanishes by an error.

    Args:
        path: The folder to write; the folders above it are made.
        overwrite: Replace one that is there. It stays until the new one is complete.

    Yields:
        An empty folder beside ``path``; what is put in it must be flushed: see `write_new`.

    Raises:
        OSError: It cannot be written, or something has appeared at ``path``; nothing has
            changed there. See `writing`.
    """
    final = Path(path)
    temporary, aside = _beside(final, "tmp", "old")
    created = [folder for folder in final.parents if not folder.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _sync_folder(temporary)
        if overwrite and final.exists():
            _swap(temporary, final, aside)
        else:
            temporary.rename(final)  # fails if something has appeared there meanwhile
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    _sync_folder(final.parent)


def write_new(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write a file that is not there yet, and flush it to the disk.

    Args:
        path: The file.
        blocks: Its bytes, in order.

    Raises:
        OSError: It is there, or cannot be written; what was written of it stays.
    """
    with path.open("xb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn what goes wrong with the disk into one line that says what to do.

    Args:
        what: What the line begins with, such as "output 'merged'".

    Raises:
        OutputError: Something inside has raised an error of the system.
    """
    try:
        yield
    except GamError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # also loops of links, NUL in a path
        code = error.errno if isinstance(error, OSError) else None
        reason = error.strerror if isinstance(error, OSError) else None
        remedy = "Choose another place"
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "Free some space or choose another place"
        raise OutputError(
            f"{what}: cannot write: {reason or one_line(error)}. {remedy}."
        ) from error


def _beside(final: Path, *endings: str) -> list[Path]:
    """Return hidden names beside a file or folder that nothing else has."""
    stem = final.name if len(os.fsencode(final.name)) < _LONG_NAME else "merged"
    token = secrets.token_hex(4)
    return [final.with_name(f".{stem}.{token}.{ending}") for ending in endings]


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot flush a folder
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(temporary: Path, final: Path, aside: Path) -> None:
    """Swap a complete folder in; the old one is removed only after that."""
    final.rename(aside)
    try:
        temporary.rename(final)
    except BaseException:
        if not final.exists():
            aside.rename(final)
        raise
    shutil.rmtree(aside)

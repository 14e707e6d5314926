"""Writing an adapter folder: complete or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gam.adapter import Adapter
from gam.errors import GamError, OutputError
from gam.files import CARD_NAME, DTYPES, OWN_FILES, REPORT_NAME, WEIGHTS_NAME, one_line
from gam.formats.peft_config import CONFIG_NAME, output_config

_LONGEST_NAME = 255  # bytes, in every usual file system


def check_output(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Check that an adapter may be written to a folder; changes nothing on disk.

    A link is followed: what it points to is what would be written. An existing folder may
    be replaced only where everything in it is a file of an adapter, and an input never,
    since its tensors are mapped from there.

    Args:
        path: The folder to write.
        overwrite: Allow an adapter folder that is already there.
        inputs: Folders or files that are being read.

    Returns:
        The folder as an absolute path without links.

    Raises:
        OutputError: Writing there would fail or destroy something.
    """
    where = os.fspath(path)
    with _writing(where):
        final = Path(path).resolve()
        if not where or not final.name or Path.cwd().is_relative_to(final):
            raise OutputError(f"output {where!r}: expected the name of a folder to write.")
        if len(os.fsencode(final.name)) > _LONGEST_NAME:
            raise OutputError(f"output {where!r}: the name is too long. Choose a shorter one.")
        for source in inputs:
            if _holds(final, Path(source)):
                raise OutputError(
                    f"output {where!r}: this folder holds the input {os.fspath(source)!r}, which "
                    "is read while the result is written. Choose another output folder."
                )
        if final.exists():
            _check_replaceable(final, where, overwrite)
        else:
            _check_parent(final, where)
    return final


def write_adapter(
    adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write an adapter as a PEFT folder with scaling 1; the folder is complete or absent.

    ``adapter_model.safetensors``, ``adapter_config.json`` and, for the result of a merge,
    ``gam_merge.json`` and ``README.md``. The same adapter always gives the same bytes. They
    go to a hidden folder beside ``path``, are flushed to the disk, and are then renamed. An
    old folder survives until the new one is complete.

    Args:
        adapter: At least one module. Its config is rewritten to describe the tensors.
        path: The folder to write; its parents are created.
        overwrite: Replace an adapter folder that is already there.

    Returns:
        The folder as an absolute path without links.

    Raises:
        OutputError: As in `check_output`; or there are no modules, a scaled factor
            overflows its dtype, or the disk is full.
    """
    where = os.fspath(path)
    if not adapter.modules:
        raise OutputError(f"output {where!r}: adapter {adapter.name!r} has no modules to write.")
    final = check_output(path, overwrite=overwrite, inputs=_inputs(adapter))
    tensors = adapter.state_dict()
    documents = _documents(adapter, final)
    token = secrets.token_hex(4)
    stem = final.name if len(os.fsencode(final.name)) < 200 else "merged"
    temporary = final.with_name(f".{stem}.{token}.tmp")
    with _writing(where):
        created = [folder for folder in final.parents if not folder.exists()]
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            _write_tensors(tensors, temporary / WEIGHTS_NAME)
            for name, text in documents.items():
                _write_file(temporary / name, [text.encode()])
            _sync_folder(temporary)
            if overwrite and final.exists():
                _replace(temporary, final, final.with_name(f".{stem}.{token}.old"))
            else:
                temporary.rename(final)  # fails if something has appeared there meanwhile
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        _sync_folder(final.parent)
    return final


def _documents(adapter: Adapter, folder: Path) -> dict[str, str]:
    """Return name -> text of every file but the weights, for this folder."""
    ranks = {module: update.rank for module, update in adapter.modules.items()}
    config = output_config(ranks, [adapter.config])
    documents = {CONFIG_NAME: json.dumps(config, indent=2, sort_keys=True) + "\n"}
    if adapter.report is not None:
        from gam.report.card import model_card
        from gam.report.record import Record

        documents[REPORT_NAME] = Record.of(adapter, folder).text()
        documents[CARD_NAME] = model_card(adapter)
    return documents


def _write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, the bytes that `safetensors.torch.save_file` writes.

    Done here because that function copies all tensors first (safetensors 0.4), creates the
    file readable by its owner only (0.8), and reports a full disk without the error code.
    """
    # Wide dtypes first, which keeps every tensor aligned.
    keys = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key in keys:
        tensor = tensors[key]
        if tensor.dtype not in DTYPES:
            raise OutputError(f"tensor {key!r}: {tensor.dtype} is no dtype of an adapter. Cast it.")
        stop = start + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    blocks = (_raw_bytes(tensors[key]) for key in keys)
    _write_file(path, [struct.pack("<Q", len(text)), text], blocks)


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@contextlib.contextmanager
def _writing(where: str) -> Iterator[None]:
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
            f"output {where!r}: cannot write: {reason or one_line(error)}. {remedy}."
        ) from error


def _holds(final: Path, source: Path) -> bool:
    """Tell whether an input is this folder or lies in it, with or without following links."""
    places = (source.resolve(), source.parent.resolve() / source.name)
    return any(place.is_relative_to(final) for place in places)


def _check_replaceable(final: Path, where: str, overwrite: bool) -> None:
    if not final.is_dir():
        raise OutputError(f"output {where!r}: a file is there. Choose another output folder.")
    if not overwrite:
        raise OutputError(
            f"output {where!r}: the folder exists. Pass --overwrite, or choose another one."
        )
    names = {entry.name for entry in os.scandir(final) if not entry.is_dir(follow_symlinks=False)}
    other = sorted({entry.name for entry in os.scandir(final)} - (names & OWN_FILES))
    if other or (names and CONFIG_NAME not in names):
        found = f"it holds {other[0]!r}" if other else f"it has no {CONFIG_NAME}"
        raise OutputError(
            f"output {where!r}: the folder exists and is not just an adapter: {found}. "
            "Choose another output folder."
        )
    _check_parent(final, where)


def _check_parent(final: Path, where: str) -> None:
    parent = next(folder for folder in final.parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(
            f"output {where!r}: {os.fspath(parent)!r} is a file. Choose another output folder."
        )
    effective = os.access in os.supports_effective_ids
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise OutputError(
            f"output {where!r}: no permission to write in {os.fspath(parent)!r}. "
            "Choose another output folder."
        )


def _inputs(adapter: Adapter) -> list[str]:
    """Return the files that an adapter was made from."""
    sources = [*adapter.inputs, *([adapter.source] if adapter.source is not None else [])]
    return [str(source.path) for source in sources]


def _write_file(path: Path, head: Iterable[bytes], blocks: Iterable[memoryview] = ()) -> None:
    """Write a new file and flush it to the disk."""
    with path.open("xb") as file:
        for data in head:
            file.write(data)
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot flush a folder
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, final: Path, aside: Path) -> None:
    """Swap a complete folder in; the old one is removed only after that."""
    final.rename(aside)
    try:
        temporary.rename(final)
    except BaseException:
        if not final.exists():
            aside.rename(final)
        raise
    shutil.rmtree(aside)

"""Adapters to a folder, complete or absent, and from memory to the Hub."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

from gam.adapter import Adapter
from gam.errors import OutputError
from gam.files import CARD_NAME, REPORT_NAME, new_folder, write_new, writing
from gam.formats import PEFT
from gam.formats.peft import WEIGHTS_NAME
from gam.formats.peft_config import CONFIG_NAME
from gam.formats.safetensors import encode
from gam.hub.push import OWN_FILES, Pushed, Target, check_target, push_folder

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
    with writing(f"output {where!r}"):
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
    with writing(f"output {where!r}"), new_folder(final, overwrite) as folder:
        write_new(folder / WEIGHTS_NAME, encode(tensors, PEFT.metadata()))
        for name, text in documents.items():
            write_new(folder / name, [text.encode()])
    return final


def push_adapter(adapter: Adapter, target: Target) -> Pushed:
    """Push a merge that need not be on disk; what is pushed names inputs without their paths.

    Args:
        adapter: The result of a merge.
        target: Where to.

    Returns:
        Where it is now.

    Raises:
        OptionError: As in `check_target`.
        OutputError: The adapter is not the result of a merge, or the push failed.
    """
    if adapter.report is None:
        raise OutputError(
            f"push of adapter {adapter.name!r}: it is not the result of a merge. Merge it, or "
            "push the folder of an earlier merge with gam.push_to_hub."
        )
    check_target(target)
    inputs = [
        dataclasses.replace(entry, source=PurePath(entry.source).name)
        if entry.source and not entry.commit
        else entry
        for entry in adapter.report.inputs
    ]
    report = dataclasses.replace(adapter.report, inputs=inputs)
    nameless = dataclasses.replace(adapter, report=report, inputs=())
    with TemporaryDirectory() as folder:
        path = write_adapter(nameless, Path(folder) / "merged")
        way_on = "The merge is complete in memory; push it again, or save it."
        return push_folder(path, target, way_on)


def _documents(adapter: Adapter, folder: Path) -> dict[str, str]:
    """Return name -> text of every file but the weights, for this folder."""
    ranks = {module: update.rank for module, update in adapter.modules.items()}
    config = PEFT.config(ranks, [adapter.config])
    documents = {CONFIG_NAME: json.dumps(config, indent=2, sort_keys=True) + "\n"}
    if adapter.report is not None:
        from gam.report.card import model_card
        from gam.report.record import Record

        documents[REPORT_NAME] = Record.of(adapter, folder).text()
        documents[CARD_NAME] = model_card(adapter)
    return documents


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

"""An adapter by what the user calls it: a path, or a name on the Hub.

Which of the two a text is, is settled once (`settle`). All else takes what is settled.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TypeAlias

from gam.adapter import Adapter, Facts, Source
from gam.errors import AdapterError, OptionError, one_line
from gam.formats import PEFT, detect, pickles, safetensors
from gam.formats.checks import check_modules
from gam.formats.peft import PICKLE_NAME, WEIGHTS_NAME
from gam.formats.peft_config import CONFIG_NAME, read_config
from gam.hub.download import HubAdapter, download, locate
from gam.hub.names import HubName, Place, hub_name

_SUFFIXES = (safetensors.SUFFIX, *pickles.SUFFIXES)


@dataclass(frozen=True)
class LocalPath(PathLike[str]):
    """A path in the words of the user, who would not know ``./a/`` as ``a``.

    Attributes:
        given: The words.
    """

    given: str

    def __fspath__(self) -> str:
        """Return the path."""
        return self.given


Settled: TypeAlias = PathLike[str] | HubName | Adapter
"""An adapter of which is known whether it is on this machine, on the Hub or in memory."""

Found: TypeAlias = PathLike[str] | HubAdapter | Adapter
"""An adapter that is ready to be opened."""


def load_adapter(
    adapter: str | PathLike[str],
    *,
    alpha: float | None = None,
    allow_pickle: bool = False,
    name: str | None = None,
) -> Adapter:
    """Return an adapter from a PEFT folder, a ``.safetensors`` file or the Hub, fully checked.

    Args:
        adapter: Folder or file, or ``user/name[@revision][:folder]`` on the Hub, where a local
            path wins; ``hf://`` before the name forces the Hub.
        alpha: LoRA alpha where neither config nor file states one.
        allow_pickle: Also read ``adapter_model.bin``, with ``weights_only=True``.
        name: Label of the adapter; default its folder's or repository's name, or its stem.

    Returns:
        The adapter; ``source`` says where it is from.

    Raises:
        AdapterError: The adapter cannot be found, downloaded or read, or holds something
            that cannot be merged.
        OptionError: ``alpha`` is not a finite number.

    Example:
        >>> load_adapter("user/code-lora@v2")  # doctest: +SKIP
    """
    place = settle(adapter)
    found = find(place, allow_pickle)
    return open_adapter(found, name or label_of(place), alpha=alpha, allow_pickle=allow_pickle)


def settle(adapter: Place | Adapter, folder: Path | None = None) -> Settled:
    """Return what an adapter is given as, with text settled to be a path or a name on the Hub.

    A local path wins over a name on the Hub; ``hf://`` before it forces the Hub. A path
    object is always a path. Asks the disk once, and the network never.

    Args:
        adapter: What a user may give as an adapter; what is settled stays as it is.
        folder: Where a relative path in a text starts, and where ``~`` is a home; None for
            the working folder, and for paths as a shell leaves them.

    Raises:
        AdapterError: A text that begins with ``hf://`` is no name on the Hub.
    """
    if not isinstance(adapter, str):
        if not isinstance(adapter, (PathLike, HubName, Adapter)):
            raise OptionError(
                f"adapters: got {adapter!r}, expected a path, a name on the Hub or an Adapter."
            )
        return adapter
    path = LocalPath(adapter) if folder is None else folder / Path(adapter).expanduser()
    return hub_name(adapter, path) or path


def settle_all(
    adapters: Sequence[Place | Adapter] | Mapping[str, Place | Adapter],
) -> list[Settled] | dict[str, Settled]:
    """Settle each of several adapters; a mapping keeps its labels.

    Raises:
        OptionError: It is one adapter and not several.
        AdapterError: As for `settle`.
    """
    if isinstance(adapters, (str, PathLike, HubName, Adapter)):
        raise OptionError(f"adapters: got one, {adapters!r}, expected a list of adapters.")
    if isinstance(adapters, Mapping):
        return {label: settle(adapter) for label, adapter in adapters.items()}
    if isinstance(adapters, bytes) or not isinstance(adapters, Iterable):
        raise OptionError(f"adapters: got {adapters!r}, expected a list of adapters.")
    return [settle(adapter) for adapter in adapters]


def label_of(place: Settled) -> str:
    """Return the label of an adapter that is given none."""
    if isinstance(place, Adapter):
        return place.name
    return place.label if isinstance(place, HubName) else default_name(place)


def local_paths(places: Iterable[Settled] | Mapping[str, Settled]) -> list[PathLike[str]]:
    """Return the paths that adapters are read from, for `gam.save.check_output`."""
    paths: list[PathLike[str]] = []
    for place in places.values() if isinstance(places, Mapping) else places:
        if isinstance(place, Adapter):
            paths += [] if place.source is None else [place.source.path]
        elif not isinstance(place, HubName):
            paths.append(place)
    return paths


def find(place: Settled, allow_pickle: bool = False) -> Found:
    """Return an adapter ready to be opened; of one on the Hub the config is here then.

    Args:
        place: From `settle`.
        allow_pickle: Accept an adapter on the Hub that has only ``adapter_model.bin``.

    Raises:
        AdapterError: There is none on the Hub, it may not be read, or the Hub cannot be
            reached.
    """
    return locate(place, allow_pickle) if isinstance(place, HubName) else place


def known_facts(found: Found) -> Facts | None:
    """Return what is known of an adapter before it is opened; None for one on the disk.

    Raises:
        AdapterError: The config of an adapter on the Hub cannot be merged, or is damaged.
    """
    if isinstance(found, Adapter):
        return found.facts
    if isinstance(found, HubAdapter):
        return PEFT.facts(read_config(found.config.read_bytes(), str(found.name)))
    return None


def open_adapter(
    found: Found, label: str, *, alpha: float | None = None, allow_pickle: bool = False
) -> Adapter:
    """Return an adapter with its tensors, fully checked; downloads them where needed.

    Args:
        found: From `find`.
        label: What it is to be called.
        alpha: As for `read_adapter`.
        allow_pickle: As for `read_adapter`.

    Raises:
        AdapterError: It cannot be read or downloaded, or cannot be merged.
        OptionError: ``alpha`` is not a finite number.
    """
    if isinstance(found, Adapter):
        modules = check_modules(found.modules, label)
        return replace(found, name=label, modules=modules)
    if not isinstance(found, HubAdapter):
        return read_adapter(found, alpha=alpha, allow_pickle=allow_pickle, name=label)
    adapter = read_adapter(
        download(found), alpha=alpha, allow_pickle=allow_pickle, name=label, called=str(found.name)
    )
    assert adapter.source is not None
    source = replace(adapter.source, name=str(found.pinned), commit=found.commit)
    return replace(adapter, source=source)


def read_adapter(
    path: str | PathLike[str],
    *,
    alpha: float | None = None,
    allow_pickle: bool = False,
    name: str | None = None,
    called: str | None = None,
) -> Adapter:
    """Return the adapter in a PEFT folder or a ``.safetensors`` file, fully checked.

    The scaling of a module comes from ``adapter_config.json`` in the folder or beside the
    file; without one from ``<module>.alpha`` tensors, from the file's metadata, or else from
    ``alpha``. The factors of a ``.safetensors`` file stay memory-mapped: it must not change
    while the adapter is in use.

    Args:
        path: Folder or file.
        alpha: LoRA alpha where neither config nor file states one; it never overrides what
            they state. ``source.alpha`` tells whether it was used.
        allow_pickle: Also read ``adapter_model.bin``, with ``weights_only=True``.
        name: Label of the adapter; default the folder's name, or the file's stem.
        called: What to call it in messages; default the path.

    Returns:
        The adapter: modules sorted by name, ``lora_a`` [r, in] and ``lora_b`` [out, r] in
        the file's dtypes.

    Raises:
        AdapterError: The adapter cannot be read, holds something that cannot be merged, or
            states no scaling.
        OptionError: ``alpha`` is not a finite number.
    """
    where = called or os.fspath(path)
    if alpha is not None and not math.isfinite(alpha):
        raise OptionError(f"alpha: got {alpha!r}, expected a finite number.")
    with _reading(where):
        weights = _locate(Path(path), where, allow_pickle)
        beside = weights.with_name(CONFIG_NAME)
        stated = beside.read_bytes() if os.path.lexists(beside) else None
        config = None if stated is None else read_config(stated, where)
        if weights.suffix in pickles.SUFFIXES:
            metadata: dict[str, str] = {}
            tensors, digest = pickles.read(weights, where)
        else:
            tensors, metadata, digest = safetensors.read(weights, where)
        form = detect(tensors, config, metadata, where)
        contents = form.read(tensors, config, metadata, alpha=alpha, where=where)
        source = Source(
            name=where,
            path=weights.absolute(),
            sha256=digest,
            config_sha256=None if stated is None else hashlib.sha256(stated).hexdigest(),
            alpha=alpha if contents.used_alpha else None,
        )
    label = default_name(path) if name is None else name
    return Adapter(contents.modules, contents.config, label, source)


def default_name(path: str | PathLike[str]) -> str:
    """Return the label of an adapter that is given none: its folder's name or file's stem.

    A file called ``adapter_model`` takes the name of the folder that it is in. Links keep
    their own name. Nothing need be there.

    Args:
        path: Folder or file, as for `read_adapter`.

    Returns:
        A name without slashes.

    Raises:
        AdapterError: A folder on the way may not be read.
    """
    place = Path(path)
    with _reading(os.fspath(path)):
        if place.suffix in _SUFFIXES and not place.is_dir():
            if place.stem != Path(WEIGHTS_NAME).stem:
                return place.stem
            place = place.parent
        return place.name if place.name not in ("", "..") else place.resolve().name


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        file = f" {os.fspath(error.filename)!r}" if error.filename else ""
        raise AdapterError(
            f"adapter {where!r}: cannot read{file}: {reason}. Check the path and its permissions."
        ) from error


def _locate(path: Path, where: str, allow_pickle: bool) -> Path:
    """Return the weights file of a folder, or the file itself."""
    if path.is_dir():
        weights = path / WEIGHTS_NAME
        if not weights.exists():
            weights = path / PICKLE_NAME
        if not weights.exists():
            raise AdapterError(f"adapter {where!r}: {_describe_missing(path)}")
    elif path.exists():
        weights = path
    else:
        raise AdapterError(
            f"adapter {where!r}: no such folder or file. Give the path of a PEFT adapter folder "
            "or a .safetensors file, or the name of an adapter on the Hub: "
            "user/name[@revision][:folder]."
        )
    if not weights.is_file():
        raise AdapterError(
            f"adapter {where!r}: {weights.name!r} is not a regular file. "
            f"Give a folder with {WEIGHTS_NAME}, or a .safetensors file."
        )
    if weights.suffix in pickles.SUFFIXES:
        if not allow_pickle:
            raise AdapterError(
                f"adapter {where!r}: {weights.name!r} is a pickle. Save it as safetensors, "
                "or pass --allow-pickle, which reads tensors and runs no code."
            )
    elif weights.suffix not in _SUFFIXES:
        raise AdapterError(
            f"adapter {where!r}: got a file that is not .safetensors. "
            "Give a PEFT adapter folder or a .safetensors file."
        )
    return weights


def _describe_missing(folder: Path) -> str:
    nested = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG_NAME}"))
    if nested:
        return f"no {WEIGHTS_NAME} in the folder. Did you mean its subfolder {nested[0]!r}?"
    return f"no {WEIGHTS_NAME} in the folder. Give the folder that PEFT's save_pretrained wrote."

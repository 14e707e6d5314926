"""An adapter by what the user calls it: a path, or a name on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike

from gam.adapter import Adapter
from gam.formats.read import default_name, read_adapter
from gam.hub.download import HubAdapter, download, locate
from gam.hub.names import HubName, Place, hub_name


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
    found = find_adapter(adapter, allow_pickle)
    return open_adapter(found, name or label_of(adapter), alpha=alpha, allow_pickle=allow_pickle)


def find_adapter(adapter: Place, allow_pickle: bool = False) -> str | PathLike[str] | HubAdapter:
    """Return a path as it is, or an adapter of the Hub of which only the config is here yet."""
    place = _settled(adapter)
    return locate(place, allow_pickle) if isinstance(place, HubName) else place


def open_adapter(
    found: str | PathLike[str] | HubAdapter, name: str, *, alpha: float | None, allow_pickle: bool
) -> Adapter:
    """Return the adapter that `find_adapter` has found; downloads its weights where needed."""
    if not isinstance(found, HubAdapter):
        return read_adapter(found, alpha=alpha, allow_pickle=allow_pickle, name=name)
    weights = download(found)
    adapter = read_adapter(
        weights, alpha=alpha, allow_pickle=allow_pickle, name=name, called=str(found.name)
    )
    assert adapter.source is not None
    source = replace(adapter.source, name=str(found.pinned), commit=found.commit)
    return replace(adapter, source=source)


def label_of(adapter: Place) -> str:
    """Return the label of an adapter that is given none."""
    place = _settled(adapter)
    return place.label if isinstance(place, HubName) else default_name(place)


def input_files(
    adapters: Iterable[Place | Adapter] | Mapping[str, Place | Adapter],
) -> list[str | PathLike[str]]:
    """Return the local paths that adapters are read from, for `gam.save.check_output`."""
    paths: list[str | PathLike[str]] = []
    for adapter in adapters.values() if isinstance(adapters, Mapping) else adapters:
        if isinstance(adapter, Adapter):
            paths += [] if adapter.source is None else [adapter.source.path]
        elif not isinstance(place := _settled(adapter), HubName):
            paths.append(place)
    return paths


def _settled(adapter: Place) -> Place:
    """Return a name on the Hub as one, and a path as it is."""
    return hub_name(adapter) or adapter

"""Adapters from the Hub, into the client's cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from gam.errors import AdapterError
from gam.formats.peft import PICKLE_NAME, WEIGHTS_NAME
from gam.formats.peft_config import CONFIG_NAME
from gam.hub.faults import ask, faults, is_unreachable
from gam.hub.names import HubName

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubAdapter:
    """An adapter on the Hub whose config is here and whose weights can be downloaded.

    Attributes:
        name: As the user gave it.
        commit: What its revision stands for, 40 hex digits.
        config: ``adapter_config.json`` in the client's cache.
        weights: Path of the weights file in the repository.
    """

    name: HubName
    commit: str
    config: Path
    weights: str

    @property
    def pinned(self) -> HubName:
        """The name with the commit as its revision: it always means the same files."""
        return replace(self.name, revision=self.commit)


def locate(name: HubName, allow_pickle: bool = False) -> HubAdapter:
    """Find an adapter on the Hub and download its config, not its weights.

    Without a network, or with ``HF_HUB_OFFLINE``, what is in the client's cache serves. A
    name with a commit that is in the cache asks nobody.

    Args:
        name: From `hub_name`.
        allow_pickle: Accept ``adapter_model.bin`` where there is no safetensors file.

    Returns:
        The adapter, its commit resolved.

    Raises:
        AdapterError: There is none, it may not be read, or the Hub cannot be reached.
    """
    return ask(f"adapter {str(name)!r}", partial(_locate, name, allow_pickle))


def download(adapter: HubAdapter) -> Path:
    """Return the weights file of an adapter, beside its config in the client's cache.

    Args:
        adapter: From `locate`.

    Returns:
        A path in the client's cache; the file is complete.

    Raises:
        AdapterError: The download fails; what has arrived is kept, and resumed next time.
    """

    def work() -> Path:
        from huggingface_hub import hf_hub_download

        name = adapter.name
        return Path(hf_hub_download(name.repo, adapter.weights, revision=adapter.commit))

    return ask(f"adapter {str(adapter.name)!r}", work)


def _locate(name: HubName, allow_pickle: bool) -> HubAdapter:
    from huggingface_hub import HfApi, constants, hf_hub_download

    if name.revision and _COMMIT.fullmatch(name.revision):
        cached = _cached(name, allow_pickle)
        if cached is not None:
            return cached
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(name.repo, revision=name.revision, timeout=timeout)
    except faults() as error:
        cached = _cached(name, allow_pickle) if is_unreachable(error) else None
        if cached is None:
            raise
        return cached
    files = {sibling.rfilename for sibling in info.siblings or ()}
    weights = _choose_weights(name, files, allow_pickle)
    # By the user's revision, so that the cache remembers what it stood for.
    config = hf_hub_download(name.repo, name.file(CONFIG_NAME), revision=name.revision)
    return _from_snapshot(name, Path(config), weights)


def _cached(name: HubName, allow_pickle: bool) -> HubAdapter | None:
    """Return an adapter of which every file is in the client's cache."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name.repo, name.file(CONFIG_NAME), revision=name.revision)
    if not isinstance(config, str):
        return None
    files = {name.file(entry.name) for entry in Path(config).parent.iterdir()}
    if not files & {name.file(WEIGHTS_NAME), name.file(PICKLE_NAME)}:
        return None
    return _from_snapshot(name, Path(config), _choose_weights(name, files, allow_pickle))


def _from_snapshot(name: HubName, config: Path, weights: str) -> HubAdapter:
    # The client keeps a file in .../snapshots/<commit>/<path in the repository>.
    commit = config.parents[len(PurePosixPath(name.folder).parts)].name
    return HubAdapter(name, commit, config, weights)


def _choose_weights(name: HubName, files: Iterable[str], allow_pickle: bool) -> str:
    files = set(files)
    where = f"folder {name.folder!r} of the repository" if name.folder else "the repository"
    if name.file(CONFIG_NAME) not in files:
        others = sorted(f.rpartition("/")[0] for f in files if PurePosixPath(f).name == CONFIG_NAME)
        raise AdapterError(
            f"adapter {str(name)!r}: no {CONFIG_NAME} in {where}. "
            + (
                f"Did you mean {str(replace(name, folder=others[0]))!r}?"
                if others
                else "Give a repository that PEFT's push_to_hub wrote."
            )
        )
    if name.file(WEIGHTS_NAME) in files:
        return name.file(WEIGHTS_NAME)
    if name.file(PICKLE_NAME) not in files:
        raise AdapterError(
            f"adapter {str(name)!r}: no {WEIGHTS_NAME} in {where}. "
            "Give a repository that PEFT's push_to_hub wrote."
        )
    if not allow_pickle:
        raise AdapterError(
            f"adapter {str(name)!r}: {where} has its weights only as a pickle, {PICKLE_NAME}. "
            "Pass --allow-pickle, which reads tensors and runs no code."
        )
    return name.file(PICKLE_NAME)

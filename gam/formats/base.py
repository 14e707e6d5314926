"""What a format does: names, configs and metadata to low-rank updates, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gam.adapter import Facts, LowRank


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        modules: Module path in the base model to update, sorted by path.
        config: What the adapter keeps of its format's config; only the format reads it.
        used_alpha: Whether the alpha that the caller gave decided any scaling.
    """

    modules: Mapping[str, LowRank]
    config: Mapping[str, Any]
    used_alpha: bool


class Format(Protocol):
    """One way to name the tensors of an adapter and to say what they mean.

    A format knows no paths, no files and no devices.
    """

    def recognizes(
        self,
        names: Collection[str],
        config: Mapping[str, Any] | None,
        metadata: Mapping[str, str],
    ) -> bool:
        """Tell whether a file is of this format.

        Args:
            names: Of its tensors.
            config: The ``adapter_config.json`` beside it; None where there is none.
            metadata: The text in its header.
        """

    def read(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None,
        metadata: Mapping[str, str],
        *,
        alpha: float | None,
        where: str,
    ) -> Contents:
        """Return what a file holds, checked by `gam.formats.checks`; nothing is left out.

        Args:
            tensors: All of the file, by name.
            config: As for `recognizes`.
            metadata: As for `recognizes`.
            alpha: The caller's, where the file states none; it never overrides the file.
            where: What the user called the adapter.

        Raises:
            AdapterError: Something cannot be merged, or a scaling is not known.
        """

    def facts(self, config: Mapping[str, Any]) -> Facts:
        """Return what a config says that decides what an adapter may be merged with."""

    def tensors(self, modules: Mapping[str, LowRank], where: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a file with scaling 1 everywhere, sorted by module.

        Raises:
            OutputError: A scaled factor does not fit its dtype.
        """

    def config(
        self, ranks: Mapping[str, int], inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the config beside such a file; what the configs of its inputs agree on stays.

        Args:
            ranks: Module path to rank; at least one.
            inputs: Configs of the adapters that it was made from; they may be empty.
        """

    def metadata(self) -> dict[str, str]:
        """Return the text for the header of such a file."""

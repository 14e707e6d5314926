"""Formats of adapters: from the tensors of a file to updates, and back.

Another format is one file beside `gam.formats.peft`, and its line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gam.errors import AdapterError
from gam.formats import foreign
from gam.formats.base import Format
from gam.formats.peft import PEFT

__all__ = ["FORMATS", "PEFT", "Format", "detect"]

FORMATS: tuple[Format, ...] = (PEFT,)
"""All that are known; the first that recognizes a file reads it."""


def detect(
    names: Collection[str],
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
    where: str,
) -> Format:
    """Return the format of a file.

    Args:
        names: Of its tensors.
        config: The ``adapter_config.json`` beside it; None where there is none.
        metadata: The text in its header.
        where: What the user called the adapter.

    Raises:
        AdapterError: It is of none; the message says what it is.
    """
    for known in FORMATS:
        if known.recognizes(names, config, metadata):
            return known
    raise AdapterError(f"adapter {where!r}: {foreign.describe(list(names))}")

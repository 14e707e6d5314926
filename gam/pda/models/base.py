"""What every model is asked to do, and how.

A model gives the same answer to the same prompt and seed whatever else is asked beside it:
sampling draws from a stream of its own for each prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from gam.errors import OptionError
from gam.pda.files import Row
from gam.pda.prompts import Prompt
from gam.pda.settings import check_settings, setting

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Number formats of local weights; auto is the file's own."""


@dataclass(frozen=True)
class Generation:
    """How answers are made."""

    max_new_tokens: int = setting(
        512, "Longest answer, in tokens; it is cut there, and marked.", least=1
    )
    temperature: float = setting(0.0, "0 always takes the likeliest token.", least=0)
    top_p: float = setting(
        1.0, "Draw from the likeliest tokens that hold this probability.", least=0, most=1
    )
    seed: int = setting(0, "Seed of all draws.")
    chat_template: Mapping[str, Any] = setting(dict, "More arguments of the chat template.")
    batch_size: int = setting(16, "Prompts at a time, or requests at a time to a server.", least=1)

    def __post_init__(self) -> None:
        """Check the values."""
        check_settings(self)
        if self.top_p == 0:
            raise OptionError("top_p: got 0, expected a number above 0, at most 1.")

    def record(self) -> dict[str, Any]:
        """Return what can change an answer."""
        values = asdict(self)
        del values["batch_size"]
        return values

    def seed_of(self, name: str) -> int:
        """Return the seed of the draws for one prompt, or one model, by its name."""
        text = f"{self.seed} {name}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


class Model(Protocol):
    """Something that answers prompts."""

    def answer(
        self, prompts: Sequence[Prompt], settings: Generation, done: Container[str] = ()
    ) -> Iterator[list[Row]]:
        """Yield answers, a batch at a time: ``id``, ``text``, ``finish`` and ``tokens``.

        ``finish`` is "stop", "length" (cut at the longest length), or "error"; then ``error``
        says why, and there is no text. Prompts whose id is in ``done`` need no answer, but may
        get one.
        """

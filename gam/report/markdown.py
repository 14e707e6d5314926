"""Text of the model card: Markdown and YAML that no name or number breaks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# What YAML takes for text without quotes, and what it takes for something else.
_BARE = re.compile(r"\w[\w.-]*/[\w.-]+|[a-zA-Z][\w.-]*", re.ASCII)
_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})


def yaml_text(text: str) -> str:
    """Return text as the Hub's client writes it in YAML, so that it finds nothing to change."""
    bare = _BARE.fullmatch(text) and text.lower() not in _WORDS
    return text if bare else json.dumps(text)


def printable(text: Any) -> str:
    """Return text on one line that any encoding of Unicode can hold."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def code(text: Any) -> str:
    """Return a code span that also holds in a table."""
    plain = printable(text).replace("|", "\\|")
    return f"`` {plain} ``" if "`" in plain else f"`{plain}`"


def block(language: str, *lines: str) -> str:
    """Return a block of code."""
    return "\n".join([f"```{language}", *lines, "```"])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the second row says how the columns are aligned."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

"""Tables, numbers and names as the commands print them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import click

_WIDTH = 96


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines in columns: the first to the left, numbers to the right; the head in bold."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for number_of_row, (first, *rest) in enumerate((head, *rows)):
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        line = "  ".join([first.ljust(widths[0]), *cells])
        yield line if number_of_row else click.style(line, bold=True)


def note(text: str) -> str:
    """Return a remark below a table, in lines that fit a terminal."""
    return textwrap.fill(
        text, width=_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def shown(name: str) -> str:
    """Return a name as it is, or escaped where it would disturb the terminal."""
    return name if name.isprintable() else repr(name)


def counted(items: Sequence[Any], noun: str) -> str:
    """Return how many there are, such as "3 modules"."""
    return f"{len(items)} {noun}" + ("" if len(items) == 1 else "s")


def span(ranks: Sequence[int]) -> str:
    """Return the smallest and the largest, such as "4-16"; one number where they agree."""
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


def byte_size(count: float) -> str:
    """Return a number of bytes with a unit, to three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"

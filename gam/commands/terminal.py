"""What the commands share: help under headings, errors as exit codes, tables and numbers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from gam.errors import GamError, OptionError

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc, at the largest values it takes.
_KEEP_MEMORY = {-1: 2**31 - 1, -3: 2**25}
_OUT_OF_MEMORY = "not enough memory; free some, or do less at a time"


class Option(click.Option):
    """An option that `--help` lists under a heading."""

    def __init__(self, *args: Any, heading: str, **kwargs: Any) -> None:
        """Take what `click.Option` takes, and the heading."""
        super().__init__(*args, **kwargs)
        self.heading = heading


class Command(click.Command):
    """A command with headings in its help, and `GamError` as one line and an exit code."""

    def start(self, name: str | None = None) -> None:
        """Run the command as the whole of a process; what the console scripts call.

        Without a `name`, the command goes by the one that it was called by.

        What importing torch makes stays until the end. To look through it for garbage, again
        and again and once more at exit, would cost a third of a second. Nor is memory given
        back between one module and the next, where the C library lets one ask for that. And
        NumPy's BLAS gets no threads beside ours, which would spin at the start for nothing.
        """
        gc.disable()
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        with contextlib.suppress(AttributeError, OSError, TypeError):
            allocator = ctypes.CDLL(None)
            for option in _KEEP_MEMORY.items():
                allocator.mallopt(*option)
        try:
            self(prog_name=name)
        finally:
            gc.freeze()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, grouped by heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                groups.setdefault(getattr(param, "heading", "What to show"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=34)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command: exit 2 on wrong usage, 1 on anything else that is refused."""
        try:
            return super().invoke(ctx)
        except OptionError as error:
            raise click.UsageError(str(error), ctx) from error
        except GamError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:  # only printing is left: files have errors of their own
            raise click.ClickException(f"cannot print the result: {error.strerror}") from error
        except MemoryError as error:
            raise click.ClickException(_OUT_OF_MEMORY) from error
        except RuntimeError as error:
            # How torch says it on a CPU, and on a GPU.
            if not any(text in str(error) for text in ("allocate memory", "CUDA out of memory")):
                raise
            raise click.ClickException(_OUT_OF_MEMORY) from error


def settle_client(quiet: bool) -> None:
    """Set up huggingface_hub, before it is imported, for a command.

    What it would log is in our errors, and its progress bars are for terminals. What the
    user has set stays.

    Args:
        quiet: No progress bars on a terminal either.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines in columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for first, *rest in (head, *rows):
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])


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


def number(value: float) -> str:
    """Return a number with three decimals; NaN as "undefined"."""
    return "undefined" if value != value else f"{value:.3f}"


def percent(value: float) -> str:
    """Return a share in percent, to four digits; NaN as "undefined"."""
    if 0 < value < 1e-5:
        return "below 0.001 %"
    return "undefined" if value != value else f"{100 * value:.4g} %"


def byte_size(count: float) -> str:
    """Return a number of bytes with a unit, to three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"

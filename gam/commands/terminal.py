"""What the commands share: help under headings, errors as exit codes, bars."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from gam.commands.process import one_merge
from gam.errors import GamError, OptionError

SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 100,
}
"""What every command gives click."""

_OUT_OF_MEMORY = "not enough memory. Free some, or do less at a time."


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
        """
        with one_merge():
            self(prog_name=name)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, grouped by heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                groups.setdefault(getattr(param, "heading", "What to show"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(click.style(heading, bold=True)):
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
            raise click.ClickException(f"cannot print the result: {error.strerror}.") from error
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


@contextlib.contextmanager
def bar(label: str, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal's stderr; give what is called with the number done and in all.

    It begins with the first step and its line ends with the last one, so that what is printed
    before and after has lines of its own.
    """
    hidden = hidden or sys.stderr is None or not sys.stderr.isatty()
    shown = click.progressbar(length=1, label=label, file=sys.stderr, hidden=hidden)
    is_open = False

    def progress(done: int, count: int) -> None:
        nonlocal is_open
        is_open, shown.length = True, count
        shown.update(done - shown.pos)
        if done >= count:
            end()

    def end() -> None:
        nonlocal is_open
        if is_open:
            is_open = False
            shown.render_finish()

    try:
        yield progress
    finally:
        end()


def warn(text: str) -> None:
    """Print a warning on stderr."""
    click.echo(f"{click.style('Warning:', fg='yellow')} {text}", err=True)

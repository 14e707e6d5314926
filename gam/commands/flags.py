"""Flags made from the options of a merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from gam.commands.terminal import Option
from gam.errors import PluginError
from gam.merging.options import DEFAULTS, OPTIONS
from gam.strategies import get, names

_Function = TypeVar("_Function", bound=Callable[..., Any])


def flag(name: str) -> Callable[[_Function], _Function]:
    """Return a decorator that adds the flag of an option of a merge."""
    option, default = OPTIONS[name], DEFAULTS[name]
    words = "--" + name.replace("_", "-")
    more: dict[str, Any] = {"metavar": option.metavar}
    if option.choices:
        more["type"] = _Words(option.choices)
    elif name == "normalize":
        words, more = f"{words}/--no-{name}", {}
    elif isinstance(default, bool):
        more = {"is_flag": True}
    else:
        more.update(_MORE.get(name, {}))
    return click.option(
        words, name, cls=Option, heading=option.heading, default=default, help=option.help, **more
    )


class _Words(click.Choice[str]):
    """Words that are completed and shown; `MergeOptions` refuses others, as from Python."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return what was given."""
        return value


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a list of numbers such as 0.5,0.3,0.2.", ctx, param
        ) from None


def _complete_method(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    found = [name for name in names() if name.startswith(incomplete)]
    return [CompletionItem(name, help=_summary(name)) for name in found]


def _summary(name: str) -> str | None:
    try:
        return get(name).summary
    except PluginError:
        return None


# How a command line writes what is not text.
_MORE: dict[str, dict[str, Any]] = {
    "method": {"shell_complete": _complete_method},
    "weights": {"callback": _numbers},
    "scale": {"type": float},
    "alpha": {"type": float},
}

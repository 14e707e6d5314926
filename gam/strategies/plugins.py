"""Methods that other packages bring, through the entry-point group `gam.strategies`.

An entry point is named like its method and points to a `gam.strategies.Strategy`. It is
imported when somebody asks for that method, so that a broken package is in nobody's way.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

from gam.errors import PluginError
from gam.strategies.base import Strategy

GROUP = "gam.strategies"


def find() -> dict[str, list[EntryPoint]]:
    """Return the entry points of the installed packages, by the name of the method."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, package(point))):
        found.setdefault(point.name, []).append(point)
    return found


def package(point: EntryPoint) -> str:
    """Return the distribution and version that an entry point belongs to."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"


def load(point: EntryPoint) -> Strategy:
    """Import the method of an entry point, its function too.

    Raises:
        PluginError: It cannot be imported, or is not what it should be.
    """
    where = f"method {point.name!r} of package {package(point)!r} ({point.value})"
    advice = "tell its author, or uninstall the package."
    try:
        strategy = point.load()
        if isinstance(strategy, Strategy):
            strategy = replace(strategy, function=strategy.load(), package=package(point))
    # Whatever the package does wrong, the user wants to know which package it was.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(f"{where}: cannot be imported: {reason}; {advice}") from error
    if not isinstance(strategy, Strategy):
        raise PluginError(
            f"{where}: got a {type(strategy).__name__}, "
            f"expected a gam.strategies.Strategy; {advice}"
        )
    if strategy.name != point.name:
        raise PluginError(f"{where}: the strategy calls itself {strategy.name!r}; {advice}")
    names = [param.name for param in strategy.params]
    try:
        inspect.signature(strategy.load()).bind([], [], **dict.fromkeys(names))
    except (TypeError, ValueError) as error:
        listed = ", ".join(["updates", "weights", *names])
        raise PluginError(
            f"{where}: its function does not take ({listed}): {error}; {advice}"
        ) from error
    return strategy

"""The merging methods, by name: gam's own, and those that other packages bring.

To add one: a function in a file of its own beside this one, and an entry in
`gam.strategies.catalogue`. The command line, the checks, the model card and the
documentation follow from the entry. From another package: the same `Strategy` object, and

    [project.entry-points."gam.strategies"]
    my_method = "my_package.merging:MY_METHOD"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from gam.errors import OptionError, PluginError
from gam.strategies import plugins
from gam.strategies.base import Param, Strategy
from gam.strategies.catalogue import BUILT_IN

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in BUILT_IN}

__all__ = ["STRATEGIES", "Param", "Strategy", "get", "names", "parameters"]


def names() -> list[str]:
    """Return the names of all methods, gam's own first; nothing is imported."""
    return list(dict.fromkeys([*STRATEGIES, *plugins.find()]))


def get(name: str) -> Strategy:
    """Return the strategy called ``name``.

    Raises:
        OptionError: There is none; the message lists what there is.
        PluginError: The package that brings it is broken, or another has the same name.
    """
    found = plugins.find()
    if not isinstance(name, str) or name not in {*STRATEGIES, *found}:
        near = difflib.get_close_matches(str(name), names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(names())
        raise OptionError(f"unknown method {name!r}; choose one of: {listed}.{hint}", "method")
    points = found.get(name, [])
    if name in STRATEGIES and not points:
        return STRATEGIES[name]
    if name in STRATEGIES or len(points) > 1:
        own = "gam-merge itself and " if name in STRATEGIES else ""
        bringing = " and ".join(repr(plugins.package(point)) for point in points)
        raise PluginError(
            f"method {name!r}: {own}{bringing} bring a method of this name; "
            "uninstall all but one, or ask for another name."
        )
    return plugins.load(points[0])


def parameters(strategies: Sequence[Strategy] = BUILT_IN) -> Iterator[tuple[Param, list[str]]]:
    """Yield each parameter once, with the names of the methods that have it just so."""
    owners: dict[Param, list[str]] = {}
    for strategy in strategies:
        for param in strategy.params:
            owners.setdefault(param, []).append(strategy.name)
    yield from owners.items()

"""The merging methods, by name."""

from __future__ import annotations

import difflib

from gam.errors import OptionError
from gam.strategies.base import Param, Strategy
from gam.strategies.gam import GAM
from gam.strategies.linear import LINEAR
from gam.strategies.ties import TIES

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in (GAM, LINEAR, TIES)}

__all__ = ["STRATEGIES", "Param", "Strategy", "get"]


def get(name: str) -> Strategy:
    """Return the strategy called ``name``.

    Raises:
        OptionError: There is none; the message lists what there is.
    """
    try:
        return STRATEGIES[name]
    except (KeyError, TypeError):
        near = difflib.get_close_matches(str(name), STRATEGIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionError(
            f"unknown method {name!r}; choose one of: {', '.join(STRATEGIES)}.{hint}"
        ) from None

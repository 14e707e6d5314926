"""The signature and documentation of a function that takes the options of a merge."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from gam.strategies import parameters

_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_options_of(plan: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Decorate a function that hands its ``**options`` on to a planning function.

    ``help`` and editors then see the options of ``plan`` and the parameters of every method
    by name, each documented as where it is declared.

    Args:
        plan: Takes keywords, and the parameters of a method as ``**params``.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    found = list(parameters())

    def decorate(function: _Function) -> _Function:
        kept = [
            param
            for param in inspect.signature(function).parameters.values()
            if param.kind is not param.VAR_KEYWORD
        ]
        taken = [p for p in inspect.signature(plan).parameters.values() if p.kind is keyword]
        names = dict.fromkeys(param.name for param, _ in found)
        own = [inspect.Parameter(name, keyword, default=None, annotation="Any") for name in names]
        rest = inspect.Parameter("params", inspect.Parameter.VAR_KEYWORD, annotation="Any")
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*kept, *taken, *own, rest], return_annotation=function.__annotations__["return"]
        )
        lines = [
            f"    {param.name} ({', '.join(owners)}): {param.help} {param.values}."
            for param, owners in found
        ]
        text = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = "\n".join([text, "", "Parameters of the methods:", *lines])
        return function

    return decorate

"""What a strategy is: one function, and its parameters declared once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from gam.errors import OptionError

Kind = Literal["bool", "float", "int", "adapter", "choice"]


@dataclass(frozen=True)
class Param:
    """One parameter of a strategy, as `--help`, the checks and the records know it.

    Attributes:
        name: Keyword of the strategy's function.
        kind: "adapter" takes an adapter's name or its index from 0, or one of ``choices``;
            "choice" takes one of ``choices`` only.
        default: Value when the user gives none.
        help: One sentence.
        minimum: Smallest value allowed, itself included.
        maximum: Largest value allowed, itself included.
        choices: Words allowed besides what ``kind`` says.
    """

    name: str
    kind: Kind
    default: bool | float | int | str | None
    help: str
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def values(self) -> str:
        """What may be given, as the help shows it."""
        if self.kind == "bool":
            return "true|false"
        if self.kind in ("adapter", "choice"):
            return "|".join([*(("NAME", "INDEX") if self.kind == "adapter" else ()), *self.choices])
        low, high = (
            f"{end:g}" if math.isfinite(end) else "" for end in (self.minimum, self.maximum)
        )
        return self.kind.upper() + (f" from {low}" if low else "") + (f" to {high}" if high else "")

    @property
    def bounds(self) -> str:
        """What a number must be, as the refusal of one says it."""
        if math.isfinite(self.minimum) and math.isfinite(self.maximum):
            return f" from {self.minimum:g} to {self.maximum:g}"
        if math.isfinite(self.minimum):
            return f", {self.minimum:g} or more"
        return f", {self.maximum:g} or less"


@dataclass(frozen=True)
class Strategy:
    """A merging method.

    Attributes:
        name: What the user types.
        function: ``function(updates, weights, **params) -> Product | Rows``, or where it is,
            as "module:name", so that listing methods imports no torch. ``updates`` is a
            sequence of `gam.algebra.updates.Update`, all present and non-zero, at least one;
            ``weights`` one float for each, their absolute values summing to at most one
            (less where some adapter lacks these modules). Every parameter is a keyword.
            Pure: no files, no printing.
        summary: One line.
        paper: Reference to the paper, for the model card.
        params: Its parameters.
        normalize: Whether the weights are made to sum to one where the user does not say;
            False for methods that add updates up.
        rank: Output rank where the user does not say; "sum" for methods whose result is of
            high rank.
        size: Size of the result where the user does not say: "exact" is what the function
            gives, "mean" the weighted mean size of the inputs.
        float32_is_enough: Whether the function guards itself, so that where all factors are of
            half precision the overlaps may come from products in float32: it raises
            `gam.algebra.updates.InexactError` where these do not determine its result. Else
            everything that it gets is good to float64.
        package: Distribution and version that brings it; empty for a method of gam's own.
    """

    name: str
    function: Callable[..., Any] | str
    summary: str
    paper: str
    params: tuple[Param, ...] = ()
    normalize: bool = True
    rank: Literal["max", "sum"] = "max"
    size: Literal["exact", "mean"] = "exact"
    float32_is_enough: bool = False
    package: str = ""

    def load(self) -> Callable[..., Any]:
        """Return the function, imported if need be."""
        if not isinstance(self.function, str):
            return self.function
        module, _, name = self.function.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found

    def check(self, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Return every parameter with a checked value, defaults filled in.

        Args:
            values: Parameters as given: Python values, or text from a command line.
            names: Labels of the adapters, for parameters of kind "adapter".

        Returns:
            Name to value for all of ``params``; an "adapter" becomes the label.

        Raises:
            OptionError: An unknown name or a value out of range.
        """
        known = {param.name: param for param in self.params}
        for name in values:
            if name not in known:
                listed = ", ".join(known) or "none"
                raise OptionError(
                    f"method {self.name!r} has no parameter {name!r}; its parameters: {listed}."
                )
        checked = {}
        for param in self.params:
            value = values.get(param.name)
            checked[param.name] = (
                param.default if value is None else self._parse(param, value, names)
            )
        return checked

    def _parse(self, param: Param, value: Any, names: Sequence[str]) -> Any:
        where = f"{param.name} of method {self.name!r}"
        if isinstance(value, str) and value in param.choices:
            return value
        if param.kind == "adapter":
            return _adapter(value, names, where, param.choices)
        if param.kind == "bool":
            if isinstance(value, str):
                words = {"true": True, "1": True, "false": False, "0": False}
                value = words.get(value.lower(), value)
            if not isinstance(value, bool):
                raise OptionError(f"{where}: got {value!r}, expected true or false.")
            return value
        if param.kind == "choice":
            raise OptionError(
                f"{where}: got {value!r}, expected one of: {', '.join(param.choices)}."
            )
        word = "a whole number" if param.kind == "int" else "a number"
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or (param.kind == "int" and number != int(number)):
            raise OptionError(f"{where}: got {value!r}, expected {word}.")
        if not param.minimum <= number <= param.maximum:
            raise OptionError(f"{where}: got {value!r}, expected {word}{param.bounds}.")
        if param.kind != "int":
            return number
        try:
            return int(value)  # a float holds no more than 53 bits
        except ValueError:  # as 1e3
            return int(number)


def _adapter(value: Any, names: Sequence[str], where: str, choices: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in names:
        return value
    try:
        index = int(value)
        if isinstance(value, str) or index == value:
            return names[range(len(names)).index(index)]
        raise ValueError
    except (TypeError, ValueError, OverflowError):
        listed = ", ".join([*names, *choices])
        raise OptionError(
            f"{where}: got {value!r}, expected an index from 0 to {len(names) - 1} "
            f"or one of: {listed}."
        ) from None

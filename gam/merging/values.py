"""Checks of single values as a user gives them: each returns what is used, or refuses."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from gam.errors import OptionError


def anything(value: Any) -> Any:
    """Return a value that is checked elsewhere."""
    return value


def name(value: Any) -> str:
    """Return a word."""
    if not isinstance(value, str):
        raise OptionError(f"got {value!r}, expected a name.")
    return value


def choice(value: Any, choices: Sequence[str]) -> str:
    """Return one of some words."""
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"got {value!r}, expected one of: {', '.join(choices)}.")
    return value


def switch(value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"got {value!r}, expected True or False.")
    return value


def switch_or_none(value: Any) -> bool | None:
    """Return True or False; None as it is."""
    return None if value is None else switch(value)


def number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else."""
    try:
        found = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def number_or_none(value: Any) -> float | None:
    """Return a finite number; None as it is."""
    if value is not None and number(value) is None:
        raise OptionError(f"got {value!r}, expected a finite number.")
    found: float | None = value
    return found


def numbers(value: Any) -> Any:
    """Return a gradient for a list of numbers; anything else as it is."""
    points = [number(point) for point in value] if isinstance(value, (list, tuple)) else []
    return tuple(points) if points and None not in points else value


def scale(value: Any) -> Any:
    """Return a finite number other than 0, or a gradient of such numbers of one sign."""
    points = value if isinstance(value, (list, tuple)) else [value]
    found = [point for point in map(number, points) if point is not None]
    if not points or len(found) < len(points) or 0 in found:
        raise OptionError(f"got {value!r}, expected a finite number other than 0.")
    if min(found) < 0 < max(found):
        raise OptionError(f"got {value!r}, a gradient that passes through 0.")
    return tuple(found) if isinstance(value, (list, tuple)) else found[0]


def rank(value: Any) -> int | str | float:
    """Return a whole number, "max" or "sum", or the energy as a float."""
    if isinstance(value, str) and value in ("max", "sum"):
        return value
    try:
        if isinstance(value, str) and value.startswith("energy="):
            energy = float(value.removeprefix("energy="))
            if 0 < energy <= 1:
                return energy
        elif not isinstance(value, (bool, bytes)) and int(value) == float(value) and int(value) > 0:
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise OptionError(
        f"got {value!r}, expected a whole number above 0, 'max', 'sum' or 'energy=X' with X "
        "above 0 and at most 1, such as energy=0.99."
    )


def ranks(value: Any) -> Any:
    """Return what `rank` does, or a gradient of whole numbers."""
    if not isinstance(value, (list, tuple)):
        return rank(value)
    points = [rank(point) for point in value]
    if not points or not all(isinstance(point, int) for point in points):
        raise OptionError(f"got {value!r}, a gradient is of whole numbers above 0.")
    return tuple(points)


def ranks_or_none(value: Any) -> Any:
    """Return a value that `ranks` takes as it was given; None as it is."""
    if value is not None:
        ranks(value)
    return value


def rank_text(value: int | str | float) -> int | str:
    """Return a rank as a user gives it."""
    return f"energy={value}" if isinstance(value, float) else value


def weights(value: Any, labels: Sequence[str], complete: bool) -> dict[str, Any]:
    """Return label -> weight or gradient, for all labels if the weights must be complete."""
    pairs = _by_label(value, labels, complete)
    try:
        found = {
            label: tuple(map(float, w)) if isinstance(w, (list, tuple)) else float(w)
            for label, w in pairs.items()
        }
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"got {value!r}, {_EACH}.") from None
    points = [weight if isinstance(weight, tuple) else (weight,) for weight in found.values()]
    if not all(points):
        raise OptionError(f"got {value!r}, a gradient needs at least one number.")
    if not all(math.isfinite(point) for each in points for point in each) or not math.isfinite(
        sum(max(map(abs, each)) for each in points)
    ):
        raise OptionError(f"got {value!r}, expected finite numbers with a finite sum.")
    if complete and not any(map(any, points)):
        raise OptionError("all are 0, so there is nothing to merge. Give one another weight.")
    return found


_EACH = "expected one number for each adapter"


def _by_label(value: Any, labels: Sequence[str], complete: bool) -> dict[str, Any]:
    if isinstance(value, Mapping):
        for label in value:
            if label not in labels:
                near = difflib.get_close_matches(str(label), labels, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                listed = ", ".join(labels)
                raise OptionError(f"no adapter is called {label!r}; they are: {listed}.{hint}")
        lacking = [label for label in labels if label not in value]
        if complete and lacking:
            raise OptionError(f"none for adapter {lacking[0]!r}; {_EACH}.")
        return {label: value[label] for label in labels if label in value}
    try:
        listed_values = None if isinstance(value, (str, bytes, Set)) else list(value)
    except TypeError:
        listed_values = None
    if listed_values is None:
        raise OptionError(f"got {value!r}, {_EACH}.")
    if len(listed_values) != len(labels):
        raise OptionError(
            f"got {len(listed_values)} for {len(labels)} adapters; give one number for each."
        )
    return dict(zip(labels, listed_values, strict=True))

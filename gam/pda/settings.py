"""Settings classes: each field says once what the command line, the recipe and the checks know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar

from gam.errors import OptionError

Settings = TypeVar("Settings")


def setting(
    default: Any, text: str, *choices: str, least: float = -math.inf, most: float = math.inf
) -> Any:
    """Return a field of a settings class, with what the command line says about it.

    Args:
        default: Its default, or the type of an empty container. A value must be of its type.
        text: Its help.
        choices: The values it may have; any where none is given.
        least: Smallest number allowed.
        most: Largest number allowed.
    """
    metadata = {"help": text, "choices": choices, "least": least, "most": most}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_settings(settings: Any) -> None:
    """Raise an `OptionError` for a value that is of the wrong type, or out of its range."""
    for entry in fields(settings):
        value, about = getattr(settings, entry.name), entry.metadata
        if about["choices"]:
            fits, expected = value in about["choices"], f"one of: {', '.join(about['choices'])}"
        elif entry.default is MISSING:
            fits, expected = isinstance(value, Mapping), "names and values"
        elif isinstance(entry.default, bool):
            fits, expected = isinstance(value, bool), "true or false"
        elif isinstance(entry.default, str):
            fits, expected = isinstance(value, str), "text"
            if "Sequence" in str(entry.type):
                fits, expected = fits or _is_texts(value), "text or a list of texts"
        else:
            whole = isinstance(entry.default, int)
            fits = _is_number(value, whole) and about["least"] <= value <= about["most"]
            expected = f"a {'whole ' if whole else ''}number{_bounds(about)}"
        if not fits:
            raise OptionError(f"{entry.name}: got {value!r}, expected {expected}.")


def settings_from(kind: type[Settings], values: Any, where: str) -> Settings:
    """Return settings from names and values, checked.

    Raises:
        OptionError: A name is unknown or a value is refused; the message begins with ``where``.
    """
    known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise OptionError(f"{where}: got {values!r}, expected names and values.")
    for name in values:
        if name not in known:
            raise OptionError(f"{where}: unknown {name!r}; expected {', '.join(known)}.")
    try:
        return kind(**values)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None


def _is_number(value: object, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return math.isfinite(value)


def _is_texts(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(text, str) for text in value)
    )


def _bounds(about: Mapping[str, Any]) -> str:
    least, most = about["least"], about["most"]
    if math.isfinite(least) and math.isfinite(most):
        return f" from {least:g} to {most:g}"
    return f", {least:g} or more" if math.isfinite(least) else ""

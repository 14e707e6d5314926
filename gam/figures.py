"""Values as text and as plain types, for reports, cards, notebooks and terminals alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def number(value: float) -> str:
    """Return a number with three decimals; "undefined" for NaN and infinity."""
    return f"{value:.3f}" if math.isfinite(value) else "undefined"


def percent(value: float) -> str:
    """Return a share in percent, four digits of it; "undefined" for NaN and infinity."""
    if 0 < value < 1e-5:
        return "below 0.001 %"
    return f"{100 * value:.4g} %" if math.isfinite(value) else "undefined"


def plain(value: Any) -> Any:
    """Return a value in plain types, as JSON can hold it; NaN and infinity become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)

"""Scalings that a file states beside its factors, against those that something else states."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from gam.errors import AdapterError


def alpha_numbers(alphas: Mapping[str, torch.Tensor], where: str) -> dict[str, float]:
    """Return what alpha tensors hold, by module.

    Args:
        alphas: Module path to a tensor with one number.
        where: What the user called the adapter.

    Raises:
        AdapterError: One of them holds no finite number.
    """
    numbers = {
        module: float(value) if value.numel() == 1 else math.nan for module, value in alphas.items()
    }
    for module, number in numbers.items():
        if not math.isfinite(number):
            raise AdapterError(
                f"adapter {where!r}, module {module!r}: its alpha tensor holds no finite "
                "number. Save the adapter again."
            )
    return numbers


def agreed(
    from_alpha: float | None, stated: float | None, by: str, module: str, where: str
) -> float:
    """Return the scaling of a module, stated by its alpha tensor or otherwise.

    Args:
        from_alpha: By the alpha tensor.
        stated: Otherwise.
        by: The file that would state it otherwise.
        module: Module path.
        where: What the user called the adapter.

    Raises:
        AdapterError: Nothing states it, or the two differ.
    """
    if from_alpha is None and stated is None:
        raise AdapterError(
            f"adapter {where!r}, module {module!r}: nothing states its scaling: no {by} beside "
            f"the file, no alpha tensor, none in the metadata. Put the {by} there, or pass --alpha."
        )
    if from_alpha is None or stated is None:
        return from_alpha if stated is None else stated  # type: ignore[return-value]
    if not math.isclose(from_alpha, stated, rel_tol=1e-6):
        raise AdapterError(
            f"adapter {where!r}, module {module!r}: the alpha tensor gives a scaling of "
            f"{from_alpha:g} but {by} gives {stated:g}. Remove the wrong one."
        )
    return stated

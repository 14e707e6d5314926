"""What every update must be, from whatever file it is or from memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from gam.adapter import LowRank
from gam.errors import AdapterError
from gam.formats.safetensors import DTYPES

_LARGEST = torch.finfo(torch.float32).max


def check_modules(modules: Mapping[str, LowRank], where: str) -> dict[str, LowRank]:
    """Return the modules of an adapter made in memory, checked as those of a file are.

    Args:
        modules: Module path to update.
        where: What to call the adapter in messages.

    Returns:
        The same modules, their factors detached from any graph.

    Raises:
        AdapterError: There are none, or one of them could not have been read from a file.
    """
    if not modules:
        raise AdapterError(f"adapter {where!r}: it has no modules. Give one that was trained.")
    return {
        name: check_update(update, f"adapter {where!r}, module {name!r}")
        for name, update in modules.items()
    }


def check_update(update: LowRank, what: str) -> LowRank:
    """Return an update whose factors are detached from any graph, fully checked.

    Args:
        update: Of any rank.
        what: What messages begin with.

    Raises:
        AdapterError: The factors do not fit each other, are no matrices of a known dtype, or
            hold values that are not finite.
    """
    check_shapes(update.lora_a, update.lora_b, what)
    update = replace(update, lora_a=update.lora_a.detach(), lora_b=update.lora_b.detach())
    _check_values(update, what)
    return update


def check_shapes(lora_a: torch.Tensor, lora_b: torch.Tensor, what: str) -> None:
    """Refuse factors that are not [r, in] and [out, r], in a dtype of an adapter.

    Raises:
        AdapterError: They are not; the message begins with ``what``.
    """
    _check_factor("lora_A", lora_a, what)
    _check_factor("lora_B", lora_b, what)
    if lora_a.shape[0] != lora_b.shape[1]:
        raise AdapterError(
            f"{what}: lora_A is {list(lora_a.shape)} but lora_B is {list(lora_b.shape)}, so "
            f"their ranks {lora_a.shape[0]} and {lora_b.shape[1]} differ. Save the adapter again."
        )


def _check_factor(side: str, tensor: torch.Tensor, what: str) -> None:
    shape = list(tensor.shape)
    if tensor.ndim > 2:
        raise AdapterError(
            f"{what}: {side} is {shape}, so it belongs to a convolution, which is not supported "
            "yet. Leave convolutions out of target_modules."
        )
    if tensor.ndim < 2 or 0 in shape:
        raise AdapterError(
            f"{what}: {side} is {shape}, expected a matrix. Save it again: under DeepSpeed or "
            "FSDP, gather the parameters first."
        )
    if tensor.dtype not in DTYPES:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise AdapterError(
            f"{what}: {side} has dtype {dtype}, expected float32, bfloat16, float16 or float64. "
            "Save the adapter in one of them."
        )


def _check_values(update: LowRank, what: str) -> None:
    for side, tensor in (("lora_A", update.lora_a), ("lora_B", update.lora_b)):
        if not _all_finite(tensor):
            raise AdapterError(
                f"{what}: {side} holds NaN or infinity, so the training diverged or the file "
                "is damaged. Use an earlier checkpoint."
            )
        if tensor.dtype == torch.float64 and float(tensor.abs().max()) > _LARGEST:
            raise AdapterError(
                f"{what}: {side} holds values beyond the range of float32. Scale them down."
            )
    if not abs(update.scale) <= _LARGEST:
        raise AdapterError(
            f"{what}: the scaling is {update.scale!r}, expected a number in the range of "
            "float32. Correct the alpha."
        )


def _all_finite(tensor: torch.Tensor) -> bool:
    """Tell whether all values are finite, reading them once (ten times isfinite's speed).

    NaN and infinity survive a sum. Finite values may overflow it, hence the second look.
    """
    if math.isfinite(float(tensor.sum())):
        return True
    return all(math.isfinite(float(bound)) for bound in torch.aminmax(tensor))

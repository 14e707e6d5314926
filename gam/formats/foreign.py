"""Tensors that no format here reads, by their true names."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONVERT = "Convert the file to PEFT's format first"
_ONLY_LORA = "Only LoRA adapters can be merged"
_KINDS = (  # first match wins
    (r"lora_(down|up)\b", "the kohya format (lora_down, lora_up)", _CONVERT),
    (r"[._]lora\.(down|up)\.", "an old diffusers format (lora.down, lora.up)", _CONVERT),
    (
        r"lora_embedding_[AB]\b",
        "LoRA on an embedding, which is not supported yet",
        "Leave the embedding out of target_modules",
    ),
    (r"lora_magnitude_vector\b", "DoRA, whose updates do not add up", "Train it without DoRA"),
    (r"lora_(E|ranknum)\b", "AdaLoRA", _ONLY_LORA),
    (r"\bhada_", "LoHa", _ONLY_LORA),
    (r"\blokr_", "LoKr", _ONLY_LORA),
    (r"\bvera_lambda", "VeRA", _ONLY_LORA),
    (r"\bia3_l\b", "IA3", _ONLY_LORA),
    (r"\b(oft|boft|hra|bone|miss)_", "an adapter that is not LoRA", _ONLY_LORA),
    (r"\b(trainable_tokens|token_adapter)", "trained tokens", "Train it without new tokens"),
    (
        r"\.lora_[AB](\.[^.]+)?\.bias$",
        "a bias of a LoRA factor (lora_bias), which is not supported yet",
        "Train it without lora_bias",
    ),
    (
        r"\.bias$",
        "a trained bias, which is not supported yet",
        "Train it with bias='none'",
    ),
    (
        r"\.weight$",
        "a fully saved weight (modules_to_save, or a resized embedding), which is not "
        "supported yet",
        "Train it without modules_to_save, or save it with save_embedding_layers=False",
    ),
)


def describe(names: Sequence[str]) -> str:
    """Return what tensors that are no LoRA factors are, by the one that tells most.

    Args:
        names: Of the tensors; none if there is nothing in the file.

    Returns:
        A sentence, and one that says what to do.
    """
    if not names:
        return "no LoRA tensors in the file. Give a file with lora_A and lora_B."
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    for pattern, what, remedy in _KINDS:
        for name in names:
            if re.search(pattern, name):
                return f"tensor {name!r}{more} belongs to {what}. {remedy}."
    return (
        f"tensor {names[0]!r}{more} is not a LoRA factor that gam-merge knows. "
        "Leave the adapter out, or remove the tensor if it has no effect."
    )

"""The ``adapter_config.json`` of an adapter whose scaling is 1 everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gam.formats.peft_config import is_empty


def output_config(ranks: Mapping[str, int], inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the config of an adapter whose scaling is 1 in every module.

    vLLM reads no patterns, so alpha = r holds for the whole and for each module. What the
    inputs agree on (base model, revision, task type, orientation) is carried; a value that
    only some of them state counts as agreed. Running it on its own output changes nothing.

    Args:
        ranks: Module path to the rank of its tensors; at least one.
        inputs: Configs of the adapters that were merged; they may be empty.

    Returns:
        A new mapping, ready for JSON.
    """
    rank = max(ranks.values())
    pattern = {
        _exact_pattern(module): ranks[module]
        for module in sorted(ranks, key=lambda name: (-len(name), name))
        if ranks[module] != rank
    }
    return {
        "alpha_pattern": pattern,
        "auto_mapping": _agreed(inputs, "auto_mapping"),
        "base_model_name_or_path": _agreed(inputs, "base_model_name_or_path"),
        "bias": "none",
        "fan_in_fan_out": bool(_agreed(inputs, "fan_in_fan_out")),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(pattern),
        "revision": _agreed(inputs, "revision"),
        "target_modules": _targets(ranks, inputs),
        "task_type": _agreed(inputs, "task_type"),
        "use_rslora": False,
    }


def _exact_pattern(module: str) -> str:
    """Return a pattern key that PEFT matches against this module path and no other.

    Without the anchor, a key for a module at the root such as ``q_proj`` would match every
    path that ends in ``.q_proj``.
    """
    return "^" + re.escape(module)


def _agreed(inputs: Sequence[Mapping[str, Any]], key: str) -> Any:
    stated = [config[key] for config in inputs if config.get(key) is not None]
    return stated[0] if stated and all(value == stated[0] for value in stated) else None


def _targets(ranks: Mapping[str, int], inputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the inputs' own target suffixes where they cover every module, else full paths."""
    suffixes = {suffix for config in inputs for suffix in _target_suffixes(config) or ()}
    if suffixes >= ranks.keys() or any(_target_suffixes(config) is None for config in inputs):
        return sorted(ranks)
    used = set()
    for module in ranks:
        # The shortest one: it makes the longer ones redundant.
        match = next((end for end in _endings(module) if end in suffixes), None)
        if match is None:
            return sorted(ranks)
        used.add(match)
    return sorted(used)


def _target_suffixes(config: Mapping[str, Any]) -> list[str] | None:
    targets = config.get("target_modules")
    narrowed = any(
        not is_empty(config.get(key))
        for key in ("layers_to_transform", "layers_pattern", "exclude_modules")
    )
    return targets if isinstance(targets, list) and not narrowed else None


def _endings(module: str) -> Iterator[str]:
    """Yield the last part of a module path, then the last two, up to the whole."""
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))

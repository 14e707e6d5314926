"""What PEFT's ``adapter_config.json`` means for a merge.

A key is one of three kinds. A *hint* says how the adapter was trained or where it goes,
and the tensors are the truth. A *resolved* key is read here: it sets the scaling, or is
carried to the output. A *variant* key switches on something that is not a plain
``B @ A`` update, and must hold its neutral value. A key that is none of these may change
the maths in a way we do not know, so it must be empty.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from gam.adapter import Facts
from gam.errors import AdapterError, one_line

CONFIG_NAME = "adapter_config.json"

_HINTS = frozenset(
    {
        "ensure_weight_tying",  # acts on embeddings and saved modules, refused as tensors
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "merge_weights",  # PEFT before 0.3
        "peft_version",
        "qalora_group_size",  # no effect without use_qalora
        "runtime_config",
        # The targets: the file's tensors say the same, and exactly.
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        # Details of an initialisation; whether it matters is in init_lora_weights, which
        # PEFT resets to true when it converts an adapter, leaving these behind.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        # Training options that ms-swift adds.
        "lora_dtype",
        "lorap_lr_ratio",
    }
)

_DROP = "Leave this adapter out, or train it without"
_VARIANTS = {
    "alora_invocation_tokens": (
        "aLoRA acts only after its invocation tokens, so it is no fixed update of a weight",
        f"{_DROP} aLoRA",
    ),
    "arrow_config": (
        "Arrow routes tokens between adapters, so it is no fixed update of a weight",
        "Merge the adapters that it routes between",
    ),
    "enable_lora": (
        "LoRA on parts of a fused weight (PEFT before 0.3) stores its factors in another shape",
        "Train the adapter with a newer PEFT",
    ),
    "kasa_config": (
        "KaSA changes the base weights and adds a diagonal between the factors",
        f"{_DROP} KaSA",
    ),
    "layer_replication": (
        "the adapter belongs to a base model with replicated layers",
        f"{_DROP} layer_replication",
    ),
    "lora_bias": (
        "merging the biases of LoRA factors is not supported yet",
        f"{_DROP} lora_bias",
    ),
    "megatron_config": (
        "Megatron's parallel layers save parts of the factors",
        "Save the adapter from a model that is not sharded",
    ),
    "modules_to_save": (
        "merging fully trained modules is not supported yet",
        f"{_DROP} modules_to_save",
    ),
    "monteclora_config": (
        "MonteCLoRA samples around the factors, so it is no fixed update of a weight",
        f"{_DROP} MonteCLoRA",
    ),
    "target_parameters": (
        "merging LoRA on parameters (fused experts) is not supported yet",
        f"{_DROP} target_parameters",
    ),
    "trainable_token_indices": (
        "merging trained token embeddings is not supported yet",
        f"{_DROP} trainable_token_indices",
    ),
    "use_bdlora": (
        "BD-LoRA keeps its factors as blocks",
        f"{_DROP} BD-LoRA",
    ),
    "use_dora": (
        "DoRA also rescales each row of the weight, so its updates do not add up",
        f"{_DROP} DoRA",
    ),
    "use_qalora": (
        "QALoRA's lora_A acts on pooled inputs",
        f"{_DROP} QALoRA",
    ),
    "velora_config": (
        "VeLoRA is a variant of LoRA that gam-merge does not know",
        f"{_DROP} VeLoRA",
    ),
}

# The name is compared without case. "mica" leaves the base alone: it starts at A = 0.
_PLAIN_INITS = ("eva", "gaussian", "mica", "orthogonal")
_CONVERTIBLE_INITS = ("corda", "lora_ga", "olora", "pissa")


def is_empty(value: Any) -> bool:
    """Tell whether PEFT writes this for a feature that is off; 0 may be a layer's index."""
    return value is None or value is False or value in ("", [], {})


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    largest = sys.float_info.max  # comparing also works for integers beyond it
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -largest <= value <= largest


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_targets(value: Any) -> bool:
    return _is_text(value) or (
        isinstance(value, list) and all(isinstance(target, str) for target in value)
    )


def _is_bias(value: Any) -> bool:
    return value in (None, "none", "all", "lora_only")


_RESOLVED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_number, "a finite number"),
    "rank_pattern": (_is_object, "an object from module patterns to ranks"),
    "alpha_pattern": (_is_object, "an object from module patterns to alphas"),
    "use_rslora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "base_model_name_or_path": (_is_text, "text or null"),
    "revision": (_is_text, "text or null"),
    "task_type": (_is_text, "text or null"),
    "auto_mapping": (_is_object, "an object or null"),
    "target_modules": (_is_targets, "text or a list of text"),
    # Trained biases are seen in the file, so "all" on a model without biases is fine.
    "bias": (_is_bias, "'none', 'all' or 'lora_only'"),
}
_PATTERNS = {"rank_pattern": _RESOLVED["r"], "alpha_pattern": _RESOLVED["lora_alpha"]}


def read_config(data: bytes, where: str) -> dict[str, Any]:
    """Return an ``adapter_config.json``, refused where it describes no plain LoRA.

    Args:
        data: The bytes of the file.
        where: What the user called the adapter.

    Returns:
        Its keys, as they are.

    Raises:
        AdapterError: It cannot be merged, or is damaged.
    """
    config = parse_object(data, CONFIG_NAME, where)
    check_config(config, where)
    return config


def parse_object(data: str | bytes, what: str, where: str) -> dict[str, Any]:
    """Return a JSON object.

    Args:
        data: Text, or bytes of UTF-8.
        what: What it is called in messages.
        where: What the user called the adapter.

    Raises:
        AdapterError: It is no JSON object.
    """
    try:
        value = json.loads(data.decode("utf-8") if isinstance(data, bytes) else data)
    except UnicodeDecodeError:
        raise AdapterError(
            f"adapter {where!r}: {what} is not UTF-8 text. Save it again with PEFT."
        ) from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"adapter {where!r}: {what} is not JSON ({one_line(error)}). Save it again with PEFT."
        ) from None
    if not isinstance(value, dict):
        raise AdapterError(
            f"adapter {where!r}: {what} holds a {type(value).__name__}, expected an object. "
            "Save it again with PEFT."
        )
    return value


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that says anything but a plain LoRA whose scaling is known.

    Args:
        config: The keys of ``adapter_config.json``.
        where: What the user called the adapter.

    Raises:
        AdapterError: The first key whose value is not supported, unknown or malformed, and
            what to do about it.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        _refuse(
            where,
            "peft_type",
            kind,
            "only LoRA adapters can be merged",
            "Convert it with PEFT's save_as_lora where that supports it, or leave it out",
        )
    _check_init(config, where)
    for key, value in config.items():
        if key in _RESOLVED:
            _check_type(where, key, value, *_RESOLVED[key])
        elif key in _VARIANTS:
            if not is_empty(value):
                _refuse(where, key, value, *_VARIANTS[key])
        elif key not in (*_HINTS, "peft_type", "init_lora_weights") and value:
            _refuse(
                where,
                key,
                value,
                "gam-merge does not know this key, and it may change what the adapter computes",
                f"Remove it from {CONFIG_NAME} if it does not, or leave the adapter out",
            )
    for key, (valid, expected) in _PATTERNS.items():
        for pattern, value in (config.get(key) or {}).items():
            _compile(pattern, key, where)
            _check_type(where, f"{key}[{pattern!r}]", value, valid, expected)


def facts_of(config: Mapping[str, Any]) -> Facts:
    """Return what a config says that decides what an adapter may be merged with."""
    return Facts(
        base=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
        task=config.get("task_type") or None,
    )


def resolve_scaling(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """Return the factor that PEFT puts before ``B @ A`` in one module.

    alpha / r, or alpha / sqrt(r) under ``use_rslora``. alpha is the first entry of
    ``alpha_pattern`` that matches the module, else ``lora_alpha``; r is the rank of the
    tensors, which must be what the config says.

    Args:
        config: The keys of ``adapter_config.json``.
        module: Module path in the base model.
        rank: Rows of ``lora_A`` in this module.
        where: What the user called the adapter.

    Returns:
        The scaling, as a Python float.

    Raises:
        AdapterError: No alpha, a value of the wrong type, a pattern that is no regular
            expression, or a rank that differs from the config's.
    """
    stated = _lookup(config, "rank_pattern", "r", module, where)
    if stated is None:
        stated = rank
    _check_type(where, f"rank of module {module!r}", stated, *_RESOLVED["r"])
    if stated != rank:
        raise AdapterError(
            f"adapter {where!r}, module {module!r}: lora_A has rank {rank} but {CONFIG_NAME} "
            f"says {stated} (r or rank_pattern), so the scaling is ambiguous. "
            "Correct r or rank_pattern to what the adapter was trained with."
        )
    alpha = _lookup(config, "alpha_pattern", "lora_alpha", module, where)
    if alpha is None:
        raise AdapterError(
            f"adapter {where!r}: no lora_alpha in {CONFIG_NAME}, so the scaling is unknown. "
            "Add it, or pass --alpha."
        )
    _check_type(where, f"alpha of module {module!r}", alpha, *_RESOLVED["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _check_init(config: Mapping[str, Any], where: str) -> None:
    value = config.get("init_lora_weights")
    if value is None or isinstance(value, bool):
        return
    name = str(value).lower()
    if name in _PLAIN_INITS:
        return
    if name.startswith(_CONVERTIBLE_INITS):
        _refuse(
            where,
            "init_lora_weights",
            value,
            "this initialisation changed the base weights, so the file is not the whole update",
            "Convert it to plain LoRA with PEFT: model.save_pretrained(OUT, "
            "path_initial_model_for_weight_conversion=FOLDER_OF_THE_UNTRAINED_ADAPTER)",
        )
    if name == "loftq":
        _refuse(
            where,
            "init_lora_weights",
            value,
            "LoftQ changed the base weights, and PEFT has no conversion from it",
            "Merge adapters trained on the unchanged base model",
        )
    _refuse(
        where,
        "init_lora_weights",
        value,
        "gam-merge does not know this initialisation, and it may have changed the base weights",
        "Leave the adapter out, or convert it to plain LoRA",
    )


def _check_type(
    where: str, key: str, value: Any, valid: Callable[[Any], bool], expected: str
) -> None:
    if not valid(value):
        raise AdapterError(
            f"adapter {where!r}: got {key}={_short(value)} in {CONFIG_NAME}, "
            f"expected {expected}. Correct it there."
        )


def _refuse(where: str, key: str, value: Any, why: str, remedy: str) -> NoReturn:
    raise AdapterError(
        f"adapter {where!r}: {key}={_short(value)} in {CONFIG_NAME}: {why}. {remedy}."
    )


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _lookup(config: Mapping[str, Any], table: str, default: str, module: str, where: str) -> Any:
    """Return the entry of a pattern table for a module by PEFT's rule, else the default."""
    patterns = config.get(table) or {}
    for pattern, value in patterns.items():
        if _compile(pattern, table, where).match(module):
            return value
    # PEFT then looks for the path itself, which finds keys that do not match themselves.
    return patterns.get(module, config.get(default))


@functools.lru_cache(maxsize=65536)
def _compile(pattern: str, table: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"adapter {where!r}: {table} key {pattern!r} in {CONFIG_NAME} is no regular "
            f"expression ({error}). Correct it there."
        ) from None

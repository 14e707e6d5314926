"""Where the scaling of each module of a PEFT adapter comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gam.errors import AdapterError
from gam.formats.peft_config import CONFIG_NAME, check_config, parse_object, resolve_scaling
from gam.formats.scaling import agreed, alpha_numbers

_PACKED = "lora_adapter_metadata"  # a config as diffusers puts it into a file
_SINGLE = ("lora_alpha", "alpha", "ss_network_alpha")


class Scalings:
    """The scalings of one adapter.

    From its config, where there is one; else from alpha tensors, else from the metadata of
    its file, else from the caller's alpha. Alpha tensors must agree with a config.

    Attributes:
        config: What became of ``adapter_config.json``; for a bare file, what its metadata
            or the caller states for the whole adapter.
        used_given_alpha: Whether the caller's alpha decided any module, so far.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None,
        metadata: Mapping[str, str],
        alphas: Mapping[str, torch.Tensor],
        alpha: float | None,
        where: str,
    ) -> None:
        """Take what a file and the caller state; see `gam.formats.base.Format.read`."""
        self._where = where
        self._alphas = alpha_numbers(alphas, where)
        self._has_config = config is not None
        # Component of a pipeline ("" for the whole) -> config.
        components = {"": config} if config is not None else _metadata_configs(metadata, where)
        whole = components.get("", {})
        self._given = alpha is not None and "lora_alpha" not in whole
        if self._given:
            components[""] = {**whole, "lora_alpha": alpha}
        self._components = components
        self.config: Mapping[str, Any] = components.get("", {})
        self.used_given_alpha = False

    def resolve(self, module: str, rank: int) -> float:
        """Return the scaling of one module, a finite float.

        Raises:
            AdapterError: Nothing states it, or two that do differ.
        """
        from_alpha = self._alphas[module] / rank if module in self._alphas else None
        if from_alpha is not None and not self._has_config:
            return from_alpha
        return agreed(from_alpha, self._stated(module, rank), CONFIG_NAME, module, self._where)

    def _stated(self, module: str, rank: int) -> float | None:
        matching = (p for p in self._components if not p or module.startswith(f"{p}."))
        prefix = max(matching, key=len, default=None)
        if prefix is None:
            return None
        if not prefix and self._given:
            self.used_given_alpha = True
        inner = module.removeprefix(f"{prefix}.") if prefix else module
        return resolve_scaling(self._components[prefix], inner, rank, self._where)


def _metadata_configs(metadata: Mapping[str, str], where: str) -> dict[str, Mapping[str, Any]]:
    """Return the configs in a file's header by component; empty if it states no scaling."""
    if _PACKED in metadata:
        configs: dict[str, dict[str, Any]] = {}
        for key, value in parse_object(metadata[_PACKED], _PACKED, where).items():
            component, _, name = key.rpartition(".")
            configs.setdefault(component, {})[name] = value
        for config in configs.values():
            check_config(config, where)
        return dict(configs)
    for key in _SINGLE:
        if key in metadata:
            return {"": {"lora_alpha": _number(key, metadata[key], where)}}
    return {}


def _number(key: str, text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise AdapterError(
            f"adapter {where!r}: {key}={text!r} in the file's metadata, expected a number. "
            f"Put an {CONFIG_NAME} beside the file."
        )
    return number

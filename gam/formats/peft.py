"""PEFT's adapters: what their tensors are called, and what each of them is."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gam.adapter import MATRIX, Facts, LowRank
from gam.errors import AdapterError, OutputError
from gam.formats import foreign
from gam.formats.base import Contents, Format
from gam.formats.checks import check_shapes, check_update
from gam.formats.peft_config import CONFIG_NAME, facts_of
from gam.formats.peft_output import output_config
from gam.formats.peft_scaling import Scalings

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
FILES = frozenset({WEIGHTS_NAME, PICKLE_NAME, CONFIG_NAME})
"""What an adapter's folder may hold."""

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")


class _Factor(NamedTuple):
    name: str
    tensor: torch.Tensor


class _Peft:
    """The format that `save_pretrained` writes, with or without PEFT's prefix."""

    def recognizes(
        self,
        names: Collection[str],
        config: Mapping[str, Any] | None,
        metadata: Mapping[str, str],
    ) -> bool:
        return config is not None or any(_FACTOR.fullmatch(_plain(name)) for name in names)

    def read(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None,
        metadata: Mapping[str, str],
        *,
        alpha: float | None,
        where: str,
    ) -> Contents:
        factors, alphas = _sorted(tensors, where)
        scalings = Scalings(config, metadata, alphas, alpha, where)
        modules = {
            module: _update(module, sides, scalings, where)
            for module, sides in sorted(factors.items())
        }
        return Contents(modules, scalings.config, scalings.used_given_alpha)

    def facts(self, config: Mapping[str, Any]) -> Facts:
        return facts_of(config)

    def tensors(self, modules: Mapping[str, LowRank], where: str) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, module in sorted(modules.items()):
            if module.layout != MATRIX:
                raise OutputError(
                    f"adapter {where!r}, module {name!r}: an update of the kind "
                    f"{module.layout.name!r} has no place in PEFT's format. Leave the module out."
                )
            folded = module.folded()
            if folded is not module and not bool(torch.isfinite(folded.lora_b).all()):
                dtype = str(module.lora_b.dtype).removeprefix("torch.")
                raise OutputError(
                    f"adapter {where!r}, module {name!r}: scaling {module.scale:g} takes lora_B "
                    f"out of the range of {dtype}. Write it in float32 or bfloat16."
                )
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = folded.lora_a
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = folded.lora_b
        return tensors

    def config(
        self, ranks: Mapping[str, int], inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        return output_config(ranks, inputs)

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}


PEFT: Format = _Peft()


def _plain(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _sorted(
    tensors: Mapping[str, torch.Tensor], where: str
) -> tuple[dict[str, dict[str, _Factor]], dict[str, torch.Tensor]]:
    """Return module -> side -> factor, and module -> alpha; refuse all else."""
    factors: dict[str, dict[str, _Factor]] = {}
    alphas: dict[str, torch.Tensor] = {}
    adapters = set()
    others = []
    for name, tensor in tensors.items():
        if found := _FACTOR.fullmatch(_plain(name)):
            sides = factors.setdefault(found["module"], {})
            if found["side"] in sides:
                raise AdapterError(
                    f"adapter {where!r}: tensors {sides[found['side']].name!r} and {name!r} are "
                    f"both lora_{found['side']} of one module. Save one adapter per file."
                )
            sides[found["side"]] = _Factor(name, tensor)
            adapters.add(found["adapter"])
        elif found := _ALPHA.fullmatch(_plain(name)):
            alphas[found["module"]] = tensor
        else:
            others.append(name)
    others += [f"{module}.alpha" for module in sorted(alphas.keys() - factors.keys())]
    if others or not factors:
        raise AdapterError(f"adapter {where!r}: {foreign.describe(others)}")
    if len(adapters) > 1:
        listed = ", ".join(sorted(map(repr, adapters)))
        raise AdapterError(
            f"adapter {where!r}: the file holds several adapters ({listed}). "
            "Save one adapter per file."
        )
    return factors, alphas


def _update(module: str, sides: Mapping[str, _Factor], scalings: Scalings, where: str) -> LowRank:
    what = f"adapter {where!r}, module {module!r}"
    if "base_layer" in module.split("."):
        raise AdapterError(
            f"{what}: LoRA on several parameters of one module (target_parameters) is not "
            "supported yet. Leave this adapter out."
        )
    for side in "AB":
        if side not in sides:
            other = "lora_B" if side == "A" else "lora_A"
            raise AdapterError(f"{what}: {other} without lora_{side}. Save the adapter again.")
    lora_a, lora_b = sides["A"].tensor, sides["B"].tensor
    check_shapes(lora_a, lora_b, what)  # a scaling needs a rank
    return check_update(LowRank(lora_a, lora_b, scalings.resolve(module, lora_a.shape[0])), what)

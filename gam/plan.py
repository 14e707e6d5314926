"""Read and check everything that a merge needs, before anything is computed."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any

import torch

from gam import strategies
from gam.adapter import Adapter
from gam.errors import AdapterError, OptionError
from gam.read import check_modules, default_name, read_adapter
from gam.strategies.base import Strategy
from gam.threads import run

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class PlannedModule:
    """One module of a planned merge.

    Attributes:
        name: Module path.
        shape: (out, in).
        ranks: Adapter label to rank; adapters that lack the module are absent.
        rank: Output rank, before `uniform_rank`; None where the energy decides.
    """

    name: str
    shape: tuple[int, int]
    ranks: Mapping[str, int]
    rank: int | None


@dataclass(frozen=True)
class Plan:
    """A merge whose inputs and options have all been checked.

    Attributes:
        adapters: The inputs, with unique labels; those of weight 0 are left out.
        weights: One per adapter, their absolute values summing to one.
        gain: Factor on the merged update: ``scale``, times the sum of the absolute weights
            as given where they are not normalised.
        strategy: The method.
        params: Its parameters.
        options: Every option in force, for the record.
        modules: Sorted by name.
        dtype: Output dtype.
    """

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    gain: float
    strategy: Strategy
    params: Mapping[str, Any]
    options: Mapping[str, Any]
    modules: Sequence[PlannedModule]
    dtype: torch.dtype

    @property
    def applied(self) -> list[float]:
        """The weights as they act on the updates, ``scale`` apart."""
        factor = self.gain / self.options["scale"]
        return [weight * factor for weight in self.weights]

    @property
    def output_bytes(self) -> int | None:
        """Size of the merged tensors; None where the energy decides the ranks."""
        ranks = [module.rank for module in self.modules if module.rank is not None]
        if len(ranks) < len(self.modules):
            return None
        if self.options["uniform_rank"]:
            ranks = [max(ranks)] * len(ranks)
        columns = [r * sum(m.shape) for r, m in zip(ranks, self.modules, strict=True)]
        return sum(columns) * self.dtype.itemsize


def plan_merge(
    adapters: Sequence[str | PathLike[str] | Adapter],
    *,
    method: str = "gam",
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    rank: int | str = "max",
    uniform_rank: bool = False,
    missing: str = "zero",
    dtype: str = "auto",
    alpha: float | None = None,
    allow_pickle: bool = False,
    allow_base_mismatch: bool = False,
    **params: Any,
) -> Plan:
    """Read and check everything a merge needs; compute nothing.

    Args:
        adapters: Paths of adapter folders or `.safetensors` files, or adapters in memory.
        method: Name of the strategy.
        weights: One per adapter, any sign; 0 leaves an adapter out. None: equal.
        normalize: Divide the weights by the sum of their absolute values.
        scale: Factor on the merged update.
        rank: Output rank of each module: a number, "max" (the largest input rank), "sum",
            or "energy=0.99" (the smallest that keeps this share of the squared norm).
        uniform_rank: Pad every module with zeros to the largest rank.
        missing: A module that an adapter lacks counts as an update of "zero", or the
            weights are made to sum to one over the others ("renormalize").
        dtype: Of the output: float32, bfloat16, float16, or auto, the widest of the inputs.
        alpha: LoRA alpha of files that do not state one.
        allow_pickle: Read `.bin` files (weights only).
        allow_base_mismatch: Merge adapters that name different base models.
        **params: Parameters of the strategy.

    Returns:
        The plan.

    Raises:
        OptionError: An option is refused.
        AdapterError: An adapter is refused.
    """
    strategy = strategies.get(method)
    strategy.load()  # what is broken shows before anything is read
    if isinstance(adapters, (str, PathLike, Adapter)):
        raise OptionError(f"adapters: got one, {adapters!r}; give a list of adapters")
    adapters = list(adapters)
    if not adapters:
        raise OptionError("adapters: got none; give at least one to merge")
    flags = {
        "normalize": normalize,
        "uniform_rank": uniform_rank,
        "allow_pickle": allow_pickle,
        "allow_base_mismatch": allow_base_mismatch,
    }
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise OptionError(f"{name}: got {value!r}, expected True or False")
    used = _check_weights(weights, len(adapters))
    rank_rule = _check_rank(rank)
    if missing not in ("zero", "renormalize"):
        raise OptionError(f"missing: got {missing!r}, expected 'zero' or 'renormalize'")
    if dtype != "auto" and dtype not in _DTYPES:
        raise OptionError(f"dtype: got {dtype!r}, expected auto, {', '.join(_DTYPES)}")
    if _number(scale) in (None, 0):
        raise OptionError(f"scale: got {scale!r}, expected a finite number other than 0")
    scale = float(scale)
    if alpha is not None and _number(alpha) is None:
        raise OptionError(f"alpha: got {alpha!r}, expected a finite number")

    labels = _labels(adapters)
    checked = strategy.check(params, labels)
    absent = [label for label, weight in zip(labels, used, strict=True) if weight == 0]
    for name, value in checked.items():
        if value in absent and value is not None:
            raise OptionError(f"{name}: adapter {value!r} has weight 0, so it takes no part")
    loaded = list(run(partial(_open, alpha, allow_pickle), adapters, labels))
    if alpha is not None and not any(a.source and a.source.alpha is not None for a in loaded):
        raise OptionError("alpha: every adapter states its own alpha; leave --alpha out")
    if not allow_base_mismatch:
        _check_bases(loaded)
    modules = _plan_modules(loaded, used, rank_rule)
    total = sum(abs(weight) for weight in used)
    present = [(a, w / total) for a, w in zip(loaded, used, strict=True) if w != 0]
    options = {
        "method": method,
        "weights": list(used),
        "normalize": normalize,
        "scale": scale,
        "rank": rank,
        "uniform_rank": uniform_rank,
        "missing": missing,
        "dtype": dtype,
        "alpha": alpha,
        "allow_pickle": allow_pickle,
        "allow_base_mismatch": allow_base_mismatch,
        **checked,
    }
    return Plan(
        adapters=[adapter for adapter, _ in present],
        weights=[weight for _, weight in present],
        gain=scale if normalize else scale * total,
        strategy=strategy,
        params=checked,
        options=options,
        modules=modules,
        dtype=_output_dtype(loaded) if dtype == "auto" else _DTYPES[dtype],
    )


def _labels(adapters: Sequence[Any]) -> list[str]:
    """Return a short unique label for each adapter."""
    names = [a.name if isinstance(a, Adapter) else default_name(a) for a in adapters]
    labels: list[str] = []
    for name in names:
        # Count on from 1 past every label and every name that is there already.
        free = (f"{name}#{count}" for count in itertools.count(1))
        taken = {*labels, *names}
        labels.append(next(f for f in free if f not in taken) if names.count(name) > 1 else name)
    return labels


def _open(
    alpha: float | None, allow_pickle: bool, adapter: str | PathLike[str] | Adapter, label: str
) -> Adapter:
    if isinstance(adapter, Adapter):
        return replace(adapter, name=label, modules=check_modules(adapter.modules, label))
    return read_adapter(adapter, alpha=alpha, allow_pickle=allow_pickle, name=label)


def _number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else."""
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    try:
        if isinstance(weights, str):
            raise TypeError
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError, OverflowError):
        raise OptionError(
            f"weights: got {weights!r}, expected one number for each adapter"
        ) from None
    if len(numbers) != count:
        raise OptionError(
            f"weights: got {len(numbers)} for {count} adapters; give one number for each"
        )
    if not math.isfinite(sum(abs(number) for number in numbers)):
        raise OptionError(f"weights: got {numbers}, expected finite numbers with a finite sum")
    if not any(numbers):
        raise OptionError("weights: all are 0, so there is nothing to merge")
    return numbers


def _check_rank(rank: int | str) -> int | str | float:
    """Return a whole number, "max" or "sum", or the energy as a float."""
    if rank in ("max", "sum"):
        return rank
    try:
        if isinstance(rank, str) and rank.startswith("energy="):
            energy = float(rank.removeprefix("energy="))
            if 0 < energy <= 1:
                return energy
        elif not isinstance(rank, bool) and int(rank) == float(rank) and int(rank) > 0:
            return int(rank)
    except (TypeError, ValueError, OverflowError):
        pass
    raise OptionError(
        f"rank: got {rank!r}, expected a whole number above 0, 'max', 'sum' or "
        "'energy=X' with X above 0 and at most 1, such as energy=0.99"
    )


def _check_bases(adapters: Sequence[Adapter]) -> None:
    for key, what in (("base_model_name_or_path", "base model"), ("revision", "base revision")):
        named = [(a.name, a.config[key]) for a in adapters if a.config.get(key)]
        for name, base in named[1:]:
            if str(base).rstrip("/") != str(named[0][1]).rstrip("/"):
                raise AdapterError(
                    f"{what}: {named[0][0]!r} was trained on {named[0][1]!r} but {name!r} on "
                    f"{base!r}; updates of different models do not add up. "
                    "If the two are the same weights, pass --allow-base-mismatch"
                )


def _plan_modules(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rank: int | str | float,
) -> list[PlannedModule]:
    holders: dict[str, list[tuple[Adapter, float]]] = defaultdict(list)
    for adapter, weight in zip(adapters, weights, strict=True):
        for name in adapter.modules:
            holders[name].append((adapter, weight))
    planned = []
    for name in sorted(holders):
        first = holders[name][0][0]
        shape = first.modules[name].shape
        for adapter, _ in holders[name][1:]:
            other = adapter.modules[name].shape
            if other != shape:
                raise AdapterError(
                    f"module {name!r}: update of shape {list(shape)} in {first.name!r} but "
                    f"{list(other)} in {adapter.name!r}; the adapters were trained on "
                    "different models and cannot be merged"
                )
        ranks = {a.name: a.modules[name].rank for a, weight in holders[name] if weight != 0}
        if not ranks:
            continue
        rule = {"max": max(ranks.values()), "sum": sum(ranks.values())}
        chosen = None if isinstance(rank, float) else rule.get(str(rank), rank)
        planned.append(PlannedModule(name, shape, ranks, chosen))  # type: ignore[arg-type]
    if not planned:
        raise OptionError("weights: every adapter that holds a module has weight 0")
    most = max(max(*m.shape, sum(m.ranks.values())) for m in planned)
    if isinstance(rank, int) and rank > most:
        raise OptionError(f"rank: got {rank}, more than any module can use; at most {most}")
    return planned


def _output_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """Return the dtype that holds all inputs, at most float32."""
    widest = None
    for adapter in adapters:
        for module in adapter.modules.values():
            for dtype in (module.lora_a.dtype, module.lora_b.dtype):
                widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return torch.float32 if widest in (None, torch.float64) else widest

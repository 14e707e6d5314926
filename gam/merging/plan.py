"""Read and check everything that a merge needs, before anything is computed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from gam import strategies
from gam.adapter import Adapter, Facts
from gam.algebra.calibrate import CALIBRATIONS
from gam.errors import AdapterError, OptionError
from gam.formats.peft_config import CONFIG_NAME
from gam.hub.names import Place
from gam.load import Settled, find, known_facts, label_of, open_adapter, settle_all
from gam.merging.devices import choose_device, natural_device
from gam.merging.rules import Rule, Settings, is_number, make_rules, record, resolve
from gam.merging.threads import run
from gam.strategies.base import Strategy

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

Given: TypeAlias = Place | Adapter
"""What an adapter may be given as."""

Weights: TypeAlias = Sequence[float | Sequence[float]] | Mapping[str, float | Sequence[float]]
"""One number for each adapter, or a gradient over the layers."""


@dataclass(frozen=True)
class PlannedModule:
    """One module of a planned merge.

    Attributes:
        name: Module path.
        shape: (out, in).
        ranks: Adapter label to rank; adapters that lack the module are absent.
        rank: Output rank, before `uniform_rank`; None where the energy decides.
        settings: How it is merged; one object for all modules that are merged alike.
    """

    name: str
    shape: tuple[int, int]
    ranks: Mapping[str, int]
    rank: int | None
    settings: Settings


@dataclass(frozen=True)
class Plan:
    """A merge whose inputs and options have all been checked.

    Attributes:
        adapters: The inputs, with unique labels; those of weight 0 are left out.
        strategy: The method, where a module's settings name no other.
        options: Every option in force, for the record.
        modules: Sorted by name.
        skipped: Names of modules that are left out: skipped, or held only by adapters whose
            weight is 0 there.
        dtype: Output dtype.
        device: Where it is computed.
        backend: Of the operations of `gam_kernels`.
    """

    adapters: Sequence[Adapter]
    strategy: Strategy
    options: Mapping[str, Any]
    modules: Sequence[PlannedModule]
    skipped: Sequence[str]
    dtype: torch.dtype
    device: torch.device
    backend: str = "auto"

    @property
    def applied(self) -> list[float | None]:
        """The weights as they act on the updates, ``scale`` apart; None where modules differ."""
        alike = {id(module.settings): module.settings for module in self.modules}.values()
        found = []
        for adapter in self.adapters:
            used = {s.weights.get(adapter.name, 0.0) * (s.gain / s.scale) for s in alike}
            found.append(used.pop() if len(used) == 1 else None)
        return found

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
    adapters: Sequence[Given] | Mapping[str, Given],
    *,
    method: str = "gam",
    weights: Weights | None = None,
    normalize: bool | None = None,
    scale: float | Sequence[float] = 1.0,
    rank: int | str | Sequence[int] | None = None,
    uniform_rank: bool = False,
    missing: str = "zero",
    calibrate: str = "none",
    dtype: str = "auto",
    device: str = "auto",
    alpha: float | None = None,
    allow_pickle: bool = False,
    allow_base_mismatch: bool = False,
    modules: Mapping[str, Mapping[str, Any]] | None = None,
    expect: Mapping[str, Sequence[str | None]] | None = None,
    **params: Any,
) -> Plan:
    """Read and check everything a merge needs; compute nothing.

    Args:
        adapters: Paths of adapter folders or `.safetensors` files, names on the Hub
            (``user/name[@revision][:folder]``), or adapters in memory; in a mapping, by the
            labels that they are to have.
        method: Name of the strategy.
        weights: One per adapter, in order or by label, any sign; 0 leaves an adapter out.
            None: equal.
        normalize: Divide the weights by the sum of their absolute values. None: unless the
            method adds updates up, as its `Strategy` says.
        scale: Factor on the merged update.
        rank: Output rank of each module: a number, "max" (the largest input rank), "sum",
            or "energy=0.99" (the smallest that keeps this share of the squared norm).
            None: "max", or what the `Strategy` of the method says.
        uniform_rank: Pad every module with zeros to the largest rank.
        missing: A module that an adapter lacks counts as an update of "zero", or the
            weights are made to sum to one over the others ("renormalize").
        calibrate: A step before the method: "none", or "pico", which makes output directions
            that many adapters use shorter and the result as large as its inputs on average.
        dtype: Of the output: float32, bfloat16, float16, or auto, the widest of the inputs.
        device: Where to compute: cpu, cuda, cuda:N, or auto, the CUDA device that all adapters
            are on already, else the CPU. The merged factors are on the CPU, unless all
            adapters were on that device.
        alpha: LoRA alpha of files that do not state one.
        allow_pickle: Read `.bin` files (weights only).
        allow_base_mismatch: Merge adapters that name different base models.
        modules: Glob over module paths to options for the modules that it matches:
            ``method``, ``weights`` (those that are not named stay), ``scale``, ``rank``,
            ``skip``, parameters of the methods. Of several globs that match, the last one
            wins, option by option. Here and above, a list in place of a number (not of
            ``weights`` as a whole) is a gradient over the layers: see `gam.merging.rules`.
        expect: Label to the SHA-256 of the weights file and of the config that must be read.
        **params: Parameters of the strategy.

    Returns:
        The plan.

    Raises:
        OptionError: An option is refused.
        AdapterError: An adapter is refused.
    """
    strategy = strategies.get(method)
    strategy.load()  # what is broken shows before anything is read
    settled = settle_all(adapters)
    labels = list(settled) if isinstance(settled, Mapping) else None
    places = list(settled.values() if isinstance(settled, Mapping) else settled)
    if not places:
        raise OptionError("adapters: got none; give at least one to merge")
    for label in labels or []:
        check_label(label)
    flags = {
        "normalize": False if normalize is None else normalize,
        "uniform_rank": uniform_rank,
        "allow_pickle": allow_pickle,
        "allow_base_mismatch": allow_base_mismatch,
    }
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise OptionError(f"{name}: got {value!r}, expected True or False", name)
    if calibrate not in CALIBRATIONS:
        listed = " or ".join(map(repr, CALIBRATIONS))
        raise OptionError(f"calibrate: got {calibrate!r}, expected {listed}", "calibrate")
    if missing not in ("zero", "renormalize"):
        raise OptionError(f"missing: got {missing!r}, expected 'zero' or 'renormalize'", "missing")
    if dtype not in ["auto", *_DTYPES]:
        raise OptionError(f"dtype: got {dtype!r}, expected auto, {', '.join(_DTYPES)}", "dtype")
    if alpha is not None and not is_number(alpha):
        raise OptionError(f"alpha: got {alpha!r}, expected a finite number", "alpha")

    wanted = choose_device(device)
    labels = _labels(places) if labels is None else labels
    own = {
        "method": method,
        "weights": [1.0] * len(places) if weights is None else weights,
        "scale": scale,
        "rank": rank,
        **params,
    }
    rules = make_rules(own, modules or {}, labels)
    absent = [label for label in labels if not any(rule.takes(label) for rule in rules)]
    # What is on the Hub is checked as far as its configs go before weights are downloaded.
    found = list(run(partial(find, allow_pickle=allow_pickle), places))
    if not allow_base_mismatch:
        _check_bases(labels, [known_facts(adapter) for adapter in found])
    read = partial(open_adapter, alpha=alpha, allow_pickle=allow_pickle)
    loaded = list(run(read, found, labels))
    chosen = wanted or natural_device(loaded)
    _check_unchanged(loaded, expect or {})
    if alpha is not None and not any(a.source and a.source.alpha is not None for a in loaded):
        raise OptionError("alpha: every adapter states its own alpha; leave --alpha out", "alpha")
    if not allow_base_mismatch:
        _check_bases(labels, [adapter.facts for adapter in loaded])
    shapes = _shapes(loaded)
    present = [adapter for adapter in loaded if adapter.name not in absent]
    names = sorted({name for adapter in present for name in adapter.modules})
    settings = resolve(rules, names, labels, absent, normalize)
    planned = _plan_modules(present, shapes, settings)
    _check_ranks(rules, planned)
    options = {
        "method": method,
        "weights": None,
        "normalize": normalize,
        "scale": scale,
        "rank": rank,
        "uniform_rank": uniform_rank,
        "missing": missing,
        "calibrate": calibrate,
        "dtype": dtype,
        "device": device,
        "alpha": alpha,
        "allow_pickle": allow_pickle,
        "allow_base_mismatch": allow_base_mismatch,
        **record(rules, labels, absent, settings.values()),
    }
    return Plan(
        adapters=present,
        strategy=strategy,
        options=options,
        modules=planned,
        skipped=sorted({*names} - {module.name for module in planned}),
        dtype=_output_dtype(present) if dtype == "auto" else _DTYPES[dtype],
        device=chosen,
    )


def check_label(label: Any, where: str = "") -> None:
    """Refuse a label of an adapter that is blank, or no text at all.

    Raises:
        OptionError: It is; the message starts with ``where``.
    """
    if not isinstance(label, str) or not label.strip():
        raise OptionError(f"{where}adapters: got {label!r} as a label, expected a name")


def _labels(places: Sequence[Settled]) -> list[str]:
    """Return a short unique label for each adapter."""
    names = [label_of(place) for place in places]
    labels: list[str] = []
    for name in names:
        # Count on from 1 past every label and every name that is there already.
        free = (f"{name}#{count}" for count in itertools.count(1))
        taken = {*labels, *names}
        labels.append(next(f for f in free if f not in taken) if names.count(name) > 1 else name)
    return labels


def _check_unchanged(
    adapters: Sequence[Adapter], expect: Mapping[str, Sequence[str | None]]
) -> None:
    changed = []
    for adapter in adapters:
        source = adapter.source
        name = source.path.name if source else "the adapter in memory"
        read = (source.sha256, source.config_sha256) if source else (None, None)
        recorded = expect.get(adapter.name, (None, None))
        if recorded[0] is None:  # it was in memory
            continue
        for file, have, want in zip((name, CONFIG_NAME), read, recorded, strict=True):
            if have != want:
                digests = (digest[:12] if digest else "none" for digest in (have, want))
                text = "has SHA-256 {}, recorded {}".format(*digests)
                changed.append(f"{adapter.name!r} ({file} {text})")
    if changed:
        raise AdapterError(
            f"changed since the recorded merge: {', '.join(changed)}. Restore what was merged, or "
            "pass --allow-changes to merge what is there now"
        )


def _check_bases(labels: Sequence[str], facts: Sequence[Facts | None]) -> None:
    for key, what in (("base", "base model"), ("revision", "base revision")):
        stated = [(label, getattr(f, key, None)) for label, f in zip(labels, facts, strict=True)]
        named = [(label, base) for label, base in stated if base]
        for label, base in named[1:]:
            if str(base).rstrip("/") != str(named[0][1]).rstrip("/"):
                raise AdapterError(
                    f"{what}: {named[0][0]!r} was trained on {named[0][1]!r} but {label!r} on "
                    f"{base!r}; updates of different models do not add up. "
                    "If the two are the same weights, pass --allow-base-mismatch"
                )


def _shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Return the shape of every module; refuse different ones."""
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            shape = first.setdefault(name, adapter).modules[name].shape
            if module.shape != shape:
                raise AdapterError(
                    f"module {name!r}: update of shape {list(shape)} in {first[name].name!r} but "
                    f"{list(module.shape)} in {adapter.name!r}; the adapters were trained on "
                    "different models and cannot be merged"
                )
    return {name: adapter.modules[name].shape for name, adapter in first.items()}


def _plan_modules(
    adapters: Sequence[Adapter],
    shapes: Mapping[str, tuple[int, int]],
    settings: Mapping[str, Settings],
) -> list[PlannedModule]:
    planned = []
    for name, chosen in settings.items():
        holders = [a for a in adapters if name in a.modules and a.name in chosen.weights]
        if not holders:
            continue
        ranks = {adapter.name: adapter.modules[name].rank for adapter in holders}
        rule = {"max": max(ranks.values()), "sum": sum(ranks.values())}
        rank = None if isinstance(chosen.rank, float) else rule.get(str(chosen.rank), chosen.rank)
        planned.append(PlannedModule(name, shapes[name], ranks, rank, chosen))  # type: ignore[arg-type]
    if not planned:
        raise OptionError("weights: every adapter that holds a module has weight 0", "weights")
    return planned


def _check_ranks(rules: Sequence[Rule], modules: Sequence[PlannedModule]) -> None:
    most = max(max(*m.shape, sum(m.ranks.values())) for m in modules)
    for rule in rules:
        rank = rule.values.get(("rank",), 0)
        for number in rank if isinstance(rank, tuple) else [rank]:
            if isinstance(number, int) and number > most:
                with rule.located("rank"):
                    raise OptionError(
                        f"rank: got {number}, more than any module can use; at most {most}"
                    )


def _output_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """Return the dtype that holds all inputs, at most float32."""
    widest = None
    for adapter in adapters:
        for module in adapter.modules.values():
            for dtype in (module.lora_a.dtype, module.lora_b.dtype):
                widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return torch.float32 if widest in (None, torch.float64) else widest

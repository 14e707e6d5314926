"""Read and check everything that a merge needs, before anything is computed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from gam import strategies
from gam.adapter import Adapter, Facts, Layout
from gam.errors import AdapterError, OptionError
from gam.formats.peft_config import CONFIG_NAME
from gam.hub.names import Place
from gam.load import Settled, find, known_facts, label_of, open_adapter, settle_all
from gam.merging.devices import choose_device, natural_device
from gam.merging.options import MODULE_OPTIONS, MergeOptions, documented
from gam.merging.rules import Rule, make_rules, record
from gam.merging.settings import Settings, settle
from gam.merging.threads import run
from gam.strategies.base import Strategy

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

Given: TypeAlias = Place | Adapter
"""What an adapter may be given as."""


@dataclass(frozen=True)
class PlannedModule:
    """One module of a planned merge.

    Attributes:
        name: Module path.
        shape: (out, in).
        layout: How its matrices lie in a file.
        ranks: Adapter label to rank; adapters that lack the module are absent.
        rank: Output rank, before `uniform_rank`; None where the energy decides.
        settings: How it is merged; one object for all modules that are merged alike.
    """

    name: str
    shape: tuple[int, int]
    layout: Layout
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
    def dtype_name(self) -> str:
        """The output dtype, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def as_dict(self) -> dict[str, Any]:
        """Return the plan in plain Python types."""
        return {
            "method": self.strategy.name,
            "options": dict(self.options),
            "dtype": self.dtype_name,
            "output_bytes": self.output_bytes,
            "inputs": [
                {**vars(adapter.describe()), "weight": weight}
                for adapter, weight in zip(self.adapters, self.applied, strict=True)
            ],
            "modules": [
                {
                    "name": module.name,
                    "shape": list(module.shape),
                    "ranks": dict(module.ranks),
                    "rank": module.rank,
                    "settings": module.settings.differences(self.options),
                }
                for module in self.modules
            ],
            "skipped": list(self.skipped),
        }

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


@documented
def plan_merge(
    adapters: Sequence[Given] | Mapping[str, Given],
    *,
    expect: Mapping[str, Sequence[str | None]] | None = None,
    **options: Any,
) -> Plan:
    """Read and check everything a merge needs; compute nothing.

    Args:
        adapters: Paths of adapter folders or `.safetensors` files, names on the Hub
            (``user/name[@revision][:folder]``), or adapters in memory; in a mapping, by the
            labels that they are to have.
        expect: Label to the SHA-256 of the weights file and of the config that must be read.
        **options: Those of `MergeOptions`, and parameters of the methods.

    Returns:
        The plan.

    Raises:
        OptionError: An option is refused.
        AdapterError: An adapter is refused.
    """
    strategies.get(options.get("method", "gam")).load()  # what is broken shows first
    chosen = MergeOptions.of(**options)
    places, labels = _labelled(adapters)
    wanted = choose_device(chosen.device)
    own = {name: getattr(chosen, name) for name in MODULE_OPTIONS if name != "skip"}
    own["weights"] = [1.0] * len(places) if chosen.weights is None else chosen.weights
    rules = make_rules({**own, **chosen.params}, chosen.modules, labels)
    absent = [label for label in labels if not any(rule.takes(label) for rule in rules)]
    loaded = _load(places, labels, chosen, expect or {})
    _check_shapes(loaded)
    present = [adapter for adapter in loaded if adapter.name not in absent]
    names = sorted({name for adapter in present for name in adapter.modules})
    settings = settle(rules, names, labels, absent, chosen)
    planned = _plan_modules(present, settings)
    _check_ranks(rules, planned)
    used = [module.settings.strategy for module in planned]
    dtype = _output_dtype(present) if chosen.dtype == "auto" else _DTYPES[chosen.dtype]
    return Plan(
        adapters=present,
        strategy=strategies.get(chosen.method),
        options={**chosen.record(), **record(rules, labels, absent, used)},
        modules=planned,
        skipped=sorted({*names} - {module.name for module in planned}),
        dtype=dtype,
        device=wanted or natural_device(loaded),
    )


def _labelled(
    adapters: Sequence[Given] | Mapping[str, Given],
) -> tuple[list[Settled], list[str]]:
    """Return the adapters, settled, and a unique label for each."""
    settled = settle_all(adapters)
    places = list(settled.values() if isinstance(settled, Mapping) else settled)
    if not places:
        raise OptionError("adapters: got none, expected at least one to merge.")
    if not isinstance(settled, Mapping):
        return places, _labels(places)
    for label in settled:
        check_label(label)
    return places, list(settled)


def _load(
    places: Sequence[Settled],
    labels: Sequence[str],
    options: MergeOptions,
    expect: Mapping[str, Sequence[str | None]],
) -> list[Adapter]:
    """Return the adapters, read and checked; a change since a recorded merge shows first.

    What is on the Hub is checked as far as its configs go before weights are downloaded.
    """
    found = list(run(partial(find, allow_pickle=options.allow_pickle), places))
    if not options.allow_base_mismatch:
        known = zip(labels, map(known_facts, found), strict=True)
        _check_bases([(label, facts) for label, facts in known if facts is not None])
    read = partial(open_adapter, alpha=options.alpha, allow_pickle=options.allow_pickle)
    loaded = list(run(read, found, labels))
    _check_unchanged(loaded, expect)
    used = any(a.source is not None and a.source.alpha is not None for a in loaded)
    if options.alpha is not None and not used:
        raise OptionError("alpha: every adapter states its own alpha. Leave --alpha out.", "alpha")
    if not options.allow_base_mismatch:
        _check_bases([(adapter.name, adapter.facts) for adapter in loaded])
    return loaded


def check_label(label: Any, where: str = "") -> None:
    """Refuse a label of an adapter that is blank, or no text at all.

    Raises:
        OptionError: It is; the message starts with ``where``.
    """
    if not isinstance(label, str) or not label.strip():
        raise OptionError(f"{where}adapters: got {label!r} as a label, expected a name.")


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
            "pass --allow-changes to merge what is there now."
        )


def _check_bases(known: Sequence[tuple[str, Facts]]) -> None:
    for field, what in (("base", "base model"), ("revision", "base revision")):
        named = [(name, value) for name, facts in known if (value := getattr(facts, field))]
        for name, base in named[1:]:
            if str(base).rstrip("/") != str(named[0][1]).rstrip("/"):
                raise AdapterError(
                    f"{what}: {named[0][0]!r} was trained on {named[0][1]!r} but {name!r} on "
                    f"{base!r}; updates of different models do not add up. "
                    "If the two are the same weights, pass --allow-base-mismatch."
                )


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    """Refuse a module whose shape or layout differs among adapters."""
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            shape = first.setdefault(name, adapter).modules[name].shape
            if module.shape != shape:
                raise AdapterError(
                    f"module {name!r}: update of shape {list(shape)} in {first[name].name!r} but "
                    f"{list(module.shape)} in {adapter.name!r}; the adapters were trained on "
                    "different models and cannot be merged. Leave one of them out."
                )
            layout = first[name].modules[name].layout
            if module.layout != layout:
                raise AdapterError(
                    f"module {name!r}: {layout.name} in {first[name].name!r} but "
                    f"{module.layout.name} in {adapter.name!r}, or of another shape; these are "
                    "different kinds of updates and cannot be merged. Leave one of them out."
                )


def _plan_modules(
    adapters: Sequence[Adapter], settings: Mapping[str, Settings]
) -> list[PlannedModule]:
    planned = []
    for name, chosen in settings.items():
        holders = [a for a in adapters if name in a.modules and a.name in chosen.weights]
        if not holders:
            continue
        ranks = {adapter.name: adapter.modules[name].rank for adapter in holders}
        rule = {"max": max(ranks.values()), "sum": sum(ranks.values())}
        rank = None if isinstance(chosen.rank, float) else rule.get(str(chosen.rank), chosen.rank)
        first = holders[0].modules[name]
        planned.append(
            PlannedModule(name, first.shape, first.layout, ranks, rank, chosen)  # type: ignore[arg-type]
        )
    if not planned:
        raise OptionError(
            "weights: every adapter that holds a module has weight 0. Give one another weight.",
            "weights",
        )
    return planned


def _check_ranks(rules: Sequence[Rule], modules: Sequence[PlannedModule]) -> None:
    most = max(max(*m.shape, sum(m.ranks.values())) for m in modules)
    for rule in rules:
        rank = rule.values.get(("rank",), 0)
        for number in rank if isinstance(rank, tuple) else [rank]:
            if isinstance(number, int) and number > most:
                with rule.located("rank"):
                    raise OptionError(
                        f"rank: got {number}, more than any module can use. Give at most {most}."
                    )


def _output_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """Return the dtype that holds all inputs, at most float32."""
    widest = None
    for adapter in adapters:
        for module in adapter.modules.values():
            for dtype in (module.lora_a.dtype, module.lora_b.dtype):
                widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return torch.float32 if widest in (None, torch.float64) else widest

"""How each module is merged: the rules that match it, put together."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from gam.errors import OptionError
from gam.merging import values
from gam.merging.options import MergeOptions
from gam.merging.rules import Key, Rule, parameters
from gam.strategies.base import Strategy

_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Settings:
    """How a module is merged.

    Attributes:
        strategy: The method.
        params: All of its parameters.
        given: Adapter label to its weight as given, all adapters that take part.
        weights: The same with absolute values that sum to one; weights of 0 left out.
        scale: Factor on the merged update, as given.
        gain: The same in effect: times the sum of the absolute weights as given, where
            they are not normalised and the size is that of the method.
        size: "exact" or "mean".
        rank: Output rank: a number, "max" or "sum"; the energy to keep as a float.
    """

    strategy: Strategy
    params: Mapping[str, Any]
    given: Mapping[str, float]
    weights: Mapping[str, float]
    scale: float
    gain: float
    size: str
    rank: int | str | float

    def differences(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what differs from the options of the run, by the names of the flags."""
        own = {
            "method": self.strategy.name,
            "weights": list(self.given.values()),
            "scale": self.scale,
            "size": self.size,
            "rank": values.rank_text(self.rank),
            **self.params,
        }
        found = {key: value for key, value in own.items() if options.get(key, ...) != value}
        rank = options["rank"]
        if self.rank == (self.strategy.rank if rank is None else values.ranks(rank)):
            found.pop("rank", None)
        if self.size == (options["size"] or _usual_size(self.strategy, options["calibrate"])):
            found.pop("size", None)
        if "weights" in found:
            found["weights"] = dict(self.given)
        if "method" in found and self.strategy.package:
            found["package"] = self.strategy.package
        return found


def settle(
    rules: Sequence[Rule],
    names: Sequence[str],
    labels: Sequence[str],
    absent: Sequence[str],
    options: MergeOptions,
) -> dict[str, Settings]:
    """Return how each module is merged; those that are skipped are left out.

    Modules that the same rules treat alike share one object.

    Args:
        rules: The first one is that of the run and matches everything.
        names: Module paths.
        labels: Of all adapters.
        absent: Labels of adapters that take no part.
        options: Of the run: what no rule holds is taken from there.

    Raises:
        OptionError: A pattern matches nothing, a parameter applies nowhere or is refused by
            its method, or a gradient meets a module without a layer.
    """
    reaches = [_Reach.of(rule, names) for rule in rules]
    graded = any(isinstance(value, tuple) for rule in rules for value in rule.values.values())
    known: dict[Any, Settings | None] = {}
    used: set[tuple[Key, str]] = set()
    found = {}
    for name in names:
        applying = [reach for reach in reaches if name in reach.modules]
        layer = _layer(name) if graded else None
        key = (*(reach.rule.path for reach in applying), layer)
        if key not in known or (graded and layer is None):
            chosen = _Chosen(name, layer, {})
            for reach in applying:
                chosen.values.update({k: (reach, v) for k, v in reach.rule.values.items()})
            strategy = chosen.get("method")
            own = {param.name for param in strategy.params}
            used |= {(r.rule.path, k[0]) for r in applying for k in r.rule.values if k[0] in own}
            known[key] = _settle(chosen, strategy, labels, absent, options)
        settings = known[key]
        if settings is not None:
            found[name] = settings
    _check_used(rules, used, parameters(rules))
    if not found:
        raise OptionError(
            "modules: every module is skipped, so there is nothing to merge. Skip fewer.", "modules"
        )
    return found


def _check_used(
    rules: Sequence[Rule], used: Set[tuple[Key, str]], takers: Mapping[str, Sequence[Strategy]]
) -> None:
    """Refuse a parameter that no module takes."""
    for rule in rules:
        for name, *_ in rule.values:
            if name in takers and (rule.path, name) not in used:
                listed = ", ".join(repr(strategy.name) for strategy in takers[name])
                with rule.located(name):
                    raise OptionError(
                        f"{name}: no module here is merged by a method that takes it ({listed}). "
                        "Leave it out."
                    )


@dataclass(frozen=True)
class _Reach:
    """A rule, the modules that it matches, and the first and the last layer of those."""

    rule: Rule
    modules: frozenset[str]
    span: tuple[int, int]

    @classmethod
    def of(cls, rule: Rule, names: Sequence[str]) -> _Reach:
        modules = frozenset(name for name in names if fnmatchcase(name, rule.pattern))
        if not modules:
            near = difflib.get_close_matches(rule.pattern, names, n=1, cutoff=0)
            with rule.located():
                raise OptionError(f"no module matches; the nearest is {', '.join(near)!r}.")
        layers = [layer for layer in map(_layer, modules) if layer is not None]
        return cls(rule, modules, (min(layers, default=0), max(layers, default=0)))


@dataclass(frozen=True)
class _Chosen:
    """The values that apply to one module, each with where it comes from."""

    name: str
    layer: int | None
    values: dict[Key, tuple[_Reach, Any]]

    def has(self, name: str) -> bool:
        """Tell whether any rule says something of an option."""
        return (name,) in self.values

    def get(self, *key: str) -> Any:
        """Return a value, that of a gradient at the layer of this module."""
        reach, value = self.values[key]
        if not isinstance(value, tuple):
            return value
        if self.layer is None:
            with reach.rule.located(key[0]):
                raise OptionError(
                    f"{key[0]}: a gradient over the layers meets module {self.name!r}, which is "
                    "in no layer. Give that module a number of its own under modules."
                )
        first, last = reach.span
        place = (self.layer - first) / max(last - first, 1) * (len(value) - 1)
        index = min(int(place), len(value) - 2) if len(value) > 1 else 0
        part = place - index
        return (1 - part) * value[index] + part * value[min(index + 1, len(value) - 1)]


def _settle(
    chosen: _Chosen,
    strategy: Strategy,
    labels: Sequence[str],
    absent: Sequence[str],
    options: MergeOptions,
) -> Settings | None:
    """Return the settings of one module; None if it is skipped."""
    if chosen.has("skip") and chosen.get("skip"):
        return None
    given = {label: chosen.get("weights", label) for label in labels if label not in absent}
    total = sum(abs(weight) for weight in given.values())
    if not total:
        reach, _ = chosen.values["weights", labels[0]]
        with reach.rule.located("weights"):
            raise OptionError(
                f"weights: all are 0 in module {chosen.name!r}. Skip it, or give it one."
            )
    rank: Any = chosen.get("rank") if chosen.has("rank") else strategy.rank
    if chosen.has("rank") and isinstance(chosen.values["rank",][1], tuple):
        rank = math.floor(rank + 0.5)
    normalize = strategy.normalize if options.normalize is None else options.normalize
    usual = _usual_size(strategy, options.calibrate)
    size = chosen.get("size") if chosen.has("size") else usual
    scale = chosen.get("scale")
    return Settings(
        strategy=strategy,
        params=_settle_params(chosen, strategy, labels, absent),
        given=given,
        weights={label: weight / total for label, weight in given.items() if weight != 0},
        scale=scale,
        gain=scale if normalize or size == "mean" else scale * total,
        size=size,
        rank=rank,
    )


def _usual_size(strategy: Strategy, calibrate: str) -> str:
    """Return the size where the user does not say: PICO goes with the mean size."""
    return "mean" if calibrate == "pico" else strategy.size


def _settle_params(
    chosen: _Chosen, strategy: Strategy, labels: Sequence[str], absent: Sequence[str]
) -> dict[str, Any]:
    """Return all parameters of the method, as they apply to one module."""
    params = strategy.check({}, labels)
    for param in strategy.params:
        if not chosen.has(param.name):
            continue
        reach, raw = chosen.values[param.name,]
        value = chosen.get(param.name)
        with reach.rule.located(param.name):
            if param.kind == "int" and isinstance(raw, tuple):
                value = math.floor(value + 0.5)
            value = strategy.check({param.name: value}, labels)[param.name]
            if param.kind == "adapter" and value in absent:
                raise OptionError(
                    f"{param.name}: adapter {value!r} has weight 0, so it takes no part. "
                    "Name another one."
                )
        params[param.name] = value
    return params


def _layer(name: str) -> int | None:
    """Return the first number in a module's path, its layer."""
    found = _LAYER.search(name)
    return int(found[0]) if found else None

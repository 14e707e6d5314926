"""What applies to each module: the run's options, refined by pattern and over the layers.

A merge has one `Rule` for all modules, from the run's options, and one more for each entry
of ``modules``. Later rules win, option by option (and adapter by adapter in ``weights``). A
list in place of a number is a gradient: it is spread evenly from the first layer to the last
of the modules that its rule matches, linear in between.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from gam import strategies
from gam.errors import OptionError
from gam.strategies.base import Strategy

MODULE_OPTIONS = ("method", "weights", "scale", "rank", "skip")
"""What may be set for single modules, besides the parameters of the methods."""

_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")

_Key = tuple[str, ...]  # an option by name; ("weights", label) for the weight of one adapter


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
            they are not normalised.
        rank: Output rank: a number, "max" or "sum"; the energy to keep as a float.
    """

    strategy: Strategy
    params: Mapping[str, Any]
    given: Mapping[str, float]
    weights: Mapping[str, float]
    scale: float
    gain: float
    rank: int | str | float

    def differences(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what differs from the options of the run, by the names of the flags."""
        own = {
            "method": self.strategy.name,
            "weights": list(self.given.values()),
            "scale": self.scale,
            "rank": _rank_text(self.rank),
            **self.params,
        }
        found = {key: value for key, value in own.items() if options.get(key, ...) != value}
        rank = options["rank"]
        if self.rank == (self.strategy.rank if rank is None else _check_ranks(rank)):
            found.pop("rank", None)
        if "weights" in found:
            found["weights"] = dict(self.given)
        if "method" in found and self.strategy.package:
            found["package"] = self.strategy.package
        return found


@dataclass(frozen=True)
class Rule:
    """Checked options for the modules that a pattern matches.

    Attributes:
        pattern: Glob over module paths; a star matches any characters, dots included.
        path: Where the options stand: () for the run, else ("modules", pattern).
        values: Option to number, word, gradient (a tuple of numbers) or `Strategy`.
    """

    pattern: str
    path: _Key
    values: Mapping[_Key, Any]

    @classmethod
    def parse(
        cls, options: Mapping[str, Any], labels: Sequence[str], pattern: str | None = None
    ) -> Rule:
        """Check options as a user gives them; None counts as not given.

        Args:
            options: Those of `MODULE_OPTIONS` and parameters of methods. Whether a
                parameter is known and in range depends on the method: see `resolve`.
            labels: Of the adapters.
            pattern: None for the options of the run.

        Raises:
            OptionError: A value is refused.
        """
        rule = cls(pattern or "*", () if pattern is None else ("modules", pattern), {})
        values: dict[_Key, Any] = {}
        for name, value in options.items():
            with rule.located(name):
                if value is None:
                    continue
                if name == "weights":
                    weights = _check_weights(value, labels, complete=pattern is None)
                    values.update({(name, label): weight for label, weight in weights.items()})
                elif name == "method":
                    values[name,] = strategies.get(value)
                elif name == "rank":
                    values[name,] = _check_ranks(value)
                elif name == "scale":
                    values[name,] = _check_scale(value)
                elif name == "skip" and not isinstance(value, bool):
                    raise OptionError(f"skip: got {value!r}, expected true or false")
                else:
                    values[name,] = _numbers(value)
        return cls(rule.pattern, rule.path, values)

    def takes(self, label: str) -> bool:
        """Tell whether the rule gives an adapter a weight other than 0 anywhere."""
        value = self.values.get(("weights", label), 0.0)
        return any(value) if isinstance(value, tuple) else value != 0

    @contextlib.contextmanager
    def located(self, *key: str) -> Iterator[None]:
        """Say of an error in an option where it stands."""
        try:
            yield
        except OptionError as error:
            where = f"modules {self.pattern!r}: " if self.path else ""
            raise OptionError(f"{where}{error}", *self.path, *key) from None

    def recorded(
        self,
        takers: Mapping[str, Sequence[Strategy]],
        labels: Sequence[str],
        present: Sequence[str],
    ) -> dict[str, Any]:
        """Return the options as `parse` takes them, without adapters that take no part."""
        options: dict[str, Any] = {}
        for (name, *label), value in self.values.items():
            plain: Any = list(value) if isinstance(value, tuple) else value
            if label:
                if label[0] in present:
                    options.setdefault(name, {})[label[0]] = plain
                continue
            if name in ("method", "rank"):
                plain = _rank_text(plain) if name == "rank" else value.name
            for strategy in takers.get(name, ()):
                with contextlib.suppress(OptionError):
                    plain = strategy.check({name: plain}, labels)[name]
                    break
            options[name] = plain
        return options


def make_rules(
    own: Mapping[str, Any], modules: Mapping[str, Mapping[str, Any]], labels: Sequence[str]
) -> list[Rule]:
    """Return the rules of a merge: from the options of the run, then one for each pattern.

    Raises:
        OptionError: An option is refused, or no method in use has it.
    """
    if not isinstance(modules, Mapping):
        raise OptionError(f"modules: got {modules!r}, expected patterns with options", "modules")
    rules = [Rule.parse(own, labels)]
    for pattern, options in modules.items():
        if not isinstance(options, Mapping) or not options:
            raise OptionError(
                f"modules {pattern!r}: got {options!r}, expected options such as rank or skip",
                "modules",
                str(pattern),
            )
        rules.append(Rule.parse(options, labels, str(pattern)))
    parameters(rules)
    return rules


def parameters(rules: Sequence[Rule]) -> dict[str, list[Strategy]]:
    """Return the parameters of the methods that the rules name, with who takes them.

    Raises:
        OptionError: A rule sets a parameter that none of the methods has.
    """
    methods = [rule.values["method",] for rule in rules if ("method",) in rule.values]
    names = {strategy.name: strategy for strategy in methods}
    known: dict[str, list[Strategy]] = {}
    for strategy in names.values():
        for param in strategy.params:
            known.setdefault(param.name, []).append(strategy)
    for rule in rules:
        for name, *_ in rule.values:
            if name in known or name in MODULE_OPTIONS:
                continue
            listed = ", ".join(map(repr, names))
            subject = f"method {listed} has" if len(names) == 1 else f"methods {listed} have"
            near = difflib.get_close_matches(name, [*known, *MODULE_OPTIONS], n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            with rule.located(name):
                raise OptionError(
                    f"{subject} no parameter {name!r}; "
                    f"{'its' if len(names) == 1 else 'their'} parameters: "
                    f"{', '.join(known) or 'none'}{hint}"
                )
    return known


def resolve(
    rules: Sequence[Rule],
    names: Sequence[str],
    labels: Sequence[str],
    absent: Sequence[str],
    normalize: bool | None,
) -> dict[str, Settings]:
    """Return how each module is merged; those that are skipped are left out.

    Modules that the same rules treat alike share one object.

    Args:
        rules: The first one is that of the run and matches everything.
        names: Module paths.
        labels: Of all adapters.
        absent: Labels of adapters that take no part.
        normalize: Divide the weights by the sum of their absolute values; None: as each
            method does.

    Raises:
        OptionError: A pattern matches nothing, a parameter applies nowhere or is refused by
            its method, or a gradient meets a module without a layer.
    """
    takers = parameters(rules)
    reaches = [_Reach.of(rule, names) for rule in rules]
    graded = any(isinstance(value, tuple) for rule in rules for value in rule.values.values())
    known: dict[Any, Settings | None] = {}
    used: set[tuple[_Key, str]] = set()
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
            known[key] = _settle(chosen, strategy, labels, absent, normalize)
        settings = known[key]
        if settings is not None:
            found[name] = settings
    for rule in rules:
        for name, *_ in rule.values:
            if name in takers and (rule.path, name) not in used:
                listed = ", ".join(repr(strategy.name) for strategy in takers[name])
                with rule.located(name):
                    raise OptionError(
                        f"{name}: no module here is merged by a method that takes it ({listed})"
                    )
    if not found:
        raise OptionError("modules: every module is skipped; there is nothing to merge", "modules")
    return found


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
                raise OptionError(f"no module matches; the nearest is {', '.join(near)!r}")
        layers = [layer for layer in map(_layer, modules) if layer is not None]
        return cls(rule, modules, (min(layers, default=0), max(layers, default=0)))


@dataclass(frozen=True)
class _Chosen:
    """The values that apply to one module, each with where it comes from."""

    name: str
    layer: int | None
    values: dict[_Key, tuple[_Reach, Any]]

    def get(self, *key: str) -> Any:
        """Return a value, that of a gradient at the layer of this module."""
        reach, value = self.values[key]
        if not isinstance(value, tuple):
            return value
        if self.layer is None:
            with reach.rule.located(key[0]):
                raise OptionError(
                    f"{key[0]}: a gradient over the layers meets module {self.name!r}, which is "
                    "in no layer; give that module a number of its own under modules"
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
    normalize: bool | None,
) -> Settings | None:
    """Return the settings of one module; None if it is skipped."""
    if ("skip",) in chosen.values and chosen.get("skip"):
        return None
    params = strategy.check({}, labels)
    for param in strategy.params:
        if (param.name,) not in chosen.values:
            continue
        reach, raw = chosen.values[param.name,]
        value = chosen.get(param.name)
        with reach.rule.located(param.name):
            if param.kind == "int" and isinstance(raw, tuple):
                value = math.floor(value + 0.5)
            value = strategy.check({param.name: value}, labels)[param.name]
            if param.kind == "adapter" and value in absent:
                raise OptionError(
                    f"{param.name}: adapter {value!r} has weight 0, so it takes no part"
                )
        params[param.name] = value
    given = {label: chosen.get("weights", label) for label in labels if label not in absent}
    total = sum(abs(weight) for weight in given.values())
    if not total:
        reach, _ = chosen.values["weights", labels[0]]
        with reach.rule.located("weights"):
            raise OptionError(
                f"weights: all are 0 in module {chosen.name!r}; skip it, or give it one"
            )
    rank = strategy.rank
    if ("rank",) in chosen.values:
        rank = chosen.get("rank")
        if isinstance(chosen.values["rank",][1], tuple):
            rank = math.floor(rank + 0.5)
    if normalize is None:
        normalize = strategy.normalize
    scale = chosen.get("scale")
    return Settings(
        strategy=strategy,
        params=params,
        given=given,
        weights={label: weight / total for label, weight in given.items() if weight != 0},
        scale=scale,
        gain=scale if normalize else scale * total,
        rank=rank,
    )


def _layer(name: str) -> int | None:
    """Return the first number in a module's path, its layer."""
    found = _LAYER.search(name)
    return int(found[0]) if found else None


def record(
    rules: Sequence[Rule],
    labels: Sequence[str],
    absent: Sequence[str],
    settings: Iterable[Settings],
) -> dict[str, Any]:
    """Return the options that the rules come from, complete and ready to be given again.

    Defaults of the run's method are among them only where nothing but that method would take
    them when they are given.
    """
    takers = parameters(rules)
    present = [label for label in labels if label not in absent]
    whole, *refined = (rule.recorded(takers, labels, present) for rule in rules)
    whole.pop("rank", None)  # as it was given
    whole["weights"] = list(whole["weights"].values())
    own = rules[0].values["method",]
    defaults = {}
    if any(chosen.strategy == own for chosen in settings):
        defaults = own.check({}, labels)
        defaults = {name: value for name, value in defaults.items() if takers[name] == [own]}
    options = {**{name: whole.pop(name, value) for name, value in defaults.items()}, **whole}
    if refined:
        patterns = [rule.pattern for rule in rules[1:]]
        options["modules"] = dict(zip(patterns, refined, strict=True))
    return options


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return _number(value) is not None


def _number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else."""
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _check_weights(weights: Any, labels: Sequence[str], complete: bool) -> dict[str, Any]:
    """Return label -> weight or gradient, for all labels if the weights must be complete."""
    expected = "expected one number for each adapter"
    if isinstance(weights, Mapping):
        for label in weights:
            if label not in labels:
                near = difflib.get_close_matches(str(label), labels, n=1)
                hint = f". Did you mean {near[0]!r}?" if near else ""
                raise OptionError(
                    f"weights: no adapter is called {label!r}; they are: {', '.join(labels)}{hint}"
                )
        lacking = [label for label in labels if label not in weights]
        if complete and lacking:
            raise OptionError(f"weights: none for adapter {lacking[0]!r}; {expected}")
        pairs = dict(weights)
    else:
        try:
            values = None if isinstance(weights, str) else list(weights)
        except TypeError:
            values = None
        if values is None:
            raise OptionError(f"weights: got {weights!r}, {expected}")
        if len(values) != len(labels):
            raise OptionError(
                f"weights: got {len(values)} for {len(labels)} adapters; give one number for each"
            )
        pairs = dict(zip(labels, values, strict=True))
    try:
        numbers = {
            label: tuple(map(float, value)) if isinstance(value, (list, tuple)) else float(value)
            for label, value in pairs.items()
        }
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"weights: got {weights!r}, {expected}") from None
    points = [value if isinstance(value, tuple) else (value,) for value in numbers.values()]
    if not all(points):
        raise OptionError(f"weights: got {weights!r}, a gradient needs at least one number")
    if not math.isfinite(sum(max(map(abs, values)) for values in points)):
        raise OptionError(f"weights: got {weights!r}, expected finite numbers with a finite sum")
    if complete and not any(map(any, points)):
        raise OptionError("weights: all are 0, so there is nothing to merge")
    return numbers


def _check_scale(scale: Any) -> Any:
    points = scale if isinstance(scale, (list, tuple)) else [scale]
    numbers = [_number(point) for point in points]
    if not numbers or None in numbers or 0 in numbers:
        raise OptionError(f"scale: got {scale!r}, expected a finite number other than 0")
    found = [number for number in numbers if number is not None]
    if min(found) < 0 < max(found):
        raise OptionError(f"scale: got {scale!r}, a gradient that passes through 0")
    return tuple(found) if isinstance(scale, (list, tuple)) else found[0]


def _check_ranks(rank: Any) -> Any:
    """Return what `_check_rank` does, or a gradient of whole numbers."""
    if not isinstance(rank, (list, tuple)):
        return _check_rank(rank)
    points = [_check_rank(point) for point in rank]
    if not points or not all(isinstance(point, int) for point in points):
        raise OptionError(f"rank: got {rank!r}, a gradient is of whole numbers above 0")
    return tuple(points)


def _check_rank(rank: Any) -> int | str | float:
    """Return a whole number, "max" or "sum", or the energy as a float."""
    if rank in ("max", "sum"):
        return str(rank)
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


def _rank_text(rank: int | str | float) -> int | str:
    return f"energy={rank}" if isinstance(rank, float) else rank


def _numbers(value: Any) -> Any:
    """Return a gradient for a list of numbers; anything else as it is."""
    points = [_number(point) for point in value] if isinstance(value, (list, tuple)) else []
    return tuple(points) if points and None not in points else value

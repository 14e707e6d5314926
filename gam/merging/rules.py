"""What a user says of a merge and of single modules, checked: one `Rule` for each pattern.

A merge has one `Rule` for all modules, from the run's options, and one more for each entry
of ``modules``. Later rules win, option by option (and adapter by adapter in ``weights``). A
list in place of a number is a gradient: it is spread evenly from the first layer to the last
of the modules that its rule matches, linear in between. What applies to a module in the end is
in `gam.merging.settings`.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from gam import strategies
from gam.errors import OptionError
from gam.merging import values
from gam.merging.options import MODULE_OPTIONS, OPTIONS
from gam.strategies.base import Strategy

Key: TypeAlias = tuple[str, ...]
"""An option by name; ("weights", label) for the weight of one adapter."""


@dataclass(frozen=True)
class Rule:
    """Checked options for the modules that a pattern matches.

    Attributes:
        pattern: Glob over module paths; a star matches any characters, dots included.
        path: Where the options stand: () for the run, else ("modules", pattern).
        values: Option to number, word, gradient (a tuple of numbers) or `Strategy`.
    """

    pattern: str
    path: Key
    values: Mapping[Key, Any]

    @classmethod
    def parse(
        cls, options: Mapping[str, Any], labels: Sequence[str], pattern: str | None = None
    ) -> Rule:
        """Check options as a user gives them; None counts as not given.

        Args:
            options: Those of `MODULE_OPTIONS` and parameters of methods. Whether a
                parameter is known and in range depends on the method, and is found out by
                `gam.merging.settings.settle`.
            labels: Of the adapters.
            pattern: None for the options of the run.

        Raises:
            OptionError: A value is refused.
        """
        rule = cls(pattern or "*", () if pattern is None else ("modules", pattern), {})
        found: dict[Key, Any] = {}
        for name, value in options.items():
            if value is None:
                continue
            with rule.located(name):
                checked = _checked(name, value, labels, complete=pattern is None)
            if name == "weights":
                found.update({(name, label): weight for label, weight in checked.items()})
            else:
                found[name,] = checked
        return cls(rule.pattern, rule.path, found)

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
                plain = values.rank_text(plain) if name == "rank" else value.name
            for strategy in takers.get(name, ()):
                with contextlib.suppress(OptionError):
                    plain = strategy.check({name: plain}, labels)[name]
                    break
            options[name] = plain
        return options


def _checked(name: str, value: Any, labels: Sequence[str], complete: bool) -> Any:
    """Return the value of one option as a rule holds it."""
    if name == "method":
        return strategies.get(value)
    try:
        if name == "weights":
            return values.weights(value, labels, complete)
        if name == "rank":
            return values.ranks(value)
        if name == "skip":
            return values.switch(value)
        return OPTIONS[name].check(value) if name in OPTIONS else values.numbers(value)
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from None


def make_rules(
    own: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, Any]] | None,
    labels: Sequence[str],
) -> list[Rule]:
    """Return the rules of a merge: from the options of the run, then one for each pattern.

    Raises:
        OptionError: An option is refused, or no method in use has it.
    """
    modules = {} if modules is None else modules
    if not isinstance(modules, Mapping):
        raise OptionError(f"modules: got {modules!r}, expected patterns with options.", "modules")
    rules = [Rule.parse(own, labels)]
    for pattern, options in modules.items():
        named = isinstance(options, Mapping) and all(isinstance(name, str) for name in options)
        if not named or not options:
            raise OptionError(
                f"modules {pattern!r}: got {options!r}, expected options such as rank or skip.",
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
            near = difflib.get_close_matches(name, [*known, *OPTIONS, *MODULE_OPTIONS], n=1)
            hint = f". Did you mean {near[0]!r}?" if near else "."
            with rule.located(name):
                raise OptionError(
                    f"{subject} no parameter {name!r}; "
                    f"{'its' if len(names) == 1 else 'their'} parameters: "
                    f"{', '.join(known) or 'none'}{hint}"
                )
    return known


def record(
    rules: Sequence[Rule],
    labels: Sequence[str],
    absent: Sequence[str],
    used: Iterable[Strategy],
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
    if own in used:
        defaults = own.check({}, labels)
        defaults = {name: value for name, value in defaults.items() if takers[name] == [own]}
    options = {**{name: whole.pop(name, value) for name, value in defaults.items()}, **whole}
    if refined:
        patterns = [rule.pattern for rule in rules[1:]]
        options["modules"] = dict(zip(patterns, refined, strict=True))
    return options

"""Every option of a merge, declared once.

Flags, the names in a recipe, the checks, the record, the line that makes a merge again and the
signature of `gam.merge_adapters` all come from the fields of `MergeOptions`. A new option is one
field, and the place that uses it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, TypeVar

from gam.errors import OptionError
from gam.merging import values
from gam.strategies import STRATEGIES, parameters

_Function = TypeVar("_Function", bound=Callable[..., Any])

Weights: TypeAlias = Sequence[float | Sequence[float]] | Mapping[str, float | Sequence[float]]
"""One number for each adapter, or a gradient over the layers."""

MIXING = "How to merge"
RESULT = "Size and precision of the result"
INPUT = "What to accept"


@dataclass(frozen=True)
class Option:
    """What is known of one option, besides its name, type and default.

    Attributes:
        help: One sentence or two, for `--help` and documentation.
        check: Returns the value as it is used, or raises `OptionError`.
        heading: What `--help` lists it under.
        metavar: What may be given, as the help shows it; None for a switch.
        choices: The words it takes, if it takes no others.
        flag: Whether it has a flag; the others are for recipes and Python.
        rerun: Whether the line that makes a merge again has it: always, where it is not the
            default, or never.
        per_module: Whether it may be set for single modules too.
    """

    help: str
    check: Callable[[Any], Any]
    heading: str = MIXING
    metavar: str | None = None
    choices: Sequence[str] = ()
    flag: bool = True
    rerun: Literal["always", "changed", "never"] = "changed"
    per_module: bool = False


def _option(default: Any, help: str, check: Callable[[Any], Any], **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(help, check, **more)})


def _choice(default: str | None, help: str, choices: Sequence[str], **more: Any) -> Any:
    def check(value: Any) -> Any:
        return None if value is None and default is None else values.choice(value, choices)

    return _option(default, help, check, choices=choices, metavar="|".join(choices), **more)


def _switch(help: str, **more: Any) -> Any:
    return _option(False, help, values.switch, **more)


def _having(name: str, value: Any) -> str:
    """Return the methods that have another default than most."""
    return ", ".join(key for key, s in STRATEGIES.items() if getattr(s, name) == value)


@dataclass(frozen=True)
class MergeOptions:
    """The options of a merge, each checked as far as it can be without the adapters."""

    method: str = _option(
        "gam",
        f"Merging method: {', '.join(STRATEGIES)}, or one that an installed package brings; "
        "see --list-methods.",
        values.name,
        metavar="NAME",
        rerun="always",
        per_module=True,
    )
    weights: Weights | None = _option(  # noqa: RUF009 - it returns a field
        None,
        "One number for each adapter; 0 leaves one out, negative ones subtract. Default: equal.",
        values.anything,
        metavar="W,W,...",
        rerun="always",
        per_module=True,
    )
    normalize: bool | None = _option(
        None,
        "Divide the weights by the sum of their absolute values. Default: yes, but no for "
        f"{_having('normalize', False)}.",
        values.switch_or_none,
    )
    scale: float | Sequence[float] = _option(
        1.0, "Factor on the merged update.", values.scale, metavar="X", per_module=True
    )
    size: str | None = _choice(
        None,
        "Leave each module at the size that the method gives it (exact), or bring it to the "
        "weighted mean size of its inputs (mean); then comes --scale. Default: exact, but mean "
        f"for {_having('size', 'mean')} and with --calibrate pico.",
        ("exact", "mean"),
        per_module=True,
    )
    missing: str = _choice(
        "zero",
        "Count a module that an adapter lacks as a zero update, or share its weight out among "
        "the adapters that have it.",
        ("zero", "renormalize"),
    )
    calibrate: str = _choice(
        "none",
        "A step before the method: pico makes output directions that many adapters use shorter.",
        ("none", "pico"),
    )
    rank: int | str | Sequence[int] | None = _option(
        None,
        "Rank of the result: a number, the largest or the sum of the input ranks, or the "
        "smallest that keeps the share X of the energy. Default: max, but sum for "
        f"{_having('rank', 'sum')}.",
        values.ranks_or_none,
        heading=RESULT,
        metavar="N|max|sum|energy=X",
        per_module=True,
    )
    uniform_rank: bool = _switch("Pad all modules with zeros to one rank.", heading=RESULT)
    dtype: str = _choice(
        "auto",
        "Number format of the result; auto is the widest of the inputs.",
        ("auto", "float32", "bfloat16", "float16"),
        heading=RESULT,
        rerun="always",
    )
    device: str = _option(
        "auto",
        "Device to compute on; auto is the CPU for adapters from files.",
        values.anything,
        heading=RESULT,
        metavar="auto|cpu|cuda[:N]",
    )
    alpha: float | None = _option(
        None,
        "LoRA alpha for .safetensors files that do not state one.",
        values.number_or_none,
        heading=INPUT,
        metavar="X",
    )
    allow_pickle: bool = _switch("Read .bin files (tensors only; no code is run).", heading=INPUT)
    allow_base_mismatch: bool = _switch("Take adapters of different base models.", heading=INPUT)
    modules: Mapping[str, Mapping[str, Any]] | None = _option(
        None,
        "Glob over module paths to options for the modules that it matches; of several that "
        "match, the last one wins, option by option.",
        values.anything,
        flag=False,
        rerun="never",
    )
    params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **given: Any) -> MergeOptions:
        """Return options from keywords, each checked; what is no option is a parameter.

        Args:
            **given: Options by name, and parameters of the methods, which are checked when
                it is known which methods are in use.

        Raises:
            OptionError: A value is refused.
        """
        known = {}
        for name, option in OPTIONS.items():
            if name in given:
                try:
                    known[name] = option.check(given.pop(name))
                except OptionError as error:
                    raise OptionError(f"{name}: {error}", name) from None
        return cls(**known, params=given)

    def record(self) -> dict[str, Any]:
        """Return the options that have flags, by name, without the parameters."""
        return {name: getattr(self, name) for name, option in OPTIONS.items() if option.flag}


OPTIONS: dict[str, Option] = {
    entry.name: entry.metadata["option"] for entry in fields(MergeOptions) if entry.metadata
}
"""Every option by name."""

DEFAULTS: dict[str, Any] = {
    entry.name: entry.default for entry in fields(MergeOptions) if entry.metadata
}
"""What an option is where nobody gives it."""

MODULE_OPTIONS = (*(name for name, option in OPTIONS.items() if option.per_module), "skip")
"""What may be set for single modules, besides the parameters of the methods."""


def documented(function: _Function) -> _Function:
    """Give a function that takes ``**options`` the signature and documentation of a merge's.

    ``help`` and editors then see every option and every parameter of the methods by name.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        param
        for param in inspect.signature(function).parameters.values()
        if param.kind is not param.VAR_KEYWORD
    ]
    taken = [
        inspect.Parameter(entry.name, keyword, default=entry.default, annotation=entry.type)
        for entry in fields(MergeOptions)
        if entry.metadata and entry.name not in {param.name for param in own}
    ]
    found = list(parameters())
    names = dict.fromkeys(param.name for param, _ in found)
    free = [inspect.Parameter(name, keyword, default=None, annotation="Any") for name in names]
    rest = inspect.Parameter("params", inspect.Parameter.VAR_KEYWORD, annotation="Any")
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*own, *taken, *free, rest], return_annotation=function.__annotations__["return"]
    )
    lines = [
        inspect.cleandoc(function.__doc__ or ""),
        "",
        "Options of a merge:",
        *(f"    {name}: {option.help}" for name, option in OPTIONS.items()),
        "",
        "Parameters of the methods:",
        *(f"    {p.name} ({', '.join(owners)}): {p.help} {p.values}." for p, owners in found),
    ]
    function.__doc__ = "\n".join(lines)
    return function

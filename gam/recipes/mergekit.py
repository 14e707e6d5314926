"""Recipes of mergekit: recognised, and refused with what they would be called here.

mergekit merges whole models, so its recipes cannot be followed; but its methods and options
have counterparts, and whoever comes with such a file should see them at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gam import strategies
from gam.errors import OptionError

_SAME = (
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "karcher",
    "multislerp",
)
METHODS: Mapping[str, str] = {
    **{name: name for name in _SAME},
    "slerp": "karcher",  # the mean of two on the sphere of directions is what slerp gives
    "nuslerp": "karcher",
}
"""Method of mergekit to the one that does it here; the others have none."""

# Methods that average models, the base among them if it is named; the others leave it out.
_OF_MODELS = ("linear", "slerp", "nuslerp", "karcher", "multislerp")
# Methods whose weights mergekit does not make sum to one unless told to.
_SUMS = ("task_arithmetic", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs")
_DTYPES = ("float32", "bfloat16", "float16")

_NAMES = (
    "models -> adapters, merge_method -> method{}, parameters: weight -> weights, lambda -> "
    "scale; density, normalize and dtype keep their names; base_model, tokenizer and "
    "layer_range are not needed"
)
_BARE = re.compile(r"(?!(?:null|true|false)$)[A-Za-z_][\w./-]*", re.ASCII)


def check_foreign(value: Mapping[str, Any], where: str) -> None:
    """Refuse a recipe of mergekit; the message says what it would be here.

    Args:
        value: The mapping in the file.
        where: What to call the file in messages.

    Raises:
        OptionError: It is one.
    """
    listed = [*_entries(value.get("models")), *_entries(value.get("slices"))]
    if "merge_method" not in value and not any({"model", "sources"} & set(e) for e in listed):
        return
    theirs = str(value.get("merge_method", "linear"))
    method = METHODS.get(theirs)
    renamed = f" ({theirs} -> {method})" if method not in (theirs, None) else ""
    head = (
        f"{where}: this is a recipe of mergekit, which merges models; gam-merge merges LoRA "
        f"adapters and has other names: {_NAMES.format(renamed)}."
    )
    sources = _sources(value)
    if method is None:
        raise OptionError(f"{head} No method here is {theirs!r}: see gam-merge --list-methods.")
    if not sources:
        raise OptionError(f"{head} Layers cannot be stacked here: list each adapter once.")
    recipe, notes = _translated(value, theirs, method, sources)
    instead = (
        "" if all(s.is_adapter for s in sources) else ", with an adapter in place of each model"
    )
    raise OptionError(" ".join([f"{head} Write: {_flow(recipe)}{instead}.", *notes]))


@dataclass(frozen=True)
class _Source:
    """A model that is merged: its name, whether that is an adapter, and its parameters."""

    name: str
    is_adapter: bool
    parameters: Mapping[str, Any]


def _sources(value: Mapping[str, Any]) -> list[_Source]:
    """Return what is merged; nothing where layers of models are stacked."""
    entries = _entries(value.get("models"))
    slices = _entries(value.get("slices"))
    if slices:
        entries = _entries(slices[0].get("sources"))
        ranges = [entry.get("layer_range") for entry in entries]
        if len(slices) > 1 or any(span != ranges[0] for span in ranges):
            return []
    found = []
    for entry in (entry for entry in entries if "model" in entry):
        name, is_adapter = _named(entry["model"])
        found.append(_Source(name, is_adapter, _mapping(entry.get("parameters"))))
    return found


def _named(model: Any) -> tuple[str, bool]:
    """Return the name of an adapter where a model is written with one, else of the model."""
    if isinstance(model, dict):
        is_adapter = bool(model.get("lora"))
        inner = model.get("lora") or model.get("model")
        return str(_mapping(inner).get("path", inner)), is_adapter
    name, plus, adapter = str(model).partition("+")
    return (adapter, True) if plus else (name, False)


def _translated(
    value: Mapping[str, Any], theirs: str, method: str, sources: Sequence[_Source]
) -> tuple[dict[str, Any], list[str]]:
    """Return the recipe, and a sentence for each thing that it lacks."""
    common = _mapping(value.get("parameters"))
    base = _named(value.get("base_model"))[0]
    if theirs not in _OF_MODELS:
        sources = [s for s in sources if s.name != base or s.parameters] or sources
    elif theirs == "slerp" and len(sources) == 1:
        sources = [_Source(base, False, {}), *sources]
    values = {
        name: [source.parameters.get(name, common.get(name)) for source in sources]
        for name in ("weight", *(param.name for param in strategies.get(method).params))
    }
    if theirs == "slerp" and "t" in common:
        values["weight"] = _weights_of_slerp(common["t"], [s.name == base for s in sources])
    recipe: dict[str, Any] = {"adapters": [source.name for source in sources], "method": method}
    notes = []
    if theirs == "slerp" and _entries(common.get("t")):
        notes.append(_by_filter("t", "weights"))
    for name, given in values.items():
        found = [_fallback(item) for item in given]
        if any(_entries(item) for item in given):
            notes.append(_by_filter(name, "weights" if name == "weight" else name))
        if all(item is None for item in found):
            continue
        if name == "weight":
            recipe["weights"] = [1 if item is None else item for item in found]
        elif all(item == found[0] for item in found):
            recipe[name] = found[0]
        else:
            notes.append(f"{name}: give one, the same for all adapters.")
    normalize = common.get("normalize", common.get("normalize_weights", theirs not in _SUMS))
    if bool(normalize) != strategies.get(method).normalize:
        recipe["normalize"] = bool(normalize)
    if common.get("lambda") is not None:
        recipe["scale"] = _fallback(common["lambda"])
    dtype = value.get("out_dtype") or value.get("dtype")
    if dtype in _DTYPES:
        recipe["dtype"] = dtype
    return recipe, notes


def _by_filter(theirs: str, ours: str) -> str:
    value = "[1, 2]" if ours == "weights" else "0.5"
    return (
        f"Values of {theirs} by filter go under modules, such as modules: "
        f'{{"*.mlp.*": {{{ours}: {value}}}}}.'
    )


def _weights_of_slerp(t: Any, is_base: Sequence[bool]) -> list[Any]:
    """Return the weights of two models for the place between them, 0 for the base."""
    place = _fallback(t)
    points = place if isinstance(place, list) else [place]
    if not all(isinstance(point, (int, float)) for point in points) or sum(is_base) != 1:
        return [None] * len(is_base)
    rest = [round(1 - point, 6) for point in points]
    pair = (rest, points) if isinstance(place, list) else (rest[0], place)
    return [pair[0] if base else pair[1] for base in is_base]


def _fallback(value: Any) -> Any:
    """Return the value that holds for all tensors; None where there is none."""
    entries = _entries(value)
    if not entries:
        return value
    return next((entry.get("value") for entry in entries if not entry.get("filter")), None)


def _entries(value: Any) -> list[dict[str, Any]]:
    """Return a list of mappings; an empty one for anything else."""
    whole = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return value if whole else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and _BARE.fullmatch(value):
        return value
    return json.dumps(value)

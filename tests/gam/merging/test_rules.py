"""Options of single modules: patterns, gradients over the layers, and what is recorded."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.updates import dense, factors
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from gam.adapter import Adapter, LowRank
from gam.api import merge_adapters
from gam.errors import OptionError
from gam.merging.options import MergeOptions
from gam.merging.plan import plan_merge
from gam.merging.rules import Rule
from gam.merging.settings import settle
from gam.strategies import STRATEGIES

SHAPES = {
    **{f"layers.{layer}.{kind}": (14, 10) for layer in range(5) for kind in ("q", "up")},
    "head": (16, 12),
}


def adapter(name, seed, ranks=3, modules=SHAPES):
    return Adapter(
        {
            path: LowRank(a, b, 0.5)
            for index, (path, (d, k)) in enumerate(modules.items())
            for b, a in [factors(d, k, ranks, seed=1000 * seed + index)]
        },
        {},
        name,
    )


def three():
    fewer = {name: shape for name, shape in SHAPES.items() if name != "layers.1.up"}
    return [adapter("a", 1), adapter("b", 2, ranks=2), adapter("c", 3, modules=fewer)]


def settings(modules=None, adapters=None, **options):
    """The settings of every planned module."""
    plan = plan_merge(adapters or three(), modules=modules, **options)
    return {module.name: module.settings for module in plan.modules}


def result(merged, module):
    update = merged.modules[module]
    return dense(update.lora_b, update.lora_a)


# --- patterns -------------------------------------------------------------------------


def test_the_last_pattern_wins_option_by_option():
    found = settings(
        {
            "layers.*": {"method": "ties", "density": 0.5, "scale": 2},
            "*.q": {"density": 0.25},
            "layers.1.*": {"method": "linear"},
            "layers.1.q": {"scale": 3},
        }
    )
    assert {n: (s.strategy.name, s.params.get("density"), s.scale) for n, s in found.items()} == {
        **{f"layers.{n}.q": ("ties", 0.25, 2) for n in (0, 2, 3, 4)},
        **{f"layers.{n}.up": ("ties", 0.5, 2) for n in (0, 2, 3, 4)},
        "layers.1.q": ("linear", None, 3),
        "layers.1.up": ("linear", None, 2),
        "head": ("gam", None, 1),
    }


def test_the_order_of_patterns_matters():
    first = settings({"*": {"rank": 2}, "*.q": {"rank": 5}})
    second = settings({"*.q": {"rank": 5}, "*": {"rank": 2}})
    assert (first["layers.0.q"].rank, second["layers.0.q"].rank) == (5, 2)
    assert first["head"].rank == second["head"].rank == 2


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("head", ["head"]),
        ("layers.[13].q", ["layers.1.q", "layers.3.q"]),
        ("layers.?.u*", [f"layers.{n}.up" for n in range(5)]),
        ("*1*", ["layers.1.q", "layers.1.up"]),
        ("*", sorted(SHAPES)),
    ],
)
def test_patterns_are_globs_over_the_whole_path(pattern, matched):
    found = settings({pattern: {"scale": 7}})
    assert sorted(name for name, one in found.items() if one.scale == 7) == matched


def test_skipped_modules_are_not_in_the_result():
    merged = merge_adapters(three(), modules={"*.q": {"skip": True}, "*.4.q": {"skip": False}})
    kept = [name for name in sorted(SHAPES) if not name.endswith(".q") or ".4." in name]
    assert list(merged.modules) == kept
    assert [module.name for module in merged.report.modules] == kept
    assert merged.report.skipped == sorted(SHAPES.keys() - {*kept})


def test_weights_by_label_change_only_those_named():
    found = settings({"head": {"weights": {"b": 3}}}, weights=[1, 1, -2])
    assert found["head"].given == {"a": 1, "b": 3, "c": -2}
    assert found["head"].weights == {"a": 1 / 6, "b": 3 / 6, "c": -2 / 6}
    assert found["layers.0.q"].weights == {"a": 1 / 4, "b": 1 / 4, "c": -2 / 4}


def test_weights_of_the_run_by_label():
    found = settings(weights={"c": 0.5, "a": 0.25, "b": 0.25})
    assert found["head"].weights == {"a": 0.25, "b": 0.25, "c": 0.5}


def test_weights_of_a_module_are_normalised_by_themselves():
    plain = settings({"head": {"weights": [2, 2, 4]}})["head"]
    assert (plain.weights["c"], plain.gain) == (0.5, 1)
    raw = settings({"head": {"weights": [2, 2, 4], "scale": 3}}, normalize=False)["head"]
    assert (raw.weights["c"], raw.gain) == (0.5, 24)


def test_an_adapter_may_take_part_in_some_modules_only():
    plan = plan_merge(three(), weights=[1, 0, 0], modules={"*.q": {"weights": [0, 1, 0]}})
    assert [a.name for a in plan.adapters] == ["a", "b"]
    assert {m.name: list(m.ranks) for m in plan.modules} == {
        name: ["b"] if name.endswith("q") else ["a"] for name in SHAPES
    }
    assert plan.applied == [None, None]
    # No adapter with a weight holds this module.
    plan = plan_merge(three(), modules={"layers.1.up": {"weights": [0, 0, 1]}})
    assert "layers.1.up" not in [module.name for module in plan.modules]
    assert plan.skipped == ["layers.1.up"]


def test_modules_that_are_merged_alike_share_one_object():
    found = settings({"*.q": {"scale": 2}})
    assert len({id(one) for one in found.values()}) == 2


# --- gradients ------------------------------------------------------------------------


def test_gradients_by_hand():
    # Layers 0 to 4: two points step by a quarter of their difference; of three points the
    # middle one falls on layer 2.
    found = settings(
        {"head": {"weights": [1, 1, 1], "density": 1}},
        weights={"a": [0, 1], "b": [1, 0.5, 1], "c": 0.5},
        method="ties",
        density=[0.2, 0.6],
    )
    for layer, (a, b, density) in enumerate(
        [(0, 1, 0.2), (0.25, 0.75, 0.3), (0.5, 0.5, 0.4), (0.75, 0.75, 0.5), (1, 1, 0.6)]
    ):
        one = found[f"layers.{layer}.up"]
        assert one.given == pytest.approx({"a": a, "b": b, "c": 0.5}, abs=1e-15)
        assert one.params["density"] == pytest.approx(density, abs=1e-15)
        total = a + b + 0.5
        expected = {"a": a / total, "b": b / total, "c": 0.5 / total}
        assert one.weights == pytest.approx({k: v for k, v in expected.items() if v}, abs=1e-15)
    assert found["head"].given == {"a": 1, "b": 1, "c": 1}


def test_a_gradient_spans_the_layers_that_its_pattern_matches():
    found = settings({"layers.[123].q": {"scale": [1, 3]}, "*.up": {"rank": [2, 5]}})
    assert [found[f"layers.{n}.q"].scale for n in range(5)] == [1, 1, 2, 3, 1]
    # 2, 2.75, 3.5, 4.25, 5, rounded with halves up.
    assert [found[f"layers.{n}.up"].rank for n in range(5)] == [2, 3, 4, 4, 5]
    assert settings({"layers.3.q": {"scale": [2, 9]}})["layers.3.q"].scale == 2


@given(
    points=st.lists(st.floats(-10, 10), min_size=1, max_size=6),
    layers=st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True),
)
def test_gradients_are_linear_between_their_points(points, layers):
    names = [f"layers.{layer}.q" for layer in layers]
    run = {"method": "linear", "weights": [1.0, points], "scale": 1.0, "rank": "max"}
    found = settle([Rule.parse(run, "ab")], names, "ab", [], MergeOptions(normalize=True))
    first, last = min(layers), max(layers)
    for name, layer in zip(names, layers, strict=True):
        place = (layer - first) / max(last - first, 1) * (len(points) - 1)
        expected = np.interp(place, range(len(points)), points)
        assert math.isclose(found[name].given["b"], expected, rel_tol=1e-12, abs_tol=1e-12)
    assert found[names[layers.index(first)]].given["b"] == points[0]
    if last > first:
        assert found[names[layers.index(last)]].given["b"] == points[-1]


def test_a_small_result_under_a_gradient_of_scales_is_warned_of():
    merged = merge_adapters(three(), scale=(0.01, 0.02), modules={"head": {"scale": 0.01}})
    assert merged.report.options["scale"] == [0.01, 0.02]
    assert "of its inputs; --size mean brings every module" in merged.report.warnings[0]


# --- the merge ------------------------------------------------------------------------

REFINED = {
    "*.up": {"weights": {"a": 0.5, "b": -0.25}, "scale": 2.0},
    "layers.[01].*": {"rank": 4},
    "head": {"weights": [0, 1, 1]},
    "*.3.*": {"weights": [1, 0, 0]},
}


@pytest.mark.parametrize("method", STRATEGIES)
@pytest.mark.parametrize("missing", ["zero", "renormalize"])
def test_every_method_merges_as_it_would_each_kind_of_module_alone(method, missing):
    adapters = three()
    merged = merge_adapters(adapters, method=method, missing=missing, modules=REFINED)
    assert sorted(merged.modules) == sorted(SHAPES)
    groups = defaultdict(list)
    for module in plan_merge(adapters, method=method, modules=REFINED).modules:
        groups[id(module.settings)].append(module)
    for modules in groups.values():
        own = modules[0].settings
        names = [module.name for module in modules]
        alone = merge_adapters(
            [
                Adapter({n: u for n, u in a.modules.items() if n in names}, {}, a.name)
                for a in adapters
                if any(n in names for n in a.modules)
            ],
            method=method,
            missing=missing,
            weights=[own.given[a.name] for a in adapters if any(n in names for n in a.modules)],
            normalize=False,
            # The weights of adapters without these modules count when they are normalised.
            scale=own.scale if own.size == "mean" else own.gain / sum(map(abs, own.given.values())),
            rank=own.rank,
        )
        for name in names:
            assert merged.modules[name].rank == alone.modules[name].rank
            assert oracle.relative_error(result(merged, name), result(alone, name)) < 1e-5


def test_methods_may_differ_by_module():
    adapters = three()
    merged = merge_adapters(
        adapters,
        retract=True,
        modules={"*.up": {"method": "ties", "density": 0.4}, "head": {"method": "linear"}},
    )
    for pattern, options in {
        "q": {"retract": True},
        "up": {"method": "ties", "density": 0.4},
        "head": {"method": "linear"},
    }.items():
        alone = merge_adapters(adapters, **options)
        for name in SHAPES:
            if name.endswith(pattern):
                assert torch.equal(merged.modules[name].lora_b, alone.modules[name].lora_b)


def test_the_energy_may_differ_by_module():
    merged = merge_adapters(
        three(), method="linear", modules={"*.q": {"rank": "energy=0.5"}, "head": {"rank": "sum"}}
    )
    for module in merged.report.modules:
        if module.name.endswith("q"):
            assert module.rank < 3
            assert module.energy_kept >= 0.5
    assert merged.modules["head"].rank == 8
    assert merged.modules["layers.0.up"].rank == 3


# --- what is recorded -----------------------------------------------------------------


def test_the_report_has_what_differs_and_only_that():
    merged = merge_adapters(
        three(),
        weights=[1, 2, 0],
        retract=True,
        modules={
            "layers.*": {"weights": [1, 2, 0], "scale": 1.0, "rank": "max", "retract": True},
            "*.q": {"method": "ties", "weights": {"b": 1}},
            "head": {"rank": "energy=0.5", "reference": 1},
        },
    )
    found = {module.name: module.settings for module in merged.report.modules}
    assert found.pop("head") == {"rank": "energy=0.5", "reference": "b"}
    for name, own in found.items():
        differs = {"method": "ties", "weights": {"a": 1, "b": 1}, "density": 0.2}
        assert own == (differs if name.endswith("q") else {})
    assert merged.report.options["weights"] == [1, 2]
    assert merged.report.options["modules"] == {
        "layers.*": {
            "weights": {"a": 1, "b": 2},
            "scale": 1.0,
            "rank": "max",
            "retract": True,
        },
        "*.q": {"method": "ties", "weights": {"b": 1}},
        "head": {"rank": "energy=0.5", "reference": "b"},
    }
    assert [entry.weight for entry in merged.report.inputs] == [None, None]


@pytest.mark.parametrize("method", STRATEGIES)
def test_the_recorded_options_give_the_same_merge(method):
    # "b" takes no part, so the record does not count it.
    modules = {**REFINED, "*.3.*": {"weights": [[0, 1], 0, 1]}, "*.up": {"weights": {"a": 0.5}}}
    modules["head"] = {"weights": [1, 0, 3], "rank": 2}
    first = merge_adapters(three(), method=method, weights=[1, 0, [1, 2]], modules=modules)
    adapters = {a.name: a for a in three() if a.name != "b"}
    second = merge_adapters(adapters, **first.report.options)
    assert second.report == first.report
    for name, module in first.modules.items():
        assert torch.equal(module.lora_a, second.modules[name].lora_a)
        assert torch.equal(module.lora_b, second.modules[name].lora_b)


WEIGHTS = st.floats(-4, 4).map(lambda number: round(number, 2))
POINTS = st.lists(WEIGHTS, min_size=1, max_size=3)
COMMON = {
    "scale": st.sampled_from([0.5, 2, [1, 3]]),
    "rank": st.sampled_from([1, 3, "max", "sum", "energy=0.8", [1, 4]]),
    "density": st.sampled_from([0.1, "0.5", [0.2, 0.9]]),
    "reference": st.sampled_from([0, "1", "c", "consensus"]),
    "retract": st.booleans(),
    "method": st.sampled_from(sorted(STRATEGIES)),
}


def options_of(weights, **more):
    return st.fixed_dictionaries({}, optional={**COMMON, "weights": weights, **more})


@settings_of_hypothesis(max_examples=60, deadline=None)
@given(
    own=options_of(st.lists(WEIGHTS | POINTS, min_size=3, max_size=3)),
    modules=st.dictionaries(
        st.sampled_from(["*", "*.q", "*.up", "head", "layers.*", "layers.[01].*"]),
        options_of(
            st.dictionaries(st.sampled_from("abc"), WEIGHTS | POINTS, min_size=1),
            skip=st.booleans(),
        ).filter(bool),
        max_size=4,
    ),
)
@example(own={}, modules={"*": {"method": "breadcrumbs"}})  # nothing is left to the run's method
@example(own={"method": "ties"}, modules={"*.q": {"method": "della"}})  # other default density
def test_recorded_options_are_a_fixed_point(own, modules):
    try:
        first = plan_merge(three(), modules=modules, **own)
    except OptionError:
        return  # a gradient at "head", a parameter that nothing takes, only weights of 0, ...
    adapters = {a.name: a for a in first.adapters}
    second = plan_merge(adapters, **first.options)
    assert second.options == first.options
    assert (second.modules, second.skipped) == (first.modules, first.skipped)
    third = plan_merge(adapters, **json.loads(json.dumps(first.options)))
    assert (third.modules, third.applied) == (first.modules, first.applied)


def test_adapters_may_be_given_by_label():
    adapters = three()
    merged = merge_adapters(dict(zip("xyz", adapters, strict=True)), reference="z")
    assert [entry.name for entry in merged.report.inputs] == ["x", "y", "z"]
    assert merged.report.options["reference"] == "z"


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "path"),
    [
        ({"modules": ["*"]}, "modules: got ['*'], expected patterns with options.", ("modules",)),
        (
            {"modules": {"*.q": 3}},
            "modules '*.q': got 3, expected options such as rank or skip.",
            ("modules", "*.q"),
        ),
        (
            {"modules": {"*.qq": {"rank": 3}}},
            "modules '*.qq': no module matches; the nearest is 'layers.4.q'.",
            ("modules", "*.qq"),
        ),
        (
            {"modules": {"*.q": {"rank": 0}}},
            "modules '*.q': rank: got 0, expected a whole number above 0, 'max', 'sum' or "
            "'energy=X' with X above 0 and at most 1, such as energy=0.99.",
            ("modules", "*.q", "rank"),
        ),
        (
            {"modules": {"*.q": {"rank": 99}}},
            "modules '*.q': rank: got 99, more than any module can use. Give at most 16.",
            ("modules", "*.q", "rank"),
        ),
        (
            {"rank": [2, 2.5]},
            "rank: got 2.5, expected a whole number above 0, 'max', 'sum' or 'energy=X' with X "
            "above 0 and at most 1, such as energy=0.99.",
            ("rank",),
        ),
        (
            {"rank": ["max", 3]},
            "rank: got ['max', 3], a gradient is of whole numbers above 0.",
            ("rank",),
        ),
        (
            {"modules": {"*.q": {"method": "tie"}}},
            "modules '*.q': unknown method 'tie'; choose one of: "
            f"{', '.join(STRATEGIES)}. Did you mean 'ties'?",
            ("modules", "*.q", "method"),
        ),
        (
            {"modules": {"*.q": {"density": 0.5}}},
            "modules '*.q': method 'gam' has no parameter 'density'; its parameters: "
            "reference, retract.",
            ("modules", "*.q", "density"),
        ),
        (
            {"modules": {"*.q": {"method": "ties", "densty": 0.5}}},
            "modules '*.q': methods 'gam', 'ties' have no parameter 'densty'; their parameters: "
            "reference, retract, density. Did you mean 'density'?",
            ("modules", "*.q", "densty"),
        ),
        (
            {"modules": {"*.q": {"method": "ties"}, "*.up": {"density": 0.5}}},
            "modules '*.up': density: no module here is merged by a method that takes it ('ties'). "
            "Leave it out.",
            ("modules", "*.up", "density"),
        ),
        (
            {"modules": {"*.q": {"method": "ties", "density": 2}}},
            "modules '*.q': density of method 'ties': got 2, expected a number from 0 to 1.",
            ("modules", "*.q", "density"),
        ),
        (
            {"method": "ties", "density": [0.5, 2], "modules": {"head": {"density": 1}}},
            "density of method 'ties': got 1.25, expected a number from 0 to 1.",
            ("density",),
        ),
        (
            {"scale": [1, 2]},
            "scale: a gradient over the layers meets module 'head', which is in no layer. Give "
            "that module a number of its own under modules.",
            ("scale",),
        ),
        (
            {"scale": [1, -2]},
            "scale: got [1, -2], a gradient that passes through 0.",
            ("scale",),
        ),
        (
            {"modules": {"*.q": {"weights": [1, 1]}}},
            "modules '*.q': weights: got 2 for 3 adapters; give one number for each.",
            ("modules", "*.q", "weights"),
        ),
        (
            {"modules": {"*.q": {"weights": {"d": 1}}}},
            "modules '*.q': weights: no adapter is called 'd'; they are: a, b, c.",
            ("modules", "*.q", "weights"),
        ),
        (
            {"weights": {"a": 1, "b": 1}},
            "weights: none for adapter 'c'; expected one number for each adapter.",
            ("weights",),
        ),
        (
            {"weights": [1, 1, []]},
            "weights: got [1, 1, []], a gradient needs at least one number.",
            ("weights",),
        ),
        (
            {"modules": {"head": {"weights": [0, 0, 0]}}},
            "modules 'head': weights: all are 0 in module 'head'. Skip it, or give it one.",
            ("modules", "head", "weights"),
        ),
        (
            {"modules": {"*.q": {"skip": "yes"}}},
            "modules '*.q': skip: got 'yes', expected True or False.",
            ("modules", "*.q", "skip"),
        ),
        (
            {"modules": {"*": {"skip": True}}},
            "modules: every module is skipped, so there is nothing to merge. Skip fewer.",
            ("modules",),
        ),
        (
            {"weights": [0, 1, 1], "modules": {"*.q": {"reference": "a"}}},
            "modules '*.q': reference: adapter 'a' has weight 0, so it takes no part. "
            "Name another one.",
            ("modules", "*.q", "reference"),
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_options_of_modules_are_refused(options, message, path):
    with pytest.raises(OptionError) as caught:
        merge_adapters(three(), **options)
    assert (str(caught.value), caught.value.path) == (message, path)

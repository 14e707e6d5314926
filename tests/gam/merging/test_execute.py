"""Whole merges of adapters in memory: the executor, the options and the report."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.adapters import make_adapter
from helpers.paths import ROOT
from helpers.updates import dense, factors, formed

from gam import load_adapter
from gam.adapter import Adapter, LowRank
from gam.algebra.factors import from_factors
from gam.api import merge_adapters
from gam.errors import AdapterError, OptionError, OutputError
from gam.merging.execute import execute
from gam.merging.plan import plan_merge
from gam.strategies.gam import gam as gam_method

SHAPES = {"layers.0.q": (24, 20), "layers.0.v": (12, 20), "layers.1.q": (24, 20)}
EXAMPLES = sorted((ROOT / "examples" / "adapters").iterdir())
ENTRYWISE = [
    "ties",
    "magnitude_prune",
    "breadcrumbs",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
]


def adapter(name, seed=0, ranks=4, modules=SHAPES, dtype=torch.float32, scale=0.5, **config):
    return Adapter(
        {
            path: LowRank(a, b, scale)
            for index, (path, (d, k)) in enumerate(modules.items())
            for b, a in [factors(d, k, ranks, seed=100 * seed + index, dtype=dtype)]
        },
        config,
        name,
    )


def deltas(adapters, module):
    shape = next(a.modules[module].shape for a in adapters if module in a.modules)
    updates = [a.modules.get(module) for a in adapters]
    return [
        dense(u.lora_b, u.lora_a, u.scale) if u is not None else np.zeros(shape) for u in updates
    ]


def result(merged, module):
    update = merged.modules[module]
    assert update.scale == 1
    return dense(update.lora_b, update.lora_a)


def three(**options):
    return [adapter(name, seed, **options) for seed, name in enumerate("abc", start=1)]


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, -0.2], [3.0, 1.0, 0.0]], ids=str)
def test_gam_equals_the_oracle(weights):
    adapters = three()
    merged = merge_adapters(adapters, method="gam", weights=weights)
    for module in SHAPES:
        expected = oracle.gam(deltas(adapters, module), weights)
        assert oracle.relative_error(result(merged, module), expected) < 2e-6


def many(**options):
    names = [f"adapter-{seed}" for seed in range(8)]
    return [adapter(name, seed, **options) for seed, name in enumerate(names, start=1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gam_of_many_equals_the_oracle(dtype):
    shapes = {"layers.0.q": (240, 200), "layers.0.v": (120, 200)}
    adapters = many(modules=shapes, dtype=dtype)
    weights = [0.3, -0.2, 0.1, 0.2, 0.4, 0.1, 0.3, 0.2]
    merged = merge_adapters(adapters, method="gam", weights=weights, reference=3)
    order = [3, 0, 1, 2, 4, 5, 6, 7]
    for module in shapes:
        expected = deltas([adapters[index] for index in order], module)
        expected = oracle.gam(expected, [weights[index] for index in order])
        error = oracle.relative_error(result(merged, module), expected)
        assert error < (2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("weights", [[0.5, 0.3, -0.2], [3.0, 1.0, 0.0]], ids=str)
@pytest.mark.parametrize("rank", [3, "max", "sum"])
def test_linear_equals_the_oracle(weights, rank):
    adapters = three()
    merged = merge_adapters(adapters, method="linear", weights=weights, rank=rank)
    width = {"max": 4, "sum": 4 * sum(w != 0 for w in weights)}.get(rank, rank)
    for module in SHAPES:
        shares = np.asarray(weights) / np.abs(weights).sum()
        expected = oracle.linear(deltas(adapters, module), shares, width)
        assert merged.modules[module].rank == width
        assert oracle.relative_error(result(merged, module), expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_costs_only_its_rounding(dtype):
    adapters = three(dtype=dtype)
    merged = merge_adapters(adapters)
    assert merged.report.dtype == str(dtype).removeprefix("torch.")
    for module in SHAPES:
        expected = oracle.gam(deltas(adapters, module))
        error = oracle.relative_error(result(merged, module), expected)
        assert error < 2 * torch.finfo(dtype).eps
    reported = merged.report.rounding_error
    assert 0.1 * torch.finfo(dtype).eps < reported < torch.finfo(dtype).eps


@pytest.mark.parametrize("method", ["gam", "linear"])
@pytest.mark.parametrize("cond", [1, 10, 30, 100, 1e3, 1e6], ids=lambda c: f"{c:g}")
@pytest.mark.parametrize("same_a", [False, True])
def test_half_precision_is_accurate_for_any_conditioning(same_a, cond, method):
    """Float32 serves what is well conditioned; the error must stay far below bfloat16's."""
    shared = factors(300, 240, 8, seed=9, dtype=torch.bfloat16)[1]
    adapters = []
    for seed in range(3):
        b, a = factors(300, 240, 8, seed=seed, cond_b=cond, dtype=torch.bfloat16)
        adapters.append(Adapter({"w": LowRank(shared if same_a else a, b, 2.0)}, {}, str(seed)))
    merged = merge_adapters(adapters, method=method, rank="sum")
    found = deltas(adapters, "w")
    expected = oracle.gam(found) if method == "gam" else oracle.linear(found, [1 / 3] * 3)
    error = oracle.relative_error(result(merged, "w"), expected)
    assert error < 1.1 * merged.report.rounding_error + 1e-4


@pytest.mark.parametrize("cond", [1, 10, 30, 100, 300], ids=lambda c: f"{c:g}")
def test_float32_is_taken_only_where_it_is_enough(cond):
    pairs = [
        factors(500, 400, 16, seed=seed, cond_b=cond, cond_a=cond, dtype=torch.bfloat16)
        for seed in range(3)
    ]
    names, b, a = "012", [[b for b, _ in pairs]], [[a for _, a in pairs]]
    scales = torch.ones(1, 3, dtype=torch.float64)
    updates, careful = from_factors(names, b, a, scales, torch.float32)
    assert cond != 300 or careful == [0]
    assert cond > 30 or careful == []
    if updates:
        left, right = updates[0].left.side, updates[0].right.side
        product = gam_method(updates, [1 / 3] * 3)
        merged = formed(left, product.left) @ product.core[0] @ formed(right, product.right).mT
        expected = oracle.gam([dense(*pair) for pair in pairs])
        assert oracle.relative_error(merged.numpy(), expected) < 1e-4


def test_auto_dtype_is_the_widest_of_the_inputs():
    half, brain, full = (
        adapter(str(d), dtype=d) for d in (torch.float16, torch.bfloat16, torch.float32)
    )
    assert plan_merge([half, half]).dtype == torch.float16
    assert plan_merge([half, brain]).dtype == torch.float32
    assert plan_merge([brain, full]).dtype == torch.float32
    assert plan_merge([adapter("d", dtype=torch.float64)]).dtype == torch.float32
    assert plan_merge([full], dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["gam", "linear"])
@pytest.mark.parametrize("normalize", [True, False])
def test_weight_and_zero_give_the_weighted_first(method, normalize):
    adapters = three()
    merged = merge_adapters(adapters[:2], method=method, weights=[-0.25, 0.0], normalize=normalize)
    factor = -1 if normalize else -0.25
    for module in SHAPES:
        expected = factor * deltas(adapters, module)[0]
        assert oracle.relative_error(result(merged, module), expected) < 1e-6
    assert [entry.name for entry in merged.report.inputs] == ["a"]


@pytest.mark.parametrize("method", ["gam", "linear"])
def test_weights_that_are_not_normalised_scale_the_result(method):
    adapters = three()
    base = merge_adapters(adapters, method=method, weights=[0.5, 0.25, -0.25])
    more = merge_adapters(adapters, method=method, weights=[1, 0.5, -0.5], normalize=False)
    for module in SHAPES:
        assert oracle.relative_error(result(more, module), 2 * result(base, module)) < 1e-6


@pytest.mark.parametrize("scale", [3.0, -0.5])
def test_scale_is_a_factor_on_the_result(scale):
    plain, scaled = merge_adapters(three()), merge_adapters(three(), scale=scale)
    for module in SHAPES:
        assert oracle.relative_error(result(scaled, module), scale * result(plain, module)) < 1e-6
    assert math.isclose(
        scaled.report.norm_ratio, abs(scale) * plain.report.norm_ratio, rel_tol=1e-9
    )
    sign = math.copysign(1, scale)
    for name, cosine in plain.report.cosines.items():
        assert math.isclose(scaled.report.cosines[name], sign * cosine, rel_tol=1e-9)


@pytest.mark.parametrize("method", ["gam", "linear"])
def test_missing_and_zero_modules_behave_alike(method):
    adapters = three()
    partly = {k: v for k, v in adapters[1].modules.items() if k != "layers.0.v"}
    a, b = adapters[1].modules["layers.0.v"].lora_a, adapters[1].modules["layers.0.v"].lora_b
    lacking = Adapter(partly, {}, "b")
    zero = Adapter(partly | {"layers.0.v": LowRank(a, torch.zeros_like(b))}, {}, "b")
    first = merge_adapters([adapters[0], lacking, adapters[2]], method=method)
    second = merge_adapters([adapters[0], zero, adapters[2]], method=method)
    for module in SHAPES:
        assert oracle.relative_error(result(first, module), result(second, module)) < 1e-6
    if method == "gam":
        expected = oracle.gam(deltas([adapters[0], lacking, adapters[2]], "layers.0.v"))
        assert oracle.relative_error(result(first, "layers.0.v"), expected) < 1e-6


@pytest.mark.parametrize("method", ["gam", "linear"])
@pytest.mark.parametrize(("missing", "factor"), [("zero", 0.3), ("renormalize", 1.0)])
def test_module_of_one_adapter_is_its_weighted_update(method, missing, factor):
    first = adapter("a", 1)
    second = adapter("b", 2, modules={"other": (10, 12)})
    merged = merge_adapters([first, second], method=method, weights=[0.7, 0.3], missing=missing)
    assert sorted(merged.modules) == sorted([*SHAPES, "other"])
    expected = factor * deltas([second], "other")[0]
    assert oracle.relative_error(result(merged, "other"), expected) < 1e-6


def test_modules_that_are_zero_everywhere_stay_zero():
    adapters = three()
    for one in adapters:
        old = one.modules["layers.0.q"]
        one.modules["layers.0.q"] = LowRank(old.lora_a, torch.zeros_like(old.lora_b))
    merged = merge_adapters(adapters)
    assert merged.modules["layers.0.q"].rank == 4
    assert not merged.modules["layers.0.q"].delta().any()
    energies = {m.name: m.energy_kept for m in merged.report.modules}
    assert math.isnan(energies["layers.0.q"])
    assert math.isclose(merged.report.energy_kept, 1)


def test_mixed_ranks_and_odd_modules_in_one_merge():
    adapters = [adapter("a", 1, ranks=2), adapter("b", 2, ranks=5), adapter("c", 3, ranks=3)]
    bad = adapters[0].modules["layers.1.q"]
    b, a = factors(24, 20, 2, seed=9, cond_b=1e6)
    adapters[0].modules["layers.1.q"] = LowRank(a, b, bad.scale)
    merged = merge_adapters(adapters)
    for module in SHAPES:
        expected = oracle.gam(deltas(adapters, module))
        assert merged.modules[module].rank == 5
        assert oracle.relative_error(result(merged, module), expected) < 2e-5


def test_batches_change_nothing(monkeypatch):
    whole = merge_adapters(three())
    monkeypatch.setattr("gam.merging.batches._BATCH_BYTES", {"cpu": 1})
    single = merge_adapters(three())
    for module in SHAPES:
        assert oracle.relative_error(result(single, module), result(whole, module)) < 1e-6


def test_the_same_merge_gives_the_same_bits():
    first, second = merge_adapters(three()), merge_adapters(three())
    for module in SHAPES:
        for side in ("lora_a", "lora_b"):
            one, two = (getattr(m.modules[module], side) for m in (first, second))
            assert torch.equal(one, two)
    assert first.report == second.report


@pytest.mark.parametrize("method", ["gam", "linear"])
def test_report_is_what_was_written(method):
    adapters = three()
    merged = merge_adapters(adapters, method=method, weights=[0.5, 0.3, -0.2])
    report = merged.report
    names = [a.name for a in adapters]
    squares = dict.fromkeys([*names, "merged", "exact"], 0.0)
    products = dict.fromkeys(names, 0.0)
    for module, entry in zip(sorted(SHAPES), report.modules, strict=True):
        assert entry.name == module
        inputs = dict(zip(names, deltas(adapters, module), strict=True))
        written = result(merged, module)
        size = np.linalg.norm(written)
        mean = np.mean([np.linalg.norm(delta) for delta in inputs.values()])
        assert math.isclose(entry.norm, size, rel_tol=1e-5)
        assert math.isclose(entry.norm_ratio, size / mean, rel_tol=1e-5)
        if method == "linear":
            exact = np.linalg.norm(oracle.linear(list(inputs.values()), [0.5, 0.3, -0.2]))
            assert math.isclose(entry.energy_kept, (size / exact) ** 2, rel_tol=1e-5)
        for name, delta in inputs.items():
            product = float((written * delta).sum())
            cosine = product / size / np.linalg.norm(delta)
            assert math.isclose(entry.cosines[name], cosine, abs_tol=1e-5)
            squares[name] += np.linalg.norm(delta) ** 2
            products[name] += product
        squares["merged"] += size**2
    overall = math.sqrt(squares["merged"])
    mean = np.mean([math.sqrt(squares[name]) for name in names])
    assert math.isclose(report.norm_ratio, overall / mean, rel_tol=1e-5)
    for name in names:
        cosine = products[name] / overall / math.sqrt(squares[name])
        assert math.isclose(report.cosines[name], cosine, abs_tol=1e-5)


def test_energy_chooses_ranks_per_module():
    adapters = three()
    merged = merge_adapters(adapters, method="linear", rank="energy=0.9")
    for entry in merged.report.modules:
        expected = oracle.linear(deltas(adapters, entry.name), [1 / 3] * 3)
        values = np.linalg.svd(expected, compute_uv=False) ** 2
        needed = int((values.cumsum() < 0.9 * values.sum()).sum()) + 1
        assert entry.rank == merged.modules[entry.name].rank == needed
        assert entry.energy_kept >= 0.9
    assert merged.config["r"] == max(entry.rank for entry in merged.report.modules)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("method", ENTRYWISE)
def test_energy_is_of_the_exact_merge_where_that_is_not_of_low_rank(method, energy):
    options = {"method": method, "dtype": "float32", "weights": [1, 1, 1]}
    whole = merge_adapters(EXAMPLES, rank=64, **options)
    merged = merge_adapters(EXAMPLES, rank=f"energy={energy}", **options)
    for entry in merged.report.modules:
        assert entry.energy_kept >= energy
        exact, kept = (result(adapter, entry.name) for adapter in (whole, merged))
        assert (np.linalg.norm(kept) / np.linalg.norm(exact)) ** 2 >= energy - 1e-6
        values = np.linalg.svd(exact, compute_uv=False) ** 2
        needed = int((values.cumsum() < energy * values.sum()).sum()) + 1
        assert needed <= entry.rank <= needed + 1
    assert not any("keeps more" in text for text in merged.report.warnings if energy == 0.99)


def test_uniform_rank_pads_every_module():
    adapters = [adapter("a", 1, ranks=2), adapter("b", 2, ranks=5, modules={"other": (10, 12)})]
    for rank in ("max", "energy=0.5"):
        plain = merge_adapters(adapters, rank=rank)
        padded = merge_adapters(adapters, rank=rank, uniform_rank=True)
        widest = max(module.rank for module in plain.modules.values())
        for module in plain.modules:
            assert padded.modules[module].rank == widest
            assert oracle.relative_error(result(padded, module), result(plain, module)) < 1e-6
        assert padded.config["rank_pattern"] == {}
        assert {entry.rank for entry in padded.report.modules} == {widest}


def test_overflow_of_the_output_dtype_is_refused():
    with pytest.raises(OutputError, match=r"module '.*': .*overflow float16.*--dtype"):
        merge_adapters(three(), dtype="float16", scale=1e12)


def test_progress_reaches_the_end():
    seen = []
    execute(plan_merge(three()), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)
    assert seen == sorted(seen)


def test_labels_are_unique():
    plan = plan_merge([adapter("x", 1), adapter("x", 2), adapter("y", 3)])
    assert [a.name for a in plan.adapters] == ["x#1", "x#2", "y"]


@pytest.mark.parametrize("reference", [1, "1", "b"])
def test_reference_by_name_or_index(reference):
    adapters = three()
    merged = merge_adapters(adapters, reference=reference)
    expected = oracle.gam(deltas(adapters, "layers.0.q"), reference=1)
    assert oracle.relative_error(result(merged, "layers.0.q"), expected) < 2e-6
    assert merged.report.options["reference"] == "b"


def test_warnings_say_what_the_user_should_know():
    def text(**options):
        return " | ".join(merge_adapters(**options).report.warnings)

    unrelated = [adapter(n, s, modules={"w": (400, 300)}) for s, n in enumerate("abc", start=1)]
    assert "0.2" in text(adapters=unrelated)
    assert "--size mean" in text(adapters=unrelated)
    assert "keeps" in text(adapters=unrelated, method="linear")
    assert "--rank" in text(adapters=unrelated, method="linear")
    loud = [unrelated[0], adapter("loud", 2, modules={"w": (400, 300)}, scale=500.0)]
    assert "'a' has all but vanished" in text(adapters=loud, method="linear")
    quiet = [adapter(n, s, modules={"w": (400, 300)}) for s, n in enumerate("abcde", start=1)]
    warned = text(
        adapters=[*quiet, adapter("loud", 9, modules={"w": (400, 300)}, scale=500.0)],
        method="linear",
    )
    assert "adapters 'a', 'b', 'c' and 2 more have all but vanished" in warned
    partly = [adapter("a", 1), adapter("b", 2, modules={"layers.0.q": (24, 20)})]
    assert "held by only some" in text(adapters=partly)
    same = adapter("a", 1)
    assert text(adapters=[same, same]) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tias"}, r"unknown method 'tias'.*Did you mean 'ties'"),
        ({"weights": [1, 2]}, r"weights: got 2 for 3 adapters"),
        ({"weights": [1, 2, math.nan]}, r"weights: .*finite"),
        ({"weights": [0, 0, 0]}, r"weights: all are 0"),
        ({"weights": ["x", 1, 2]}, r"weights: .*number"),
        ({"rank": 0}, r"rank: got 0"),
        ({"rank": "most"}, r"rank: got 'most'"),
        ({"rank": "energy=2"}, r"rank: got 'energy=2'"),
        ({"rank": True}, r"rank: got True"),
        ({"scale": 0}, r"scale: got 0"),
        ({"scale": math.inf}, r"scale: got inf"),
        ({"scale": 10**400}, r"scale: got 1000"),
        ({"weights": [1e308, 1e308, 1]}, r"weights: .*finite sum"),
        ({"weights": [10**400, 1, 1]}, r"weights: .*number"),
        ({"weights": "123"}, r"weights: got '123'"),
        ({"rank": math.inf}, r"rank: got inf"),
        ({"rank": 10**9}, r"rank: got 1000000000, more than any module can use. Give at most 24."),
        ({"normalize": "false"}, r"normalize: got 'false', expected True or False"),
        ({"alpha": "3"}, r"alpha: got '3'"),
        ({"method": None}, r"unknown method None"),
        ({"reference": math.inf}, r"reference of method 'gam': got inf"),
        ({"reference": 1.7}, r"reference of method 'gam': got 1.7"),
        ({"missing": "drop"}, r"missing: got 'drop'"),
        ({"dtype": "int8"}, r"dtype: got 'int8'"),
        ({"reference": "d"}, r"reference of method 'gam': got 'd'.*a, b, c, consensus"),
        ({"reference": 3}, r"reference of method 'gam': got 3.*0 to 2"),
        ({"retract": 2}, r"retract of method 'gam': got 2, expected true or false"),
        ({"densty": 0.5}, r"method 'gam' has no parameter 'densty'"),
        ({"method": "linear", "reference": 0}, r"'linear' has no parameter 'reference'"),
        ({"method": "ties", "density": 1.5}, r"density of method 'ties': got 1.5.*0 to 1"),
    ],
    ids=str,
)
def test_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message) as caught:
        merge_adapters(three(), **options)
    assert "\n" not in str(caught.value)


def test_different_bases_are_refused():
    adapters = [
        adapter("a", 1, base_model_name_or_path="org/one"),
        adapter("b", 2, base_model_name_or_path="org/two"),
    ]
    with pytest.raises(AdapterError, match=r"'a' .*'org/one'.*'b' .*'org/two'.*--allow-base"):
        merge_adapters(adapters)
    assert merge_adapters(adapters, allow_base_mismatch=True).modules


def test_different_shapes_are_refused():
    adapters = [adapter("a", 1), adapter("b", 2, modules={"layers.0.q": (24, 28)})]
    with pytest.raises(AdapterError, match=r"layers\.0\.q.*\[24, 20\] in 'a'.*\[24, 28\] in 'b'"):
        merge_adapters(adapters)


def test_no_adapters_are_refused():
    with pytest.raises(OptionError, match="adapters: got none"):
        merge_adapters([])
    for one in ("path/of/one", Path("one"), adapter("a")):
        with pytest.raises(OptionError, match="adapters: got one"):
            merge_adapters(one)


@pytest.mark.parametrize("label", ["", " \t", 5, None])
def test_a_label_that_is_no_name_is_refused(label, tmp_path):
    folder = make_adapter(tmp_path / "a")
    for given in (folder, adapter("a")):
        with pytest.raises(OptionError) as caught:
            merge_adapters({label: given, "b": folder})
        assert str(caught.value) == f"adapters: got {label!r} as a label, expected a name."


def test_any_iterable_of_adapters_will_do():
    assert merge_adapters(iter(three())).report == merge_adapters(tuple(three())).report


def test_labels_never_collide():
    names = ["a", "a", "a#1", "a#2", "b"]
    adapters = [adapter(name, seed) for seed, name in enumerate(names)]
    merged = merge_adapters(adapters, method="linear")
    labels = [entry.name for entry in merged.report.inputs]
    assert len(set(labels)) == 5
    expected = oracle.linear(deltas(adapters, "layers.0.q"), [0.2] * 5, 4)
    assert oracle.relative_error(result(merged, "layers.0.q"), expected) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lora_b": torch.full((24, 4), math.nan)},
            r"'b', module 'layers\.0\.q': lora_B holds NaN",
        ),
        ({"lora_a": torch.full((4, 20), math.inf)}, r"lora_A holds NaN or infinity"),
        ({"lora_a": torch.zeros(3, 20)}, r"ranks 3 and 4 differ"),
        ({"lora_a": torch.zeros(0, 20), "lora_b": torch.zeros(24, 0)}, r"expected a matrix"),
        ({"lora_a": torch.zeros(4, 20, dtype=torch.int32)}, r"dtype int32"),
        ({"lora_b": torch.full((24, 4), 1e50, dtype=torch.float64)}, r"range of float32"),
        ({"scale": math.nan}, r"scaling is nan"),
        ({"scale": 1e60}, r"scaling is 1e\+60"),
    ],
    ids=str,
)
def test_adapters_in_memory_are_checked(change, message):
    first, second = three()[:2]
    second.modules["layers.0.q"] = replace(second.modules["layers.0.q"], **change)
    with pytest.raises(AdapterError, match=message):
        merge_adapters([first, second])
    with pytest.raises(AdapterError, match="'empty': it has no modules"):
        merge_adapters([first, Adapter({}, {}, "empty")])


def test_factors_of_a_live_model_are_merged():
    first, second = three()[:2]
    expected = merge_adapters([first, second])
    for module in second.modules:
        update = second.modules[module]
        parameters = torch.nn.Parameter(update.lora_a), torch.nn.Parameter(update.lora_b)
        second.modules[module] = LowRank(*parameters, update.scale)
    merged = merge_adapters([first, second])
    assert merged.report == expected.report
    assert not any(module.lora_a.requires_grad for module in merged.modules.values())


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (1, 1), (2, 30)], ids=str)
@pytest.mark.parametrize("method", ["gam", "linear", "ties"])
def test_narrow_modules_are_merged_and_saved(method, shape, tmp_path):
    adapters = [adapter(n, s, modules={"w": shape}) for s, n in enumerate("ab")]
    merged = merge_adapters(adapters, method=method, rank="sum", output=tmp_path / "out")
    saved = load_adapter(tmp_path / "out")
    assert np.array_equal(result(saved, "w"), result(merged, "w"))
    if method == "linear":
        expected = oracle.linear(deltas(adapters, "w"), [0.5, 0.5])
        assert oracle.relative_error(result(saved, "w"), expected) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 3e-23, 1e-22, 1e-10, 1e10, 1e17], ids=lambda s: f"{s:g}")
@pytest.mark.parametrize("method", ["gam", "linear"])
def test_any_size_of_half_precision_factors(method, size):
    adapters = []
    for seed in range(2):
        b, a = factors(60, 50, 4, seed)
        b, a = (b * size).to(torch.bfloat16), a.to(torch.bfloat16)
        adapters.append(Adapter({"w": LowRank(a, b)}, {}, str(seed)))
    merged = merge_adapters(adapters, method=method, rank="sum")
    found = deltas(adapters, "w")
    expected = oracle.gam(found) if method == "gam" else oracle.linear(found, [0.5, 0.5])
    assert oracle.relative_error(result(merged, "w"), expected) < 4e-3


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20], ids=lambda s: f"{s:g}")
def test_ties_of_any_size(size):
    adapters = [adapter(n, s) for s, n in enumerate("ab")]
    plain = merge_adapters(adapters, method="ties")
    for one in adapters:
        for name, update in one.modules.items():
            one.modules[name] = LowRank(update.lora_a, update.lora_b.double() * size, 0.5)
    merged = merge_adapters(adapters, method="ties", scale=1 / size, dtype="float32")
    for module in SHAPES:
        assert oracle.relative_error(result(merged, module), result(plain, module)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"weights": [1, -1], "method": "linear"},
        {"weights": [1, -1], "method": "gam"},
        {"weights": [1, -1], "method": "ties"},
        {"density": 0, "method": "ties"},
        {"scale": 1e-200},
    ],
    ids=str,
)
def test_a_merge_that_is_zero_says_so(options):
    same = adapter("a", 1)
    (warning,) = merge_adapters([same, same], **options).report.warnings
    assert "the merged update is zero" in warning


def test_a_reference_without_weight_is_refused():
    with pytest.raises(OptionError, match="reference: adapter 'a' has weight 0"):
        merge_adapters(three(), weights=[0, 1, 1], reference=0)


def test_inputs_are_safe_wherever_the_merge_is_saved_from(tmp_path, monkeypatch):
    for name in ("bb", "cc"):
        adapter(name, modules={"w": (6, 5)}).save(tmp_path / "in" / name)
    monkeypatch.chdir(tmp_path / "in")
    merged = merge_adapters(["bb", "cc"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="holds the input"):
        merged.save("in/bb", overwrite=True)

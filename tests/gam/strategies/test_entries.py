"""The merges that thin out updates, against their papers on dense float64 updates."""

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.adapters import memory_adapter
from helpers.entries import dense, explicit, random_update, whole_numbers
from helpers.updates import dense as dense_pair
from helpers.updates import dense_product, factors, updates_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gam import merge_adapters
from gam.algebra.entrywise import kept_entries
from gam.errors import OptionError
from gam.strategies import STRATEGIES
from gam.strategies.core_ties import core_dare_ties
from gam.strategies.entries import (
    breadcrumbs,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    magnitude_prune,
    ties,
)
from gam.strategies.knots import knots_dare, knots_dare_ties
from gam.strategies.linear import linear

# --- the papers, literally ------------------------------------------------------------


def trim(delta, density, gamma=0.0):
    """Zero the outliers, then keep the largest of the rest; ties are kept on both sides."""
    magnitudes = np.sort(np.abs(delta), axis=None)[::-1]
    skip = math.floor(gamma * delta.size + 0.5)
    keep = min(kept_entries(density, delta.size), delta.size - skip)
    if keep == 0:
        return np.zeros_like(delta)
    size = np.abs(delta)
    within = (size >= magnitudes[skip + keep - 1]) & (size <= magnitudes[skip])
    return np.where(within, delta, 0.0)


def uniform(seed, module, adapter, shape):
    """The number from 0 to 1 of each entry, in 64-bit whole numbers of NumPy's."""
    digest = hashlib.sha256(json.dumps([seed, module, adapter]).encode()).digest()

    def mark(part, count):
        with np.errstate(over="ignore"):
            z = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            z = z + np.uint64(int.from_bytes(part, "big"))
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return ((z ^ (z >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)

    rows, columns = mark(digest[:8], shape[0]), mark(digest[8:16], shape[1])
    x = (rows[:, None] ^ columns) * np.uint32(0x7FEB352D)
    x ^= (x.view(np.int32) >> 15).view(np.uint32)
    x *= np.uint32(0x846CA68B)
    return (x.view(np.int32).astype(np.float64) + 2**31) / 2**32


def magprune(delta, density, numbers, epsilon=0.0):
    """Keep each entry with a probability that rises with its rank in the row; rescale."""
    epsilon = min(epsilon, 2 * density, 2 * (1 - density))
    k = delta.shape[1]
    ranks = np.argsort(np.argsort(np.abs(delta), axis=1, kind="stable"), axis=1)
    steps = ranks / (k - 1) - 0.5 if k > 1 else np.zeros_like(delta)
    probability = density + epsilon * steps
    kept = (numbers < probability) & (probability > 0)
    return np.divide(delta, probability, out=np.zeros_like(delta), where=kept)


def add_up(thinned, weights):
    return sum(weight * entries for weight, entries in zip(weights, thinned, strict=True))


def elect(thinned, weights):
    total = add_up(thinned, weights)
    agreeing, share = np.zeros_like(total), np.zeros_like(total)
    for weight, entries in zip(weights, thinned, strict=True):
        agrees = weight * entries * np.sign(total) > 0
        agreeing += np.where(agrees, weight * entries, 0)
        share += np.where(agrees, abs(weight), 0)
    return np.divide(agreeing, share, out=np.zeros_like(total), where=share > 0)


def drawn(items, density, seed, epsilon=0.0, module=0):
    return [
        magprune(delta, density, uniform(seed, i.modules[module], i.name, delta.shape), epsilon)
        for i, delta in ((item, dense(item, module)) for item in items)
    ]


def trimmed(items, density, gamma=0.0, module=0):
    return [trim(dense(item, module), density, gamma) for item in items]


PAPERS = {
    magnitude_prune: (add_up, trimmed, {}),
    breadcrumbs: (add_up, trimmed, {"gamma": 0.1}),
    dare_linear: (add_up, drawn, {"seed": 3}),
    dare_ties: (elect, drawn, {"seed": 3}),
    della: (elect, drawn, {"seed": 3, "epsilon": 0.3}),
    della_linear: (add_up, drawn, {"seed": 3, "epsilon": 0.3}),
}
METHODS = list(PAPERS)
NAMES = {strategy.load(): name for name, strategy in STRATEGIES.items()}
RANDOM = [method for method in METHODS if "seed" in PAPERS[method][2]]


def by_the_paper(method, items, weights, density, module=0):
    combine, thin, options = PAPERS[method]
    return combine(thin(items, density, **options, module=module), weights)


def merge(method, items, weights, density, dtype=torch.float64, module=0, **options):
    options = {**PAPERS[method][2], **options}
    result = method(items, weights, density=density, **options, dtype=dtype)
    rows = result.rows(module, 0, result.shape[0])
    assert rows.dtype == dtype
    return rows.numpy()


named = pytest.mark.parametrize("method", METHODS, ids=NAMES.get)
random = pytest.mark.parametrize("method", RANDOM, ids=NAMES.get)
WEIGHTS = [(1.0,), (-1.0,), (0.7, -0.3), (0.2, 0.0, -0.3, 0.5)]

# --- each against its paper -----------------------------------------------------------


@named
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(30, 20, 3), (17, 41, 5), (1, 9, 1), (5, 1, 1)], ids=str)
def test_follows_the_paper(method, shape, density, weights):
    items = [random_update(*shape, seed) for seed in range(len(weights))]
    expected = by_the_paper(method, items, weights, density)
    actual = merge(method, items, weights, density)
    assert np.array_equal(actual != 0, expected != 0)
    assert np.abs(actual - expected).max() <= 1e-12 * (1 + np.abs(expected).max())


# Sums only: where one vanishes, rounding would decide the sign that is elected.
@pytest.mark.parametrize(
    "method", [magnitude_prune, breadcrumbs, dare_linear, della_linear], ids=NAMES.get
)
@settings(deadline=None, max_examples=25)
@example(1, 1, [-2.0], 2.0e-311, 0)  # next to nothing, and its inverse would be infinite
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_follows_the_paper_where_magnitudes_are_equal(method, d, k, weights, density, seed):
    items = [whole_numbers(d, k, seed + i) for i in range(len(weights))]
    if any(weights):
        expected = by_the_paper(method, items, weights, density)
    else:
        expected = np.zeros((d, k))
    actual = merge(method, items, weights, density)
    assert np.abs(actual - expected).max() <= 1e-12 * (1 + np.abs(expected).max())


@named
def test_mixed_ranks_and_many_modules(method):
    items = [random_update(20, 30, rank, rank, m=3) for rank in (1, 2, 5)]
    options = PAPERS[method][2]
    result = method(items, [0.5, 0.3, 0.2], density=0.4, **options, dtype=torch.float64)
    for module in (2, 0, 1):
        expected = by_the_paper(method, items, [0.5, 0.3, 0.2], 0.4, module)
        assert np.abs(result.rows(module, 0, 20).numpy() - expected).max() <= 1e-11


@named
def test_float32_moves_few_entries(method):
    items = [random_update(200, 150, 8, seed) for seed in range(3)]
    exact = by_the_paper(method, items, [0.5, 0.3, 0.2], 0.4)
    rounded = merge(method, items, [0.5, 0.3, 0.2], 0.4, torch.float32)
    moved = np.abs(rounded - exact) > 1e-5 * np.abs(exact).max()
    assert moved.mean() < 1e-3


# --- what their mathematics promises --------------------------------------------------


@pytest.mark.parametrize(
    ("method", "alike"),
    [
        (magnitude_prune, lambda items, w: add_up(map(dense, items), w)),
        (dare_linear, lambda items, w: add_up(map(dense, items), w)),
        (della_linear, lambda items, w: add_up(map(dense, items), w)),
        (dare_ties, lambda items, w: elect([*map(dense, items)], w)),
        (della, lambda items, w: elect([*map(dense, items)], w)),
    ],
    ids=lambda value: NAMES.get(value, "") if callable(value) else "",
)
def test_at_density_one_nothing_is_dropped(method, alike):
    items = [random_update(20, 30, 3, seed) for seed in range(3)]
    weights = [0.5, -0.3, 0.2]
    assert merge(method, items, weights, 1.0) == pytest.approx(alike(items, weights), abs=1e-12)


def test_methods_that_coincide():
    items = [random_update(20, 30, 3, seed) for seed in range(3)]
    weights = [0.5, -0.3, 0.2]
    for method, options, other in (
        (breadcrumbs, {"gamma": 0.0}, magnitude_prune),
        (della, {"epsilon": 0.0}, dare_ties),
        (della_linear, {"epsilon": 0.0}, dare_linear),
    ):
        expected = merge(other, items, weights, 0.3)
        assert np.array_equal(merge(method, items, weights, 0.3, **options), expected)
    one = ties(items[:1], [1.0], density=0.3, dtype=torch.float64).rows(0, 0, 20)
    assert merge(magnitude_prune, items[:1], [1.0], 0.3) == pytest.approx(one.numpy(), rel=1e-12)


@named
def test_weight_zero_is_absence(method):
    items = [random_update(20, 30, 3, seed) for seed in range(3)]
    with_zero = merge(method, items, [0.5, 0.0, -0.2], 0.4)
    assert np.array_equal(with_zero, merge(method, items[::2], [0.5, -0.2], 0.4))
    assert not merge(method, items, [0.0, 0.0, 0.0], 0.4).any()


@named
def test_order_of_the_adapters(method):
    items = [random_update(20, 30, 3, seed) for seed in range(3)]
    expected = merge(method, items, [0.5, -0.3, 0.2], 0.4)
    actual = merge(method, items[::-1], [0.2, -0.3, 0.5], 0.4)
    assert actual == pytest.approx(expected, rel=1e-12, abs=1e-12)


@named
def test_homogeneous_and_odd(method):
    items = [random_update(20, 30, 3, seed) for seed in range(3)]
    expected = merge(method, items, [0.5, -0.3, 0.2], 0.4)
    assert np.array_equal(merge(method, items, [-0.5, 0.3, -0.2], 0.4), -expected)


def test_copies_of_one_adapter_are_trimmed_alike():
    item = random_update(20, 30, 3, 0)
    copies = merge(magnitude_prune, [item] * 3, [0.5, 0.3, 0.2], 0.4)
    assert copies == pytest.approx(merge(magnitude_prune, [item], [1.0], 0.4), rel=1e-12)


def test_copies_under_other_names_are_drawn_apart():
    one, other = (random_update(20, 30, 3, 0, name=name) for name in "ab")
    kept, others = (merge(dare_linear, [item], [1.0], 0.5) != 0 for item in (one, other))
    assert 0.4 < np.mean(kept == others) < 0.6


def test_outliers_of_one_size_are_kept_with_the_largest_that_is():
    item = explicit([[9.0, 4.0, -4.0, 3.0, 2.0, 1.0]])
    # One third dropped: 9 and one of the two 4s, but equal ones stay together.
    rows = merge(breadcrumbs, [item], [1.0], 1 / 3, gamma=1 / 3)
    assert rows.tolist() == [[0.0, 4.0, -4.0, 3.0, 0.0, 0.0]]
    assert merge(breadcrumbs, [item], [1.0], 1 / 3, gamma=1 / 6).tolist() == [[0, 4, -4, 0, 0, 0]]
    assert not merge(breadcrumbs, [item], [1.0], 0.5, gamma=1.0).any()


@random
def test_the_expectation_of_a_single_update_is_the_update(method):
    item = random_update(8, 9, 2, 0)
    rows = [merge(method, [item], [1.0], 0.6, seed=seed) for seed in range(400)]
    delta = dense(item)
    worst = np.abs(delta) * math.sqrt((1 / 0.45 - 1) / 400)
    assert (np.abs(np.mean(rows, axis=0) - delta) <= 6 * worst).all()


@random
def test_the_seed_and_the_names_decide(method):
    item = random_update(20, 30, 3, 0, m=2)
    first = merge(method, [item], [1.0], 0.5)
    assert not np.array_equal(first, merge(method, [item], [1.0], 0.5, seed=4))
    kept = first != 0
    assert np.mean(kept == (merge(method, [item], [1.0], 0.5, module=1) != 0)) < 0.7


# --- whole merges ---------------------------------------------------------------------

SHAPES = {f"layers.{i}.{name}": (12, 10, 3) for i in range(3) for name in ("up", "down")}


def whole_merge(
    names="abc", method="dare_linear", modules=SHAPES, input_dtype=torch.float32, **options
):
    adapters = [
        memory_adapter(modules, dtype=input_dtype, seed=ord(name), name=name) for name in names
    ]
    return merge_adapters(adapters, method=method, rank=10, density=0.5, **options)


def test_other_modules_do_not_change_a_draw():
    few = dict(list(SHAPES.items())[:1])
    (name,) = few
    tensors = [memory_adapter(few, seed=ord(n), name=n) for n in "abc"]
    alone = merge_adapters(tensors, method="della", rank=10).modules[name].delta()
    extra = {**few, "layers.9.other": (12, 10, 3)}
    more = [memory_adapter(extra, seed=ord(n), name=n) for n in "abc"]
    together = merge_adapters(more, method="della", rank=10).modules[name].delta()
    assert torch.equal(alone, together)


def test_order_of_the_adapters_in_a_whole_merge():
    expected, actual = whole_merge("abc"), whole_merge("cab")
    for name, module in expected.modules.items():
        torch.testing.assert_close(actual.modules[name].delta(), module.delta())


def test_a_module_that_an_adapter_lacks():
    name = "layers.0.up"
    few = memory_adapter({"layers.1.up": (12, 10, 3)}, seed=1, name="b")
    full = memory_adapter(SHAPES, seed=ord("a"), name="a")
    merged = merge_adapters([full, few], method="dare_linear", rank=10, density=0.5)
    alone = merge_adapters([full], method="dare_linear", rank=10, density=0.5)
    half = 0.5 * alone.modules[name].delta()
    torch.testing.assert_close(merged.modules[name].delta(), half)


def test_the_seed_is_recorded_only_where_it_is_used():
    assert whole_merge(seed=7).report.options["seed"] == 7
    assert whole_merge().report.options["seed"] == 0
    assert "seed" not in whole_merge(method="magnitude_prune").report.options
    with pytest.raises(OptionError, match="'magnitude_prune' has no parameter 'seed'"):
        whole_merge(method="magnitude_prune", seed=7)


def test_strategies():
    for method in METHODS:
        strategy = STRATEGIES[NAMES[method]]
        assert strategy.load() is method
        assert set(PAPERS[method][2]) | {"density"} == set(strategy.check({}, []))
    for name, value in (("density", 1.1), ("epsilon", -0.1), ("seed", 0.5), ("seed", -1)):
        with pytest.raises(OptionError, match=f"{name} of method 'della'"):
            STRATEGIES["della"].check({name: value}, [])


@pytest.mark.parametrize("density", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, -0.3)], ids=str)
@pytest.mark.parametrize("method", [knots_dare_ties, knots_dare])
def test_dare_inside_knots_is_that_of_the_authors(method, weights, density):
    """Section 4 of arXiv 2410.19735, DARE on the aligned S V_i^T, strongest row first."""
    pairs = [factors(14, 20, 3, seed) for seed in range(2)]
    items = [replace(update, modules=["m"]) for update in updates_of(pairs)]
    u, s, vt = np.linalg.svd(np.hstack([dense_pair(*pair) for pair in pairs]))
    aligned = np.split(s[:6, None] * vt[:6], 2, axis=1)
    thinned = [
        magprune(rows, density, uniform(3, "m", item.name, rows.shape))
        for rows, item in zip(aligned, items, strict=True)
    ]
    expected = u[:, :6] @ (elect if method is knots_dare_ties else add_up)(thinned, weights)
    result = dense_product(items, method(items, weights, density=density, seed=3))
    assert np.abs(result - expected).max() <= 1e-9 * max(np.abs(expected).max(), 1e-300)


def test_dare_inside_knots_that_drops_nothing_is_the_average():
    items = [
        replace(update, modules=["m"])
        for update in updates_of([factors(14, 20, 3, seed) for seed in range(3)])
    ]
    weights = [0.5, 0.8, -0.3]
    result = dense_product(items, knots_dare(items, weights, density=1.0, seed=3))
    assert np.abs(result - dense_product(items, linear(items, weights))).max() < 1e-10


@pytest.mark.parametrize("density", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, -0.3)], ids=str)
def test_dare_in_the_core_space(weights, density):
    """Algorithm 1 of arXiv 2509.17786 on the factors, DARE and TIES between the cores."""
    pairs = [factors(14, 20, 3, seed) for seed in range(2)]
    items = [replace(update, modules=["m"]) for update in updates_of(pairs)]
    known = [(b.double().numpy(), a.double().numpy()) for b, a in pairs]
    left = np.linalg.svd(np.hstack([b for b, _ in known]))[0][:, :6]
    right = np.linalg.svd(np.vstack([a for _, a in known]))[2][:6]
    thinned = [
        magprune(core, density, uniform(3, "m", item.name, core.shape))
        for core, item in (
            (left.T @ b @ a @ right.T, item) for (b, a), item in zip(known, items, strict=True)
        )
    ]
    expected = left @ elect(thinned, weights) @ right
    result = dense_product(items, core_dare_ties(items, weights, density=density, seed=3))
    assert np.abs(result - expected).max() <= 1e-9 * max(np.abs(expected).max(), 1e-300)

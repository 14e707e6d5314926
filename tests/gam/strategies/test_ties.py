"""`ties` against the paper's three steps on dense float64 updates, and the rules it adds."""

import functools
import math

import numpy as np
import pytest
import torch
from helpers.entries import dense, explicit, random_update, update, whole, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from gam.algebra.entrywise import kept_entries
from gam.algebra.updates import Basis, Side, Update
from gam.errors import OptionError
from gam.strategies import STRATEGIES
from gam.strategies.entries import ties
from gam_kernels.lowrank import Streamed, low_rank
from gam_kernels.select import block_rows


def merge(updates, weights, density, dtype=torch.float64, module=0):
    result = ties(updates, weights, density=density, dtype=dtype)
    rows = result.rows(module, 0, result.shape[0])
    assert rows.dtype == dtype
    assert rows.shape == result.shape
    return rows.numpy()


def trim(delta, density):
    magnitudes = np.sort(np.abs(delta), axis=None)[::-1]
    count = kept_entries(density, delta.size)
    if count == 0:
        return np.zeros_like(delta)
    return np.where(np.abs(delta) >= magnitudes[count - 1], delta, 0.0)


def by_the_paper(deltas, weights, density):
    trimmed = [weight * trim(delta, density) for delta, weight in zip(deltas, weights, strict=True)]
    elected = np.sign(sum(trimmed))
    total, share = np.zeros_like(elected), np.zeros_like(elected)
    for entries, weight in zip(trimmed, weights, strict=True):
        agrees = (np.sign(entries) == elected) & (elected != 0)
        total += np.where(agrees, entries, 0.0)
        share += np.where(agrees, abs(weight), 0.0)
    return np.divide(total, share, out=np.zeros_like(total), where=share > 0)


WEIGHTS = [
    (1.0,),
    (-1.0,),
    (0.5, 0.5),
    (0.7, -0.3),
    (1 / 3, 1 / 3, 1 / 3),
    (0.5, 0.3, 0.2),
    (0.2, 0.0, -0.3, 0.5),
    (0.2, 0.1, 0.1),  # a fourth adapter lacks the module
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(30, 20, 3), (17, 41, 5), (1, 9, 1)], ids=str)
def test_follows_the_paper(shape, density, weights):
    updates = [random_update(*shape, seed) for seed in range(len(weights))]
    expected = by_the_paper([dense(item) for item in updates], weights, density)
    actual = merge(updates, weights, density)
    assert np.array_equal(actual != 0, expected != 0)
    assert np.abs(actual - expected).max() <= 1e-12


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_follows_the_paper_where_ties_abound(d, k, weights, density, seed):
    updates = [whole_numbers(d, k, seed + i) for i in range(len(weights))]
    expected = by_the_paper([dense(item) for item in updates], weights, density)
    for dtype in (torch.float32, torch.float64):
        actual = merge(updates, weights, density, dtype)
        assert np.array_equal(actual != 0, expected != 0)
        assert np.abs(actual - expected).max() <= 4 * torch.finfo(dtype).eps * 4


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((0.5, 0.5), [[3.0, -4.0, 0.0, 5.0]]),
        ((0.25, 0.75), [[-2.0, -4.0, 1.0, 5.0]]),
        ((0.5, -0.5), [[2.5, -4.0, -1.0, 5.0]]),
    ],
)
def test_by_hand(weights, expected):
    first = explicit([[3.0, -4.0, -1.0, 5.0]])
    second = explicit([[-2.0, 0.0, 1.0, 0.0]])
    assert merge([first, second], weights, 1.0) == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("density", "count", "kept"),
    [
        (0.0, 10, 0),
        (1e-9, 10, 1),
        (0.1, 3, 1),
        (0.5, 5, 3),
        (0.5, 6, 3),
        (0.14, 10, 1),
        (0.16, 10, 2),
        (0.2, 4096 * 12288, 10066330),
        (1.0, 7, 7),
    ],
)
def test_kept_entries_rounds_halves_up_and_keeps_one(density, count, kept):
    assert kept_entries(density, count) == kept
    if count < 100:
        delta = explicit([list(range(1, count + 1))])
        assert np.count_nonzero(merge([delta], [1.0], density)) == kept


def test_entries_equal_to_the_smallest_kept_are_all_kept():
    delta = explicit([[5.0, -2.0, 2.0, 1.0, 2.0]])
    assert merge([delta], [1.0], 0.4).tolist() == [[5.0, -2.0, 2.0, 0.0, 2.0]]


def test_zeros_are_never_kept():
    first = explicit([[5.0, 0.0, 0.0, 0.0]])
    second = explicit([[1.0, 2.0, 0.0, -1.0]])
    # Three of the first are asked for; its zeros must not thin the mean of the second.
    assert merge([first, second], [0.5, 0.5], 0.75).tolist() == [[3.0, 2.0, 0.0, -1.0]]


def test_a_tied_sign_is_zero():
    first = explicit([[1.0, -1.0, 3.0]])
    second = explicit([[-1.0, 1.0, 1.0]])
    for dtype in (torch.float32, torch.float64):
        assert merge([first, second], [0.5, 0.5], 1.0, dtype).tolist() == [[0.0, 0.0, 2.0]]


def test_an_update_and_its_opposite_cancel_in_float32():
    left, right = torch.randn(40, 4), torch.randn(30, 4)
    pair = [update(left, right), update(-left, right)]
    assert not merge(pair, [0.5, 0.5], 0.3, torch.float32).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_adapter_untrimmed_is_itself(dtype):
    item = random_update(50, 30, 4, 0)
    expected = dense(item)
    actual = merge([item], [1.0], 1.0, dtype)
    scale = np.abs(expected).max()
    assert np.abs(actual - expected).max() <= 10 * torch.finfo(dtype).eps * scale


def test_a_lone_adapter_does_not_shrink():
    item = random_update(50, 30, 4, 0)
    assert merge([item], [0.25], 0.3) == pytest.approx(merge([item], [1.0], 0.3), rel=1e-12)


shapes = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 4))
seeds = st.integers(0, 10**6)
densities = st.floats(0.01, 1)
signed = st.floats(0.1, 1) | st.floats(-1, -0.1)


@settings(deadline=None, max_examples=30)
@given(
    shapes, seeds, densities, st.lists(signed, min_size=3, max_size=3), st.permutations(range(3))
)
def test_order_of_the_adapters(shape, seed, density, weights, order):
    updates = [random_update(*shape, seed + i) for i in range(3)]
    other = merge([updates[i] for i in order], [weights[i] for i in order], density)
    assert merge(updates, weights, density) == pytest.approx(other, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(shapes, seeds, densities, st.lists(signed, min_size=2, max_size=2))
def test_weight_zero_is_absence(shape, seed, density, weights):
    updates = [random_update(*shape, seed + i) for i in range(3)]
    with_zero = merge(updates, [weights[0], 0.0, weights[1]], density)
    assert np.array_equal(with_zero, merge(updates[::2], weights, density))


@settings(deadline=None, max_examples=30)
@given(shapes, seeds, densities, st.lists(signed, min_size=3, max_size=3), st.integers(-20, 20))
def test_homogeneous_and_odd(shape, seed, density, weights, exponent):
    parts = [random_update(*shape, seed + i) for i in range(3)]
    expected = merge(parts, weights, density)
    factor = 2.0**exponent
    for sign in (1, -1):
        scaled = [update(sign * factor * whole(item.left), whole(item.right)) for item in parts]
        assert np.array_equal(merge(scaled, weights, density), sign * factor * expected)
    negated = merge(parts, [-weight for weight in weights], density)
    assert np.array_equal(negated, -expected)


@settings(deadline=None, max_examples=30)
@given(shapes, seeds, densities)
def test_copies_of_one_adapter_are_that_adapter(shape, seed, density):
    item = random_update(*shape, seed)
    copies = merge([item] * 3, [0.5, 0.3, 0.2], density)
    assert copies == pytest.approx(merge([item], [1.0], density), rel=1e-12)


def test_gauge_and_core_are_used():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bases = []
    for width in (30, 20):
        factor, gauge = draw(1, width, 5), draw(1, 5, 3)
        side = Side([[factor[0]]], factor.dtype, [gauge], draw(1, 3, 3))
        bases.append(Basis(side, 0, slice(0, 3), gauge))
    item = Update("a", bases[0], draw(1, 3, 3), bases[1], 5)
    expected = by_the_paper([dense(item)], [1.0], 0.3)
    assert np.abs(merge([item], [1.0], 0.3) - expected).max() <= 1e-12 * np.abs(expected).max()


def test_every_module_of_a_batch_in_any_order():
    updates = [random_update(20, 30, 3, seed, m=4) for seed in range(2)]
    result = ties(updates, [0.5, 0.5], density=0.3, dtype=torch.float64)
    assert result.modules == 4
    for module in (2, 0, 3, 1, 2):
        expected = by_the_paper([dense(item, module) for item in updates], [0.5, 0.5], 0.3)
        actual = result.rows(module, 0, 20).numpy()
        assert np.abs(actual - expected).max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_are_the_same_bits_however_they_are_asked_for(dtype):
    d, k = 400, 1000
    height = block_rows(k)
    assert 3 * height < d
    result = ties(
        [random_update(d, k, 8, i) for i in range(2)], [0.6, 0.4], density=0.2, dtype=dtype
    )
    whole = result.rows(0, 0, d)
    kept = whole.clone()
    for start, stop in [
        (0, 1),
        (399, 400),
        (height - 1, height + 1),
        (7, 333),
        (height, 2 * height),
    ]:
        assert torch.equal(result.rows(0, start, stop), whole[start:stop])
    assert torch.equal(whole, kept)


def test_trimming_sees_the_bits_of_the_threshold():
    for seed in range(5):
        d, k = 211, 1009
        result = ties([random_update(d, k, 7, seed)], [0.7], density=0.2)
        assert int(result.rows(0, 0, d).count_nonzero()) == kept_entries(0.2, d * k)


def test_float32_moves_few_entries_and_those_little():
    updates = [random_update(500, 400, 16, seed) for seed in range(3)]
    weights = [1 / 3] * 3
    exact = merge(updates, weights, 0.2)
    rounded = merge(updates, weights, 0.2, torch.float32)
    scale = np.abs(exact).max()
    moved = np.abs(rounded - exact) > 1e-5 * scale
    assert moved.mean() < 1e-4
    assert np.linalg.norm(rounded - exact) < 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("rank", [4, 8, 24])
@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_its_low_rank_approximation_is_near_optimal(shared, density, rank):
    common = random_update(400, 300, 8, 0)
    decay = torch.exp(-torch.arange(8) / 4.0)
    updates = []
    for seed in (1, 2, 3):
        own = random_update(400, 300, 8, seed)
        left, right = (
            torch.linalg.qr(shared * whole(ours) + (1 - shared) * whole(theirs)).Q
            for ours, theirs in ((common.left, own.left), (common.right, own.right))
        )
        updates.append(update(left * decay, right))
    result = ties(updates, [1 / 3] * 3, density=density)
    start = torch.cat([item.right.dense(0) for item in updates], dim=1)
    matrix = Streamed(functools.partial(result.rows, 0), result.shape)
    _, right = low_rank(matrix, rank, start=start)
    energies = torch.linalg.svdvals(result.rows(0, 0, 400).double()).square()
    assert matrix.squared_norm == pytest.approx(float(energies.sum()), rel=1e-6)
    assert 0.999 <= float(right.double().square().sum() / energies[:rank].sum()) <= 1 + 1e-5


def test_nobody_votes():
    updates = [random_update(5, 6, 2, seed) for seed in range(2)]
    assert not merge(updates, [0.0, 0.0], 0.5).any()


def test_weights_must_match():
    with pytest.raises(ValueError, match="zip"):
        ties([random_update(5, 6, 2, 0)], [0.5, 0.5], density=0.5)


def test_strategy():
    strategy = STRATEGIES["ties"]
    assert strategy.load() is ties
    assert "2306.01708" in strategy.paper
    assert strategy.check({}, []) == {"density": 0.2}
    assert strategy.check({"density": "1"}, []) == {"density": 1.0}
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(OptionError, match="density of method 'ties'"):
            strategy.check({"density": wrong}, [])

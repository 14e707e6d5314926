"""Re-factorisation against a dense SVD."""

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.updates import dense, factors, refactored, updates_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gam.algebra.factorize import choose_rank
from gam.strategies.linear import linear


def merged(pairs, weights, rank, scale=1.0):
    updates = updates_of(pairs)
    return refactored(updates, linear(updates, weights), rank, scale)


def truncated(pairs, weights, rank):
    b, a, _ = merged(pairs, weights, rank)
    return (b @ a).numpy()


weights = st.lists(st.integers(-20, 20).map(lambda i: i / 10), min_size=3, max_size=3).filter(any)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), weights, st.integers(1, 12))
def test_linear_is_the_best_approximation_of_the_weighted_sum(seed, weights, rank):
    pairs = [factors(30, 24, r, 1000 * seed + i) for i, r in enumerate((5, 3, 4))]
    deltas = [dense(*pair) for pair in pairs]
    expected = oracle.linear(deltas, weights, rank)
    result = truncated(pairs, weights, rank)
    size = np.linalg.norm(oracle.linear(deltas, weights))
    assert np.linalg.norm(result - expected) < 1e-7 * size


@pytest.mark.parametrize("cond", [1, 1e4, 1e6], ids=lambda c: f"{c:g}")
def test_linear_with_ill_conditioned_factors(cond):
    pairs = [factors(40, 30, 5, i, cond_b=cond, cond_a=cond) for i in range(3)]
    expected = oracle.linear([dense(*pair) for pair in pairs], [0.5, 0.3, -0.2])
    result = truncated(pairs, [0.5, 0.3, -0.2], 15)
    assert oracle.relative_error(result, expected) < 1e-6


@pytest.mark.parametrize("difference", [1e-2, 1e-4, 1e-6], ids=lambda d: f"{d:g}")
def test_difference_of_near_equal_adapters_is_exact(difference):
    b, a = (t.double() for t in factors(30, 24, 4, 1))
    db, _ = (t.double() for t in factors(30, 24, 4, 2))
    near = (b + difference * db, a)
    expected = dense(b, a) - dense(*near)
    result = truncated([(b, a), near], [1.0, -1.0], 8)
    assert oracle.relative_error(result, expected) < 1e-6


def test_exact_cancellation_is_zero():
    pair = factors(30, 24, 4, 1)
    result = truncated([pair, pair], [0.5, -0.5], 4)
    assert np.abs(result).max() < 1e-7


@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_factors_are_balanced_and_orthogonal(scale):
    pairs = [factors(30, 24, 4, i) for i in range(2)]
    b, a, spectrum = merged(pairs, [0.6, 0.4], 6, scale)
    wanted = torch.diag_embed(spectrum.values[0])
    size = spectrum.values.max()
    assert (b.mT @ b - wanted).abs().max() < 1e-9 * size
    assert (a @ a.mT - wanted).abs().max() < 1e-9 * size
    expected = scale * oracle.linear([dense(*pair) for pair in pairs], [0.6, 0.4], 6)
    assert oracle.relative_error((b @ a).numpy(), expected) < 1e-8


def test_rank_past_the_true_one_is_zeros():
    b, a, _ = merged([factors(30, 24, 3, 1)], [1.0], 5)
    assert b.shape == (30, 5)
    assert a.shape == (5, 24)
    assert not b[..., 3:].any()
    assert not a[3:].any()


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (0.8, 1), (0.81, 2), (0.99, 2), (0.9999, 3), (1.0, 3)]
)
def test_energy_chooses_the_smallest_rank(energy, rank):
    values = torch.tensor([0.8, 0.19, 0.01, 0.0], dtype=torch.float64).sqrt()
    assert choose_rank(values, energy, 1.0) == rank


def test_energy_is_that_of_the_whole():
    values = torch.tensor([0.5, 0.2, 0.1, 0.0], dtype=torch.float64).sqrt()
    assert choose_rank(values, 0.5, 1.0) == 1
    assert choose_rank(values, 0.6, 1.0) == 2
    assert choose_rank(values, 0.9, 1.0) == 3
    assert choose_rank(torch.zeros(3, dtype=torch.float64), 0.9, 0.0) == 1

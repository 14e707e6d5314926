"""Measures of subspaces on constructions that are known exactly, and the nulls by simulation."""

import math

import numpy as np
import pytest
import torch

from gam.adapter import LowRank
from gam.inspection import geometry


def haar(generator, *shape):
    """Random orthonormal columns, [..., d, r]."""
    return np.linalg.qr(generator.standard_normal(shape))[0]


def mean_and_error(values):
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


RANKS = [(1, 1, 24), (1, 4, 24), (2, 2, 40), (3, 5, 40), (8, 8, 64), (8, 16, 64), (20, 24, 32)]


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_nulls_are_the_means_of_random_spaces(ranks):
    p, q, d = ranks
    generator = np.random.default_rng(5)
    u, v = haar(generator, 4000, d, p), haar(generator, 4000, d, q)
    cosines = np.linalg.svd(u.transpose(0, 2, 1) @ v, compute_uv=False)
    least = min(p, q)

    mean, error = mean_and_error((cosines**2).sum(-1) / least)
    assert abs(mean - geometry.overlap_null(p, q, d)) < 4 * error

    mean, error = mean_and_error(cosines.mean(-1))
    # What is left of the expansion in 1 / rank.
    bias = 0.16 / least**2 * mean if least > 1 else 0.0
    assert abs(mean - geometry.aligned_null(p, q, d)) < 4 * error + bias
    assert geometry.aligned_null(q, p, d) == geometry.aligned_null(p, q, d)

    mean, error = mean_and_error(np.abs((u[..., :1] * v[..., :1]).sum((1, 2))))
    assert abs(mean - geometry.paired_null(d)) < 4 * error


def test_nulls_of_whole_spaces_are_one():
    assert geometry.overlap_null(3, 8, 8) == 1
    assert geometry.aligned_null(3, 8, 8) == 1
    assert geometry.aligned_null(8, 8, 8) == 1


def test_null_of_large_spaces_is_the_quarter_circle_law():
    # Singular values of a square Gaussian matrix have the mean 8 / (3 pi) sqrt(r), up to 1/r.
    expected = 8 / (3 * math.pi) * math.sqrt(64 / 4096)
    assert geometry.aligned_null(64, 64, 4096) == pytest.approx(expected, rel=0.01)


def test_cosines_of_random_updates_spread_as_stated():
    generator = np.random.default_rng(6)
    values = [3.0, 1.0, 0.2]
    first, second = (
        np.einsum(
            "bdr,r,bkr->bdk", haar(generator, 3000, 12, 3), values, haar(generator, 3000, 9, 3)
        )
        for _ in range(2)
    )
    cosines = (first * second).sum((1, 2)) / sum(v * v for v in values)
    mean, error = mean_and_error(cosines)
    assert abs(mean) < 4 * error
    square, error = mean_and_error(cosines**2)
    assert abs(square - 1 / (12 * 9)) < 4 * error


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [1.0, 0.0]], ids=str)
def test_effective_rank_of_equal_values_is_their_number(values):
    found = geometry.effective_rank(torch.tensor([values], dtype=torch.float64))
    assert found.tolist() == pytest.approx([sum(value > 0 for value in values)])


def low_rank(generator, out, width, rank=3, scale=1.0):
    a, b = (torch.from_numpy(generator.standard_normal(s)) for s in ((rank, width), (out, rank)))
    return LowRank(a, b, scale)


def dense_conflict(first, second):
    one, two = (
        np.sign(u.scale * u.lora_b.double().numpy() @ u.lora_a.double().numpy())
        for u in (first, second)
    )
    return (one * two < 0).mean()


def test_sign_conflicts_are_exact_where_the_module_is_small():
    ones = LowRank(torch.ones(1, 4), torch.ones(8, 1))
    mixed = LowRank(torch.ones(1, 4), torch.tensor([[-1.0]] * 3 + [[0.0]] * 2 + [[1.0]] * 3))
    negative = LowRank(torch.ones(1, 4), torch.ones(8, 1), -2.0)
    found = geometry.sign_conflicts("m", [ones, mixed, negative])
    assert found.exact
    assert found.rates.tolist() == [[0, 3 / 8, 1], [3 / 8, 0, 3 / 8], [1, 3 / 8, 0]]
    assert found.errors.count_nonzero() == 0


def test_sampled_sign_conflicts_are_within_their_standard_errors():
    generator = np.random.default_rng(7)
    scores = []
    for index in range(40):
        first = low_rank(generator, 520, 400)
        noise = low_rank(generator, 520, 400)
        second = LowRank(first.lora_a + 0.5 * noise.lora_a, first.lora_b + 0.5 * noise.lora_b, -3.0)
        found = geometry.sign_conflicts(f"layer.{index}", [first, second])
        assert not found.exact
        scores.append((found.rates[0, 1] - dense_conflict(first, second)) / found.errors[0, 1])
        again = geometry.sign_conflicts(f"layer.{index}", [first, second])
        assert torch.equal(again.rates, found.rates)
    # Standard scores: their mean square is 1, within the spread of 40 of them.
    assert np.mean(np.square(scores)) == pytest.approx(1, abs=4 * math.sqrt(2 / 40))


def test_cosine_of_lora_a():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.ones(3, 2)
    assert geometry.a_cosine(LowRank(a, b), LowRank(2 * a, b)) == pytest.approx(1)
    assert geometry.a_cosine(LowRank(a, b), LowRank(a.flip(0), b)) == 0
    assert math.isnan(geometry.a_cosine(LowRank(a, b), LowRank(a[:1], b[:, :1])))
    assert math.isnan(geometry.a_cosine(LowRank(a, b), LowRank(0 * a, b)))

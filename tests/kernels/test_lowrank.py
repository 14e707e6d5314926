"""`low_rank` against the singular value decomposition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gam_kernels.lowrank import Streamed, low_rank
from gam_kernels.select import block_rows


def run(matrix, rank, dense_bytes=2**29, **options):
    streamed = Streamed(lambda a, b: matrix[a:b], tuple(matrix.shape), dense_bytes)
    return *low_rank(streamed, rank, **options), streamed.squared_norm


def noisy(d, k, signal, dtype=torch.float32):
    """A few strong directions over a bulk that decays slowly, as TIES leaves it."""
    left = torch.linalg.qr(torch.randn(d, signal, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(k, signal, dtype=torch.float64)).Q
    values = torch.exp(-torch.arange(signal) / 6.0).double()
    bulk = torch.randn(d, k, dtype=torch.float64) * (torch.rand(d, k) < 0.2)
    matrix = (left * values) @ right.mT + bulk / torch.linalg.matrix_norm(bulk)
    return matrix.to(dtype), (right + 0.3 / k**0.5 * torch.randn(k, signal)).to(dtype)


def energies(matrix):
    return torch.linalg.svdvals(matrix.double()).square()


def assert_near_optimal(matrix, rank, bound=1e-3, **options):
    left, right, squared_norm = run(matrix, rank, **options)
    values = energies(matrix)
    best = float(values[:rank].sum())
    kept = float(right.double().square().sum())
    # Rounding of the entries' dtype can make the energy look larger than it is.
    assert (1 - bound) * best <= kept <= (1 + 1e-5) * best
    assert squared_norm == pytest.approx(float(matrix.double().square().sum()), rel=1e-12)
    error = (matrix.double() - left.double() @ right.double().mT).square().sum()
    assert float(error) == pytest.approx(squared_norm - kept, rel=1e-4, abs=1e-6 * squared_norm)


def assert_truncated_svd(left, right):
    """Orthonormal left, orthogonal right of decreasing norm."""
    eps = torch.finfo(left.dtype).eps
    left, right = left.double(), right.double()
    eye = torch.eye(left.shape[1], dtype=torch.float64)
    assert (left.mT @ left - eye).abs().max() < 100 * eps
    gram = right.mT @ right
    lengths = gram.diagonal()
    assert (gram - torch.diag(lengths)).abs().max() <= 200 * eps * lengths.max()
    assert (lengths.diff() <= 100 * eps * lengths.max()).all()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (256, 256)], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 24, 60])
@pytest.mark.parametrize("given_start", [True, False], ids=["start", "random"])
def test_energy_is_near_optimal(shape, rank, given_start):
    matrix, start = noisy(*shape, 24)
    assert_near_optimal(matrix, rank, start=start if given_start else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_a_truncated_svd(dtype):
    matrix, start = noisy(150, 120, 10, dtype)
    left, right, _ = run(matrix, 20, start=start)
    assert left.shape == (150, 20)
    assert right.shape == (120, 20)
    assert left.dtype == right.dtype == dtype
    assert_truncated_svd(left, right)


def test_all_iterations_converge():
    matrix, _ = noisy(150, 120, 10, torch.float64)
    assert_near_optimal(matrix, 10, bound=1e-9, tolerance=0, iterations=40)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 8),
    st.floats(1, 1e4),
    st.integers(0, 10**6),
)
def test_exactly_low_rank_is_recovered(d, k, rank, condition, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(d, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(k, rank, generator=generator, dtype=torch.float64)
    values = torch.logspace(0, -1, rank, base=condition, dtype=torch.float64)
    matrix = ((left * values) @ right.mT).float()
    left, right, squared_norm = run(matrix, rank)
    error = torch.linalg.matrix_norm(matrix.double() - left.double() @ right.double().mT)
    assert float(error) <= 1e-6 * squared_norm**0.5
    assert_truncated_svd(left, right)


def test_zero():
    left, right, squared_norm = run(torch.zeros(30, 20), 4)
    assert squared_norm == 0
    assert torch.equal(right, torch.zeros(20, 4))
    assert_truncated_svd(left, right)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7), (1, 6), (6, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("rank", [7, 100])
def test_rank_beyond_the_smaller_side_is_exact(shape, rank):
    matrix = torch.randn(*shape)
    left, right, _ = run(matrix, rank)
    assert left.shape == (shape[0], min(rank, *shape))
    torch.testing.assert_close(left @ right.mT, matrix)


def test_start_may_be_wide_dependent_and_of_any_scale():
    matrix, start = noisy(200, 150, 12)
    start = torch.cat((start, start, torch.zeros(150, 2), 1e-20 * start), dim=1)
    assert_near_optimal(matrix, 12, start=start)
    assert_near_optimal(matrix, 12, start=torch.cat([start] * 4, dim=1).double())
    assert_near_optimal(matrix, 12, start=torch.zeros(150, 0))


def test_a_useless_start_does_no_harm():
    matrix, _ = noisy(200, 150, 12)
    away = torch.linalg.svd(matrix, full_matrices=True).Vh[-40:].mT
    assert_near_optimal(matrix, 12, start=away)


@pytest.mark.parametrize("shape", [(300, 1000), (1000, 300)], ids=str)
def test_streamed_and_resident_agree(shape):
    matrix, start = noisy(*shape, 12)
    assert block_rows(shape[1]) < shape[0]
    kept = run(matrix, 16, start=start)
    streamed = run(matrix, 16, start=start, dense_bytes=0)
    assert kept[2] == streamed[2]
    scale = kept[2] ** 0.5
    difference = kept[0] @ kept[1].mT - streamed[0] @ streamed[1].mT
    assert float(torch.linalg.matrix_norm(difference)) < 1e-4 * scale
    energy, other = (float(side.square().sum()) for side in (kept[1], streamed[1]))
    assert energy == pytest.approx(other, rel=1e-5)


def test_resident_reads_the_matrix_once():
    matrix, _ = noisy(300, 1000, 12)
    seen = []

    def rows(start, stop):
        seen.append((start, stop))
        return matrix[start:stop]

    low_rank(Streamed(rows, (300, 1000)), 16)
    height = block_rows(1000)
    assert seen[0] == (0, 1)
    assert seen[1:] == [(a, min(a + height, 300)) for a in range(0, 300, height)]


def test_is_deterministic_and_leaves_the_global_seed_alone():
    matrix, start = noisy(200, 150, 12)
    torch.manual_seed(1)
    first = run(matrix, 16, start=start)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = run(matrix, 16, start=start)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (0, {}, "got 0 and 12, expected both to be at least 1"),
        (1, {"iterations": 0}, "got 1 and 0, expected both to be at least 1"),
        (1, {"start": torch.zeros(4, 1)}, r"start: got shape \(4, 1\), expected \(5, s\)"),
        (1, {"start": torch.zeros(5)}, r"start: got shape \(5,\), expected \(5, s\)"),
    ],
)
def test_refusals(rank, options, message):
    with pytest.raises(ValueError, match=message):
        run(torch.zeros(4, 5), rank, **options)

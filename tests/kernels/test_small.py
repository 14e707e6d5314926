"""Gram matrices, orthonormalisation and polar factors against float64 linear algebra."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.updates import factors
from threadpoolctl import threadpool_info

from gam_kernels import combine, combine_gram, gram, orthonormalize, orthonormalize_gram, polar
from gam_kernels.combine import reference as combine_reference
from gam_kernels.gram import reference as gram_reference


def tall(d, r, cond=1.0, seed=0):
    return factors(d, 1, r, seed, cond_b=cond, dtype=torch.float64)[0]


GRAMS = {"op": gram, "reference": gram_reference.gram}
COMBINES = {"op": combine, "reference": combine_reference.combine}
WIDTHS = [(1,), (3, 0, 2), (64, 33), (130, 127)]
LONG = [5, 50, 3000]


def parts(length, widths, dtype=torch.float64, transposed=False, modules=2):
    """Factors of several modules, their rows or their columns contiguous."""
    return [
        [
            torch.randn(w, length).to(dtype).mT if transposed else torch.randn(length, w).to(dtype)
            for w in widths
        ]
        for _ in range(modules)
    ]


def joined(factors):
    return torch.stack([torch.cat([part.double() for part in row], dim=1) for row in factors])


@pytest.mark.parametrize("function", GRAMS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize(
    ("source", "working", "bound"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.bfloat16, torch.float64, 1e-14),
        (torch.bfloat16, torch.float32, 1e-6),
        (torch.float16, torch.float32, 1e-6),
    ],
    ids=str,
)
def test_gram(source, working, bound, length, widths, transposed, function):
    factors = parts(length, widths, source, transposed)
    result = GRAMS[function](factors, working)
    whole = joined(factors)
    expected = np.einsum("mdp,mdq->mpq", whole.numpy(), whole.numpy())
    lengths = whole.norm(dim=1).numpy()
    assert result.dtype == torch.float64
    assert torch.equal(result, result.mT)
    limits = bound * lengths[:, :, None] * lengths[:, None] * max(1, length**0.5)
    assert (np.abs(result.numpy() - expected) <= limits).all()


PAIRS = [
    [],
    [(0, 0)],
    [(0, 0), (1, 1), (2, 2), (3, 3), (0, 2), (2, 1), (2, 3)],
    [(0, 1), (0, 2), (3, 0), (0, 3), (0, 0)],
    [(1, 2), (1, 3)],
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pairs", PAIRS, ids=str)
def test_gram_of_some_pairs(pairs, transposed, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    factors = parts(300, (3, 4, 0, 5), torch.bfloat16, transposed)
    whole = joined(factors)
    expected = whole.mT @ whole
    owners = torch.tensor([0] * 3 + [1] * 4 + [3] * 5)
    for i, j in itertools.product(range(4), repeat=2):
        if (i, j) not in pairs and (j, i) not in pairs:
            expected[:, (owners == i)[:, None] & (owners == j)] = 0
    result = gram(factors, torch.float64, pairs=pairs, backend=backend)
    assert torch.equal(result, result.mT)
    assert torch.equal(result == 0, expected == 0)
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("backend", "length"),
    [("torch", 1), ("torch", 50), ("torch", 3000), ("triton", 1), ("triton", 50)],
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize(("working", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_combine_gram(working, bound, length, widths, transposed, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    factors = parts(length, widths, torch.bfloat16, transposed)
    coefficients = torch.randn(2, sum(widths), 4).double()
    columns, own, crossed = combine_gram(factors, coefficients, working, backend=backend)
    expected, _ = combine(factors, coefficients, working, working, backend=backend)
    for column, wanted in zip(columns, expected, strict=True):
        assert column.dtype == working
        assert torch.equal(column, wanted)
    y, x = torch.stack(columns).double(), joined(factors)
    assert own.dtype == crossed.dtype == torch.float64
    assert torch.equal(own, own.mT)
    for found, other in ((own, y), (crossed, x)):
        limits = bound * y.norm(dim=1)[:, :, None] * other.norm(dim=1)[:, None] * length**0.5
        assert bool(((found - y.mT @ other).abs() <= limits.clamp_min(1e-300)).all())


def test_combine_gram_of_no_modules():
    columns, own, crossed = combine_gram([], torch.zeros(0, 5, 3).double(), torch.float64)
    assert columns == []
    assert own.shape == (0, 3, 3)
    assert crossed.shape == (0, 3, 5)


def test_threads_of_numpy_are_what_they_were():
    def threads():
        libraries = threadpool_info()
        return [lib["num_threads"] for lib in libraries if lib["user_api"] == "blas"]

    before, factors = threads(), parts(3000, (8, 8))
    expected = gram(factors, torch.float64)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: gram(factors, torch.float64), range(40)):
            assert torch.equal(result, expected)
    assert threads() == before


@pytest.mark.parametrize("function", COMBINES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("target", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("working", [torch.float64, torch.float32], ids=str)
def test_combine(working, target, length, widths, transposed, function):
    factors = parts(length, widths, torch.bfloat16, transposed)
    coefficients = torch.randn(2, sum(widths), 4).double()
    result, errors = COMBINES[function](factors, coefficients, working, target)
    exact = joined(factors) @ coefficients
    epsilon = max(torch.finfo(target).eps, torch.finfo(working).eps)
    terms = joined(factors).abs() @ coefficients.abs()
    for index in range(2):
        assert result[index].dtype == target
        assert (result[index].stride(0) == 1) == (transposed and length > 1)
        change = result[index].double() - exact[index]
        assert bool((change.abs() <= 4 * epsilon * terms[index] + 1e-7).all())
        if target not in (torch.float64, working):
            true = change.square().sum(0)
            assert torch.allclose(errors[index], true, rtol=0.05)


@pytest.mark.parametrize("cond", [1, 1e2, 1e4], ids=lambda c: f"{c:g}")
def test_orthonormalize_gram(cond):
    columns = torch.stack([tall(60, 7, cond, seed) for seed in range(3)])
    # A wild scale of single columns costs nothing.
    columns = columns * torch.logspace(-8, 8, 7, dtype=torch.float64)
    gauge, inverse, condition = orthonormalize_gram(columns.mT @ columns)
    basis = columns @ gauge
    identity = torch.eye(7, dtype=torch.float64)
    assert float((basis.mT @ basis - identity).abs().max()) < 1e-15 * (10 * cond) ** 2
    lengths = columns.norm(dim=1, keepdim=True)
    assert float(((basis @ inverse - columns) / lengths).abs().max()) < 1e-12 * cond
    smallest = torch.linalg.svdvals(columns / lengths)[:, -1]
    assert bool((condition * smallest >= 0.999).all())
    assert bool((condition * smallest <= 7**0.5 * 1.001).all())


def test_orthonormalize_gram_reports_what_it_cannot_do():
    columns = torch.stack([tall(20, 3), tall(20, 3), tall(20, 3)])
    columns[1, :, 2] = 0
    columns[2, :, 2] = columns[2, :, 0]
    gauge, _, condition = orthonormalize_gram(columns.mT @ columns)
    assert torch.isinf(condition).tolist() == [False, True, True] or float(condition[2]) > 1e7
    assert bool(torch.isfinite(gauge[0]).all())


@pytest.mark.parametrize("cond", [1, 1e4, 1e6, 1e7], ids=lambda c: f"{c:g}")
def test_orthonormalize(cond):
    factor = tall(60, 7, cond)
    basis, coordinates = orthonormalize(factor, tolerance=1e-10)
    assert basis.shape == (60, 7)
    assert float((basis.mT @ basis - torch.eye(7)).abs().max()) < 1e-14
    assert float((basis @ coordinates - factor).norm()) < 1e-14 * float(factor.norm())


def test_orthonormalize_drops_noise():
    factor = tall(60, 7, 1e6)
    basis, coordinates = orthonormalize(factor, tolerance=1e-4)
    values = torch.linalg.svdvals(factor)
    rank = int((values > 1e-4 * values[0]).sum())
    assert basis.shape == (60, rank)
    lost = float((basis @ coordinates - factor).norm())
    assert lost == pytest.approx(float(values[rank:].norm()), rel=1e-6)


@pytest.mark.parametrize(("d", "r"), [(3, 5), (1, 4), (5, 5)])
def test_orthonormalize_wide(d, r):
    basis, coordinates = orthonormalize(tall(d, r), tolerance=1e-7)
    assert basis.shape == (d, min(d, r))
    assert coordinates.shape == (min(d, r), r)


@pytest.mark.parametrize(("p", "q"), [(1, 1), (5, 5), (7, 3), (3, 7), (64, 64)])
def test_polar_solves_procrustes(p, q):
    source, target = torch.randn(4, 100, p).double(), torch.randn(4, 100, q).double()
    matrix = source.mT @ target
    factor, smallest = polar(matrix)
    short = factor.mT @ factor if p >= q else factor @ factor.mT
    assert float((short - torch.eye(min(p, q))).abs().max()) < 1e-13
    # The polar factor is the one for which M = factor @ (positive semidefinite).
    stretch = factor.mT @ matrix if p >= q else matrix @ factor.mT
    assert float((stretch - stretch.mT).abs().max()) < 1e-10
    assert float(torch.linalg.eigvalsh(stretch).min()) > 0
    assert torch.allclose(smallest, torch.linalg.svdvals(matrix)[..., -1])


def test_polar_of_singular_matrices_is_an_isometry():
    matrix = torch.zeros(3, 4, 4, dtype=torch.float64)
    matrix[1, :, 0] = 1
    factor, smallest = polar(matrix)
    assert float((factor.mT @ factor - torch.eye(4)).abs().max()) < 1e-14
    assert torch.equal(smallest, torch.zeros(3, dtype=torch.float64))

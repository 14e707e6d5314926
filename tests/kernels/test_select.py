"""`kth_magnitude` against a full sort, and where its passes could go wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gam_kernels import select
from gam_kernels.select import block_rows, kth_magnitude


class Stream:
    """Gives the rows of a matrix through one buffer, and counts the passes over it."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.buffer = torch.empty(block_rows(matrix.shape[1]), matrix.shape[1], dtype=matrix.dtype)
        self.read = 0

    def __call__(self, start, stop):
        self.read += stop - start
        return self.buffer[: stop - start].copy_(self.matrix[start:stop])

    @property
    def passes(self):
        return self.read / len(self.matrix)


def kth(matrix, k, **options):
    return kth_magnitude(Stream(matrix), tuple(matrix.shape), k, **options)


def expected(matrix, k):
    return float(matrix.abs().flatten().sort(descending=True).values[k - 1])


def assert_exact(matrix, ks=None, **options):
    n = matrix.numel()
    for k in ks or sorted({1, 2, n // 5, n // 2, n - 1, n} & set(range(1, n + 1))):
        assert kth(matrix, k, **options) == expected(matrix, k), k


@pytest.fixture
def streaming(monkeypatch):
    """Make matrices of some thousand entries take the path of very large ones."""
    monkeypatch.setattr(select, "_BLOCK_ENTRIES", 512)
    monkeypatch.setattr(select, "_WHOLE", 400)
    monkeypatch.setattr(select, "_COLLECT", 400)
    monkeypatch.setattr(select, "_SAMPLE", 256)


def gaussian(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def heavy_tailed():
    return gaussian(60, 70) / gaussian(60, 70) ** 3


def low_rank():
    return gaussian(200, 3) @ gaussian(3, 31)


def constant():
    return torch.full((50, 60), -0.1)


def few_values():
    return torch.randint(-2, 3, (80, 64)).float()


def mostly_zero():
    return gaussian(60, 70) * (torch.rand(60, 70) < 0.05)


def zero():
    return torch.zeros(60, 70)


def sorted_rows():
    return gaussian(64 * 60).abs().sort().values.view(64, 60)


def sorted_columns():
    return gaussian(64 * 60).sort().values.view(60, 64).mT.contiguous()


def large_where_the_sample_looks():
    """Every entry that the default sample takes is huge, and no other."""
    matrix = gaussian(64, 64)
    matrix.view(-1)[:: 64 * 64 // 256 + 1] *= 1e6
    return matrix


def denormal():
    return torch.arange(1, 4001, dtype=torch.float32).view(50, 80) * 2.0**-149


def every_exponent():
    return torch.exp2(torch.linspace(-149, 127, 4000)).view(50, 80).flip(0) * -1


MATRICES = [
    heavy_tailed,
    low_rank,
    constant,
    few_values,
    mostly_zero,
    zero,
    sorted_rows,
    sorted_columns,
    large_where_the_sample_looks,
    denormal,
    every_exponent,
]


@pytest.mark.parametrize("build", MATRICES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_exact_when_streamed(streaming, build, dtype):
    assert_exact(build().to(dtype))


@pytest.mark.parametrize("build", MATRICES, ids=lambda build: build.__name__)
def test_is_exact_when_collected_whole(build):
    assert_exact(build())


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 5)], ids=str)
def test_tiny(shape):
    assert_exact(gaussian(*shape), range(1, math.prod(shape) + 1))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.integers(0, 10**6))
def test_any_shape(height, width, share, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(height, width, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_BLOCK_ENTRIES", 100)
        patch.setattr(select, "_WHOLE", 50)
        patch.setattr(select, "_COLLECT", 50)
        patch.setattr(select, "_SAMPLE", 30)
        assert_exact(matrix, [max(1, round(share * height * width))])


@pytest.mark.parametrize(
    "sample",
    [torch.zeros(100), torch.full((100,), 1e30), torch.rand(100) * 1e-3, torch.ones(1)],
    ids=["zeros", "huge", "small", "single"],
)
def test_a_bad_sample_costs_passes_and_not_the_result(streaming, sample):
    assert_exact(low_rank(), sample=lambda n: sample)


def test_a_good_sample_needs_one_pass():
    matrix = gaussian(5000, 1000)
    stream = Stream(matrix)

    def sample(n):
        return matrix.view(-1)[torch.randint(matrix.numel(), (n,))]

    found = kth_magnitude(stream, (5000, 1000), 10**6, sample=sample)
    assert found == float(matrix.abs().flatten().topk(10**6).values[-1])
    assert stream.passes < 1.01


def test_without_a_sample_one_pass_more():
    matrix = gaussian(5000, 1000)
    stream = Stream(matrix)
    found = kth_magnitude(stream, (5000, 1000), 10**6)
    assert found == float(matrix.abs().flatten().topk(10**6).values[-1])
    assert stream.passes < 2.01


def test_the_worst_sample_needs_no_more_passes_than_floats_have_bits(streaming):
    for build in MATRICES:
        matrix = build()
        stream = Stream(matrix)
        kth_magnitude(stream, tuple(matrix.shape), matrix.numel() // 2, sample=torch.zeros)
        assert stream.passes <= 35


@pytest.mark.parametrize("k", [0, -1, 13])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k: got {k}, expected 1 to 12"):
        kth(gaussian(3, 4), k)


def test_nan_is_refused(streaming):
    matrix = gaussian(60, 70)
    matrix[3] = math.nan
    with pytest.raises(ValueError, match="expected no NaN"):
        kth(matrix, matrix.numel())

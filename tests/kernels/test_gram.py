"""Gram matrices against float64, on a CPU and in plain torch."""

import numpy as np
import pytest
import torch
from helpers.factors import factors, joined

from gam_kernels import cross_gram, gram
from gam_kernels.gram import reference

GRAMS = {"op": gram, "reference": reference.gram}
WIDTHS = [(1,), (3, 0, 2), (64, 33), (130, 127)]
LONG = [5, 50, 3000]


@pytest.mark.parametrize("function", GRAMS)
@pytest.mark.parametrize("layout", ["b", "a"])
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
def test_gram(source, working, bound, length, widths, layout, function):
    parts = factors(2, length, widths, source, layout, device="cpu")
    result = GRAMS[function](parts, working)
    whole = joined(parts)
    expected = np.einsum("mdp,mdq->mpq", whole.numpy(), whole.numpy())
    lengths = whole.norm(dim=1).numpy()
    assert result.dtype == torch.float64
    assert torch.equal(result, result.mT)
    limits = bound * lengths[:, :, None] * lengths[:, None] * max(1, length**0.5)
    assert (np.abs(result.numpy() - expected) <= limits).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["b", "a"])
@pytest.mark.parametrize("length", [1, 300])
@pytest.mark.parametrize(
    ("one", "other"), [((3, 4), (5,)), ((2,), (0, 1, 6)), ((0,), (2,)), ((70,), (3, 65))], ids=str
)
def test_cross_gram(one, other, length, layout, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    both = factors(2, length, (*one, *other), torch.bfloat16, layout)
    first, second = ([module[part] for module in both] for part in sides(len(one)))
    result = cross_gram(first, second, torch.float64, backend=backend)
    whole = gram(both, torch.float64, backend=backend)
    assert result.shape == (2, sum(one), sum(other))
    assert result.dtype == torch.float64
    assert torch.allclose(result, joined(first).mT @ joined(second), rtol=1e-12, atol=1e-11)
    assert torch.allclose(result, whole[:, : sum(one), sum(one) :], rtol=1e-12, atol=1e-11)


def sides(count):
    """Where the factors of the first group are in a module, and where those of the other."""
    return slice(count), slice(count, None)


def test_cross_gram_refuses_groups_that_do_not_fit():
    x, y = torch.ones(3, 2), torch.ones(4, 2)
    with pytest.raises(ValueError, match="other: got 2 modules, expected 1"):
        cross_gram([[x]], [[x], [x]], torch.float64)
    with pytest.raises(ValueError, match=r"\(4, 2\), expected floats of shape \(3, r\)"):
        cross_gram([[x]], [[y]], torch.float64)
    with pytest.raises(ValueError, match="at least one"):
        cross_gram([[]], [[x]], torch.float64)
    assert cross_gram([], [], torch.float64).shape == (0, 0, 0)

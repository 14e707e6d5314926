"""Entry-wise merges by the kernels against the dense definition."""

from dataclasses import replace

import pytest
import torch
from helpers.factors import DEVICE, assert_no_worse

from gam_kernels.entries.matrix import Entries
from gam_kernels.entries.op import entry_products, kth_magnitudes
from gam_kernels.entries.reference import merge_entries
from gam_kernels.entries.vote import Draw, Vote
from gam_kernels.lowrank import low_rank

pytest.importorskip("triton")

SHAPES = [(70, 130, (3, 5, 1), 7), (64, 64, (16,), 20), (1, 5, (2, 2), 3), (100, 40, (33, 4), 70)]
IDS = [f"D{d}-K{k}-R{'+'.join(map(str, ranks))}-C{c}" for d, k, ranks, c in SHAPES]


def make_votes(d, k, ranks, dtype=torch.float32):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype).to(DEVICE)

    return [Vote(random(d, r), random(r, k), share=0.3 + i) for i, r in enumerate(ranks)]


def trimmed(votes, density):
    """The votes with thresholds halfway between two magnitudes, so that rounding decides none."""
    found = []
    for vote in votes:
        sizes = (vote.left.double() @ vote.right.double()).abs().flatten().sort().values
        place = int((1 - density) * (len(sizes) - 1))
        found.append(replace(vote, low=float(sizes[place : place + 2].mean())))
    return found


def exact(votes, mean):
    wide = [replace(v, left=v.left.double(), right=v.right.double()) for v in votes]
    return merge_entries(wide, mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("draw", [False, True], ids=["trimmed", "drawn"])
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(("d", "k", "ranks", "c"), SHAPES, ids=IDS)
def test_products_no_worse_than_torch(d, k, ranks, c, mean, draw, dtype):
    votes = make_votes(d, k, ranks, dtype)
    if draw:
        votes = [replace(v, draw=Draw((3 + i, -5), 0.4)) for i, v in enumerate(votes)]
    elif d > 1:
        votes = trimmed(votes, 0.2)
    x, q = (torch.randn(n, c, dtype=dtype).to(DEVICE) for n in (k, d))
    found = entry_products(votes, mean, times=x, onto=q, backend="triton")
    plain = entry_products(votes, mean, times=x, onto=q, backend="torch")
    dense = exact(votes, mean)
    unit = 4 * torch.finfo(dtype).eps * float(dense.norm())
    targets = (dense @ x.double(), dense.mT @ q.double())
    for result, baseline, target, thin in zip(found, plain, targets, (x, q), strict=False):
        assert_no_worse(result, baseline, target, unit * float(thin.abs().max()))
    assert found[2] == pytest.approx(float(dense.square().sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("d", "k", "ranks"), [(70, 50, (3, 1)), (3, 140, (20,))], ids=str)
def test_thresholds_are_exact_among_the_entries_compared(d, k, ranks, dtype):
    votes = make_votes(d, k, ranks, dtype)
    for rank in (1, 2, d * k // 5, d * k):
        for vote, threshold in zip(
            votes, kth_magnitudes(votes, rank, backend="triton"), strict=True
        ):
            size = torch.tensor(threshold, dtype=dtype)
            low = float(torch.nextafter(size, torch.zeros_like(size)))
            unit = torch.eye(k, dtype=dtype, device=DEVICE)
            kept, *_ = entry_products([replace(vote, low=low)], False, times=unit, backend="triton")
            assert int((kept != 0).sum()) == rank
            assert float(kept[kept != 0].abs().min()) == threshold


def test_thresholds_of_equal_and_zero_entries():
    one = torch.ones(70, 1, device=DEVICE)
    votes = [Vote(one, -3 * one.mT), Vote(one, torch.zeros(1, 70, device=DEVICE))]
    for rank in (1, 70, 4900):
        assert kth_magnitudes(votes, rank, backend="triton") == [3.0, 0.0]
        assert kth_magnitudes(votes, rank, backend="torch") == [3.0, 0.0]


def test_a_tie_of_signs_gives_zero():
    a, b = torch.tensor([[2.0, -1.0]]), torch.tensor([[-2.0, -1.0]])
    votes = [Vote(torch.ones(1, 1).to(DEVICE), row.to(DEVICE)) for row in (a, b)]
    unit = torch.eye(2, device=DEVICE)
    for backend in ("torch", "triton"):
        merged, _, _ = entry_products(votes, True, times=unit, backend=backend)
        assert merged.tolist() == [[0.0, -1.0]]


def test_sketch_through_the_kernel():
    votes = trimmed(make_votes(90, 70, (3, 4)), 0.3)
    found = []
    for backend in ("torch", "triton"):
        matrix = Entries(votes, True, backend)
        left, right = low_rank(matrix, 6)
        found.append((left @ right.mT, matrix.squared_norm))
    assert float((found[0][0] - found[1][0]).norm()) < 1e-4 * float(found[0][0].norm())
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_refusals():
    votes = make_votes(4, 5, (2,))
    windowed = [replace(votes[0], draw=Draw((1, 2), 0.5, 0.2))]
    with pytest.raises(ValueError, match=r"backend: got 'triton' for votes whose draw has a"):
        entry_products(windowed, True, times=torch.zeros(5, 1), backend="triton")
    with pytest.raises(ValueError, match=r"rank: got 21, expected 1 to 20"):
        kth_magnitudes(votes, 21)

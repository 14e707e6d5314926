"""The orthonormal form of updates, batched and one by one."""

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.updates import dense, factors, updates_of

from gam.algebra.factors import from_factors


def dense_update(update):
    return (update.left.dense(0) @ update.core[0] @ update.right.dense(0).mT).numpy()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("cond", [1, 1e3, 1e6], ids=lambda c: f"{c:g}")
def test_update_is_the_same_matrix_in_orthonormal_bases(cond, batched):
    pair = factors(40, 30, 5, seed=1, cond_b=cond)
    (update,) = updates_of([pair], [0.7], batched)
    assert oracle.relative_error(dense_update(update), dense(*pair, 0.7)) < 1e-9
    for basis in (update.left.dense(0), update.right.dense(0)):
        assert (basis.mT @ basis - torch.eye(5)).abs().max() < 1e-7
    norm = np.linalg.norm(dense(*pair, 0.7))
    assert abs(float(update.norm()) - norm) < 1e-9 * norm


def test_only_unsafe_modules_leave_the_batch():
    good, bad = factors(40, 30, 5, 1), factors(40, 30, 5, 2, cond_b=1e6)
    dead = (torch.zeros(40, 5), good[1])
    batch = [good, bad, good, dead]
    b, a = ([[pair[i]] for pair in batch] for i in (0, 1))
    scales = torch.ones(4, 1, dtype=torch.float64)
    updates, careful = from_factors(["x"], b, a, scales)
    assert careful == [1, 3]
    assert updates[0].core.shape[0] == 2


def test_a_lone_bad_module_leaves_no_batch():
    b, a = factors(40, 30, 5, 2, cond_b=1e6)
    scales = torch.ones(1, 1, dtype=torch.float64)
    assert from_factors(["x"], [[b]], [[a]], scales) == ([], [0])


def test_zero_updates_are_left_out():
    b, a = factors(10, 12, 3, 1)
    pairs = [(torch.zeros_like(b), a), (b, torch.zeros_like(a)), (b, a), (b, a)]
    (update,) = updates_of(pairs, [1.0, 1.0, 0.0, 1.0])
    assert update.name == "3"


def test_factors_that_meet_nowhere_are_zero():
    """B uses the first two inner directions and A the last two: the product is zero."""
    b, a = (t.double() for t in factors(10, 12, 4, 1))
    b[:, 2] = b[:, 0]
    b[:, 3] = b[:, 1]
    a[2:] = -a[:2]
    assert np.abs(dense(b, a)).max() < 1e-14
    assert updates_of([(b, a)]) == []


@pytest.mark.parametrize("seed", range(4))
def test_dependent_columns_reduce_the_rank(seed):
    b, a = (t.double() for t in factors(20, 16, 6, seed))
    b[:, 4:] = b[:, :2] @ torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    a[5] = a[0] + a[1]
    (update,) = updates_of([(b.float().double(), a.float().double())])
    rank = np.linalg.matrix_rank(dense(b, a), tol=1e-4)
    assert update.core.shape == (1, rank, rank)
    assert oracle.relative_error(dense_update(update), dense(b, a)) < 1e-6


def test_padding_with_zeros_is_no_direction():
    b, a = factors(20, 16, 3, 1)
    padded = torch.nn.functional.pad(b, (0, 5)), torch.nn.functional.pad(a, (0, 0, 0, 5))
    (update,) = updates_of([padded])
    assert update.core.shape[-1] == 3
    assert update.rank == 8
    assert oracle.relative_error(dense_update(update), dense(b, a)) < 1e-12


def test_a_scale_hidden_in_one_factor_is_no_noise():
    b, a = (t.double() for t in factors(20, 16, 3, 1))
    gauge = torch.tensor([1.0, 1e-9, 1e9], dtype=torch.float64)
    (update,) = updates_of([(b * gauge, a / gauge[:, None])])
    assert update.core.shape[-1] == 3
    assert oracle.relative_error(dense_update(update), dense(b, a)) < 1e-9


def test_output_narrower_than_the_rank():
    b, a = factors(2, 30, 8, 1)
    (update,) = updates_of([(b, a)])
    assert update.core.shape[-1] == 2
    assert oracle.relative_error(dense_update(update), dense(b, a)) < 1e-9

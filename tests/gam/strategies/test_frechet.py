"""`frechet`: that it is a Fréchet mean, and what it says where there is none."""

import numpy as np
import pytest
import torch
from helpers import dense_methods, oracle
from helpers.updates import dense, dense_product, factors, updates_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gam.adapter import Adapter, LowRank
from gam.api import merge_adapters
from gam.strategies.frechet import frechet
from gam.strategies.gam import gam

settings.register_profile("frechet", deadline=None, max_examples=15)
settings.load_profile("frechet")

seeds = st.integers(0, 10**6)
signed_weights = st.lists(st.floats(0.2, 2.0) | st.floats(-2.0, -0.2), min_size=3, max_size=3)


def many(shape, seed, n=3):
    return [factors(*shape, seed=1000 * seed + i) for i in range(n)]


def shared(d, k, r, seed, n=3, noise=0.3):
    """Adapters whose subspaces lie near to each other: there the mean is unique."""
    b, a = factors(d, k, r, seed=1000 * seed, dtype=torch.float64)
    others = [factors(d, k, r, seed=1000 * seed + 1 + i, dtype=torch.float64) for i in range(n)]
    return [(b + noise * db, a + noise * da) for db, da in others]


def spaces(deltas, side):
    return [oracle.thin_svd(delta)[side] for delta in deltas]


def cost(mean, bases, shares):
    """The sum of squared principal angles that the mean subspace minimises."""
    cosines = [np.linalg.svd(mean.T @ q, compute_uv=False).clip(max=1) for q in bases]
    return sum(s * (np.arccos(c) ** 2).sum() for s, c in zip(shares, cosines, strict=True))


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 2)])
@given(seed=seeds, weights=signed_weights)
def test_gradients_vanish_at_the_mean(ranks, seed, weights):
    pairs = [factors(18, 22, rank, seed=1000 * seed + i) for i, rank in enumerate(ranks)]
    deltas = [dense(*pair) for pair in pairs]
    shares = np.abs(weights) / np.abs(weights).sum()
    updates = updates_of(pairs)
    result = frechet(updates, weights)
    assert not any("steps" in text for text in result.warnings)
    for side, basis, part in ((0, "left", result.left), (2, "right", result.right)):
        (mean,), _ = getattr(updates[0], basis).side.form(part)
        mean = mean.numpy()
        assert np.abs(mean.T @ mean - np.eye(max(ranks))).max() < 1e-9
        gradient = dense_methods.subspace_gradient(mean, spaces(deltas, side), shares)
        assert np.linalg.norm(gradient) < 1e-7


@given(seed=seeds, weights=signed_weights)
def test_no_subspace_nearby_is_nearer(seed, weights):
    pairs = shared(18, 22, 3, seed)
    bases = spaces([dense(*pair) for pair in pairs], 0)
    shares = np.abs(weights) / np.abs(weights).sum()
    updates = updates_of(pairs)
    (mean,), _ = updates[0].left.side.form(frechet(updates, weights).left)
    least = cost(mean.numpy(), bases, shares)
    draws = np.random.default_rng(seed)
    for size in (1e-3, 1e-1, 1.0):
        other = oracle.polar(mean.numpy() + size * draws.standard_normal(mean.shape))
        assert cost(other, bases, shares) > least


@given(seed=seeds)
def test_of_two_alike_in_weight_it_is_gam_with_retract(seed):
    """The midpoint of a geodesic is the chord's midpoint, made orthonormal."""
    updates = updates_of(many((18, 22, 3), seed, n=2))
    expected = dense_product(updates, gam(updates, [0.5, 0.5], retract=True))
    result = dense_product(updates, frechet(updates, [0.5, 0.5]))
    assert oracle.relative_error(result, expected) < 1e-8


@given(seed=seeds, t=st.floats(0.05, 0.95))
def test_of_two_it_divides_every_principal_angle(seed, t):
    pairs = many((18, 22, 3), seed, n=2)
    first, second = spaces([dense(*pair) for pair in pairs], 0)
    updates = updates_of(pairs)
    (mean,), _ = updates[0].left.side.form(frechet(updates, [1 - t, t]).left)
    whole, part = (
        np.arccos(np.linalg.svd(first.T @ q, compute_uv=False).clip(max=1))
        for q in (second, mean.numpy())
    )
    assert np.abs(part - t * whole).max() < 1e-6


@given(seed=seeds, weights=signed_weights)
def test_of_shared_subspaces_it_is_the_average(seed, weights):
    (b, a), *_ = many((18, 22, 3), seed)
    turns = [factors(3, 3, 3, seed=seed + i)[0].double() for i in range(3)]
    pairs = [(b.double() @ turn, a.double()) for turn in turns]
    updates = updates_of(pairs)
    expected = oracle.linear([dense(*pair) for pair in pairs], weights)
    error = np.linalg.norm(dense_product(updates, frechet(updates, weights)) - expected)
    assert error < 1e-7 * max(np.linalg.norm(dense(*pair)) for pair in pairs)


def test_a_batch_is_its_modules_one_by_one():
    """Some modules end sooner than others, and must not be moved on."""
    groups = [shared(18, 22, 3, seed, noise=0.1 + seed) for seed in range(3)]
    adapters = [
        Adapter({f"w{j}": LowRank(a, b) for j, (b, a) in enumerate(pairs)}, {}, name=f"a{i}")
        for i, pairs in enumerate(zip(*groups, strict=True))
    ]
    whole = merge_adapters(adapters, method="frechet", dtype="float32")
    for name in ("w0", "w1", "w2"):
        one = [Adapter({name: part.modules[name]}, {}, name=part.name) for part in adapters]
        alone = merge_adapters(one, method="frechet", dtype="float32").modules[name].delta()
        error = (whole.modules[name].delta() - alone).norm()
        assert error < 1e-6 * alone.norm()


def test_long_steps_end_where_whole_ones_take_thousands():
    """Unrelated subspaces of a wide layer: 890 whole steps on the left side."""
    updates = updates_of(many((1024, 1027, 16), 0))
    result = frechet(updates, [1 / 3] * 3)
    assert max(result.diagnostics["left_gradient"]) < 1e-11
    assert max(result.diagnostics["left_iterations"]) < 200


def test_right_angles_are_told():
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, 6, generator=generator, dtype=torch.float64)).Q
        for n in (20, 24)
    )
    pairs = [(left[:, :3], right[:, :3].mT), (left[:, 3:], right[:, 3:].mT)]
    updates = updates_of(pairs)
    result = frechet(updates, [0.5, 0.5])
    assert np.isfinite(dense_product(updates, result)).all()
    assert any("no clear consensus" in text for text in result.warnings)
    assert frechet(updates_of(pairs[:1]), [1.0]).warnings == {}


def test_a_search_that_ends_early_is_told(monkeypatch):
    monkeypatch.setattr("gam.strategies.frechet._ITERATIONS", 2)
    result = frechet(updates_of(many((18, 22, 3), 1)), [1 / 3] * 3)
    assert any("no mean was reached" in text for text in result.warnings)
    assert result.diagnostics["left_iterations"] == [2]


@given(seed=seeds, weights=signed_weights)
def test_in_frobenius_distance_the_mean_of_a_rank_is_the_truncated_average(seed, weights):
    """The embedded geometry: P_T(sum_i w_i dW_i - X) = 0 at `linear` with a rank."""
    pairs = many((18, 22, 3), seed)
    adapters = [
        Adapter({"w": LowRank(a.double(), b.double())}, {}, name=f"a{i}")
        for i, (b, a) in enumerate(pairs)
    ]
    options = {"rank": 3, "weights": weights, "normalize": False, "dtype": "float32"}
    update = merge_adapters(adapters, method="linear", **options).modules["w"]
    found = dense(update.lora_b, update.lora_a)
    average = oracle.linear([dense(*pair) for pair in pairs], weights)
    assert oracle.relative_error(found, oracle.truncate(average, 3)) < 1e-4
    u, _, v = oracle.thin_svd(found, 1e-6)
    rest = average - found
    tangent = u @ u.T @ rest + rest @ v @ v.T - u @ u.T @ rest @ v @ v.T
    assert np.linalg.norm(tangent) < 1e-5 * np.linalg.norm(average)

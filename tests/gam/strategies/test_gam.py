"""`gam` against the paper's dense algorithm, and the properties that it must hold."""

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.updates import dense, dense_product, factors, updates_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gam.adapter import Adapter, LowRank
from gam.api import merge_adapters
from gam.strategies.gam import gam
from gam.strategies.linear import linear

settings.register_profile("merge", deadline=None, max_examples=40)
settings.load_profile("merge")

# The contract for float32 inputs, condition numbers to 1e6.
CONTRACT = 2e-5


def run(pairs, weights=None, scales=None, **params):
    updates = updates_of(pairs, scales)
    share = weights if weights is not None else [1 / len(pairs)] * len(pairs)
    total = sum(abs(w) for w in share)
    used = [share[int(update.name)] / total for update in updates]
    return dense_product(updates, gam(updates, used, **params))


shapes = st.tuples(st.integers(12, 40), st.integers(12, 40), st.integers(1, 6))
seeds = st.integers(0, 10**6)
signed_weights = st.lists(st.floats(0.1, 2.0) | st.floats(-2.0, -0.1), min_size=3, max_size=3)


def many(shape, seed, n=3, **options):
    return [factors(*shape, seed=1000 * seed + i, **options) for i in range(n)]


def overlapping(shape, seed, shared, n=3):
    """Adapters that share part of their factors, as those of one student do."""
    d, k, r = shape
    common = factors(d, k, r, seed=1000 * seed + 99)
    own = many(shape, seed, n)
    return [
        (shared * common[0] + (1 - shared) * b, shared * common[1] + (1 - shared) * a)
        for b, a in own
    ]


@given(shapes, seeds, signed_weights, st.sampled_from([None, "0", "1", "2"]), st.booleans())
def test_equals_the_literal_algorithm(shape, seed, weights, reference, retract):
    pairs = many(shape, seed)
    expected = oracle.gam(
        [dense(*pair) for pair in pairs],
        weights,
        reference=None if reference is None else int(reference),
        retract=retract,
    )
    result = run(pairs, weights, reference=reference, retract=retract)
    assert oracle.relative_error(result, expected) < 1e-8


@given(seeds, signed_weights, st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_mixed_ranks_equal_the_literal_algorithm_with_coverage(seed, weights, r0, r1, r2):
    pairs = [factors(30, 24, r, seed=1000 * seed + i) for i, r in enumerate((r0, r1, r2))]
    expected = oracle.gam([dense(*pair) for pair in pairs], weights)
    assert oracle.relative_error(run(pairs, weights), expected) < 1e-8


@pytest.mark.parametrize("cond_a", [1, 1e3, 1e6], ids=lambda c: f"A{c:g}")
@pytest.mark.parametrize("cond_b", [1, 1e2, 1e4, 1e5, 1e6], ids=lambda c: f"B{c:g}")
@pytest.mark.parametrize("shape", [(60, 40, 6), (40, 96, 8)], ids=str)
def test_ill_conditioned_factors(shape, cond_b, cond_a):
    pairs = many(shape, seed=5, cond_b=cond_b, cond_a=cond_a)
    # The dense SVD itself loses the smallest directions at the product of the two condition
    # numbers, so the bases come from a QR of the factors; the dense form is compared too.
    svds = []
    for b, a in pairs:
        qb, rb = np.linalg.qr(b.double().numpy())
        qa, ra = np.linalg.qr(a.double().numpy().T)
        u, s, vt = np.linalg.svd(rb @ ra.T)
        svds.append((qb @ u, s, qa @ vt.T))
    deltas = [dense(*pair) for pair in pairs]
    result = run(pairs)
    assert oracle.relative_error(result, oracle.gam(deltas, svds=svds)) < 1e-8
    if cond_a * cond_b <= 1e10:
        assert oracle.relative_error(result, oracle.gam(deltas)) < CONTRACT


@given(shapes, seeds, st.sampled_from([None, "consensus"]), st.booleans())
def test_identical_adapters_come_back_unchanged(shape, seed, reference, retract):
    pair = factors(*shape, seed=seed)
    result = run([pair] * 3, reference=reference, retract=retract)
    assert oracle.relative_error(result, dense(*pair)) < 1e-8


@given(shapes, seeds, st.sampled_from([None, "consensus"]), st.booleans())
def test_one_adapter_is_unchanged(shape, seed, reference, retract):
    pair = factors(*shape, seed=seed)
    result = run([pair], reference=reference, retract=retract)
    assert oracle.relative_error(result, dense(*pair)) < 1e-8


@given(shapes, seeds, signed_weights)
def test_shared_spaces_give_the_average(shape, seed, weights):
    d, k, r = shape
    b, a = factors(d, k, r, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    mixes = [torch.randn(r, r, generator=generator, dtype=torch.float64) for _ in range(3)]
    assume(all(np.linalg.cond(mix.numpy()) < 1e4 for mix in mixes))
    pairs = [(b.double() @ mix, a.double()) for mix in mixes]
    shares = np.asarray(weights) / np.abs(weights).sum()
    deltas = [dense(*pair) for pair in pairs]
    expected = oracle.linear(deltas, shares)
    size = sum(np.linalg.norm(delta) for delta in deltas)
    assert np.linalg.norm(run(pairs, weights) - expected) < 1e-8 * size


@given(shapes, seeds, st.floats(0, 6))
def test_gauge_changes_nothing(shape, seed, spread):
    """(B G, G^-1 A) is the same update for any invertible G."""
    pairs = overlapping(shape, seed, shared=0.5)
    r = shape[2]
    generator = torch.Generator().manual_seed(seed + 1)
    rotation = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, spread, r, dtype=torch.float64)
    gauge = rotation * scales
    changed = [
        (b.double() @ gauge, torch.linalg.solve(gauge, a.double())) for b, a in pairs[:2]
    ] + pairs[2:]
    assert oracle.relative_error(run(changed), run(pairs)) < 1e-7


@given(shapes, seeds, signed_weights)
def test_reference_does_not_matter_for_two(shape, seed, weights):
    pairs = many(shape, seed, n=2)
    first = run(pairs, weights[:2], reference="0")
    assert oracle.relative_error(run(pairs, weights[:2], reference="1"), first) < 1e-8


@given(shapes, seeds, signed_weights)
def test_order_of_the_others_does_not_matter(shape, seed, weights):
    pairs = many(shape, seed)
    swapped = run([pairs[0], pairs[2], pairs[1]], [weights[0], weights[2], weights[1]])
    assert oracle.relative_error(swapped, run(pairs, weights)) < 1e-8


@given(shapes, seeds, st.floats(-3, 3).filter(lambda c: abs(c) > 0.01))
def test_homogeneous(shape, seed, factor):
    pairs = many(shape, seed)
    scaled = run(pairs, scales=[factor] * 3)
    assert oracle.relative_error(scaled, factor * run(pairs)) < 1e-8


@given(shapes, seeds)
def test_equivariant_under_rotations_of_input_and_output(shape, seed):
    d, k, _ = shape
    pairs = overlapping(shape, seed, shared=0.5)
    generator = torch.Generator().manual_seed(seed + 1)
    left = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)).Q
    turned = run([(left @ b.double(), a.double() @ right) for b, a in pairs])
    assert oracle.relative_error(turned, left.numpy() @ run(pairs) @ right.numpy()) < 1e-8


@given(seeds, st.sampled_from(["0", "1", "2"]))
def test_rank_is_at_most_that_of_the_reference(seed, reference):
    ranks = (3, 5, 2)
    pairs = [factors(30, 24, r, seed=1000 * seed + i) for i, r in enumerate(ranks)]
    values = np.linalg.svd(run(pairs, reference=reference), compute_uv=False)
    assert int((values > 1e-10 * values[0]).sum()) == ranks[int(reference)]


@given(shapes, seeds, signed_weights, st.integers(0, 2))
def test_zero_and_absent_modules_are_the_same(shape, seed, weights, index):
    pairs = many(shape, seed)
    b, a = pairs[index]
    merged = []
    absent, no_b = {}, {"w": LowRank(a, torch.zeros_like(b))}
    for stand_in in (absent, no_b, {"w": LowRank(torch.zeros_like(a), b)}):
        adapters = []
        for i, (other_b, other_a) in enumerate(pairs):
            own = stand_in if i == index else {"w": LowRank(other_a, other_b)}
            # A second module keeps the adapter from being empty.
            adapters.append(Adapter({"x": LowRank(a, b), **own}, {}))
        update = merge_adapters(adapters, weights=weights).modules["w"]
        merged.append(dense(update.lora_b, update.lora_a))
    assert oracle.relative_error(merged[1], merged[0]) < 1e-6
    assert oracle.relative_error(merged[2], merged[0]) < 1e-6
    zero = np.zeros_like(dense(b, a))
    deltas = [zero if i == index else dense(*pair) for i, pair in enumerate(pairs)]
    assert oracle.relative_error(merged[0], oracle.gam(deltas, weights)) < 1e-6


@given(shapes, seeds)
def test_knots_with_a_plain_average_is_the_plain_average(shape, seed):
    """Aligning one side only and averaging does nothing: the reason that gam aligns both."""
    pairs = many(shape, seed)
    deltas = [dense(*pair) for pair in pairs]
    left, values, right = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    blocks = np.split(values[:, None] * right, len(deltas), axis=1)
    knots = left @ np.mean(blocks, axis=0)
    updates = updates_of(pairs)
    result = dense_product(updates, linear(updates, [1 / 3] * 3))
    assert oracle.relative_error(result, knots) < 1e-8


def test_size_of_unrelated_adapters():
    """The shrinkage that gam's derivation predicts: about n^-3/2, n^-1/2 when retracted."""
    pairs = many((512, 512, 4), seed=3, n=3)
    mean = np.mean([np.linalg.norm(dense(*pair)) for pair in pairs])
    assert abs(np.linalg.norm(run(pairs)) / mean - 3**-1.5) < 0.04
    assert abs(np.linalg.norm(run(pairs, retract=True)) / mean - 3**-0.5) < 0.04


@pytest.mark.parametrize("shared", [0.6, 0.8, 0.95])
def test_consensus_equals_the_dense_procrustes_mean(shared):
    pairs = overlapping((30, 24, 4), 7, shared)
    expected = oracle.gam_consensus([dense(*pair) for pair in pairs], [0.5, 0.3, -0.2])
    result = run(pairs, [0.5, 0.3, -0.2], reference="consensus")
    assert oracle.relative_error(result, expected) < 1e-7


@given(seeds, st.permutations(range(4)))
def test_consensus_does_not_depend_on_the_order(seed, order):
    pairs = overlapping((30, 24, 3), seed, shared=0.6, n=4)
    weights = [0.4, 0.3, 0.2, 0.1]
    expected = run(pairs, weights, reference="consensus")
    result = run([pairs[i] for i in order], [weights[i] for i in order], reference="consensus")
    assert oracle.relative_error(result, expected) < 1e-7


def test_consensus_reports_and_warns():
    near = gam(updates_of(overlapping((30, 24, 3), 1, 0.9)), [1 / 3] * 3, reference="consensus")
    assert near.diagnostics["left_consensus_iterations"][0] < 50
    assert near.diagnostics["right_consensus_change"][0] < 1e-9
    assert near.warnings == {}
    far = gam(updates_of(many((200, 200, 3), 1)), [1 / 3] * 3, reference="consensus")
    assert any("no clear consensus" in text for text in far.warnings)


def test_right_angles_are_reported_and_repeatable():
    eye = torch.eye(8)
    pairs = [(eye[:, :2], eye[:2]), (eye[:, 2:4], eye[2:4])]
    updates = updates_of(pairs)
    product = gam(updates, [0.5, 0.5])
    assert product.diagnostics["left_overlap_min"] == [0.0]
    assert any("not unique" in text for text in product.warnings)
    again = gam(updates_of(pairs), [0.5, 0.5])
    assert np.array_equal(dense_product(updates, product), dense_product(updates, again))


def test_cancelled_cores_do_not_divide_by_zero():
    b, a = factors(20, 16, 3, seed=1)
    assert np.abs(run([(b, a), (b, a)], [1.0, -1.0])).max() < 1e-12

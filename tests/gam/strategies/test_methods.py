"""Every method: against its paper on dense matrices, and under the rules that all obey."""

import math

import numpy as np
import pytest
import torch
from helpers import dense_methods, oracle
from helpers.adapters import memory_adapter
from helpers.updates import dense, dense_product, factors, updates_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gam.merging.batches
from gam.adapter import Adapter, LowRank
from gam.algebra.updates import Rows
from gam.api import merge_adapters
from gam.errors import OutputError
from gam.strategies import STRATEGIES

settings.register_profile("methods", deadline=None, max_examples=15)
settings.load_profile("methods")

RANDOM = {name for name, s in STRATEGIES.items() if any(p.name == "seed" for p in s.params)}
"""Methods that draw by the names of adapters and modules, which the tests here make up."""
ALL = sorted(set(STRATEGIES) - RANDOM)
ELSEWHERE = {"gam", "ties", "magnitude_prune", "breadcrumbs"}
"""Methods with a dense form and a test file of their own."""
ORDERED = {"gam"}
"""Methods for which the order of the adapters matters: the first may be the reference."""
ENTRYWISE = {"ties", "magnitude_prune", "breadcrumbs"}
"""Methods that look at single entries of the updates, so that rotations change the result."""
HALF_ENTRYWISE = {"knots_ties"}
"""Methods that look at single entries on the input side only."""
TRIMMING = {"ties", "knots_ties", "core_ties", "ctm"}
"""Methods that keep the largest entries of something; of the weights only the ratios matter."""
SPHERICAL = ["karcher", "multislerp"]
"""Methods that average directions and sizes apart."""
SINGLE = set(ALL) - {*TRIMMING, *ENTRYWISE, "iso_c", "iso_cts"}
"""Methods that give a single adapter back as it is."""
IDENTICAL = {
    **dict.fromkeys(
        ("gam", "linear", "karcher", "multislerp", "frechet"),
        lambda weights: sum(weights),
    ),
    **dict.fromkeys(("task_arithmetic", "concat"), lambda weights: sum(weights)),
    **dict.fromkeys(("tsv", "coverage"), lambda weights: sum(weights) / len(weights)),
}
"""Methods that give identical adapters back, to the factor that the weights make of it."""

seeds = st.integers(0, 10**6)
shapes = st.tuples(st.integers(12, 24), st.integers(12, 24), st.integers(1, 4))
signed_weights = st.lists(st.floats(0.2, 2.0) | st.floats(-2.0, -0.2), min_size=3, max_size=3)


def many(shape, seed, n=3):
    return [factors(*shape, seed=1000 * seed + i) for i in range(n)]


def run(name, pairs, weights, scales=None, **params):
    """The dense merge of some factors by a method, by its function alone."""
    strategy = STRATEGIES[name]
    updates = updates_of(pairs, scales)
    used = [weights[int(update.name)] for update in updates]
    result = strategy.load()(updates, used, **strategy.check(params, []))
    if isinstance(result, Rows):
        return result.rows(0, 0, result.shape[0]).double().numpy()
    return dense_product(updates, result)


def by_the_paper(name, pairs, weights):
    """The dense merge of some factors by the dense form of a method."""
    if name in dense_methods.FACTORED:
        return dense_methods.FACTORED[name](pairs, weights)
    params = {"dimension": max(b.shape[1] for b, _ in pairs)} if name == "ctm" else {}
    return dense_methods.METHODS[name]([dense(*pair) for pair in pairs], weights, **params)


def tolerance(name):
    """Entries of the updates themselves are formed in float32."""
    return 1e-4 if name in ENTRYWISE else 1e-7


def test_every_method_has_a_dense_form():
    assert set(ALL) == {*dense_methods.METHODS, *dense_methods.FACTORED} | ELSEWHERE


@pytest.mark.parametrize("name", sorted(set(ALL) - ELSEWHERE))
@given(shape=shapes, seed=seeds, weights=signed_weights)
def test_equals_its_paper_on_dense_matrices(name, shape, seed, weights):
    pairs = many(shape, seed)
    expected = by_the_paper(name, pairs, weights)
    assert oracle.relative_error(run(name, pairs, weights), expected) < 1e-7


@pytest.mark.parametrize("name", sorted(set(ALL) - ELSEWHERE))
@given(seed=seeds, weights=signed_weights, ranks=st.permutations([1, 2, 4]))
def test_mixed_ranks_equal_the_paper(name, seed, weights, ranks):
    pairs = [factors(16, 20, rank, seed=1000 * seed + rank) for rank in ranks]
    expected = by_the_paper(name, pairs, weights)
    assert oracle.relative_error(run(name, pairs, weights), expected) < 1e-7


@given(seed=seeds, weights=signed_weights, beta=st.floats(0, 1), rank=st.integers(1, 9))
def test_ctm_with_every_parameter_equals_the_paper(seed, weights, beta, rank):
    pairs = many((16, 20, 3), seed)
    options = {"dimension": rank, "beta": beta, "rule": "average"}
    expected = dense_methods.ctm([dense(*pair) for pair in pairs], weights, **options)
    assert oracle.relative_error(run("ctm", pairs, weights, **options), expected) < 1e-6


@given(seed=seeds, weights=signed_weights)
def test_ctm_of_adapters_that_fit_into_its_space_is_their_average(seed, weights):
    pairs = many((16, 20, 2), seed)
    expected = run("linear", pairs, weights)
    result = run("ctm", pairs, weights, dimension=6, rule="average")
    assert oracle.relative_error(result, expected) < 1e-7


@pytest.mark.parametrize("size", [1, 2**30], ids=["one", "all"])
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_iso_c_at_a_smaller_rank_keeps_what_leads_in_the_sum(rank, size, monkeypatch):
    monkeypatch.setattr(gam.merging.batches, "_BATCH_BYTES", {"cpu": size})
    modules = {f"layers.{i}.up": (14, 11, 3) for i in range(3)}
    adapters = [memory_adapter(modules, seed=seed, name=f"a{seed}") for seed in range(7)]
    result = merge_adapters(adapters, method="iso_c", rank=rank)
    for name in modules:
        total = sum(adapter.modules[name].delta().double().numpy() for adapter in adapters)
        u, s, vt = np.linalg.svd(total, full_matrices=False)
        expected = s.mean() * u[:, :rank] @ vt[:rank]
        assert oracle.relative_error(result.modules[name].delta().numpy(), expected) < 1e-5


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, -0.5, 0.25]])
def test_at_full_rank_the_core_space_is_the_whole_space(method, seed, weights):
    """Where the adapters span everything, the paper needs no restriction to their span.

    Not of any seed: some twelve directions of twelve dimensions are so nearly dependent that
    the dense form itself loses the digits.
    """
    pairs = many((12, 12, 4), seed)
    expected = getattr(dense_methods, method)([dense(*pair) for pair in pairs], weights)
    assert oracle.relative_error(run(method, pairs, weights), expected) < 1e-6


# --- rules for all --------------------------------------------------------------------


def adapters_with(pairs, index, stand_in):
    """Adapters of one module `w`, one of which holds something else instead."""
    found = []
    for i, (b, a) in enumerate(pairs):
        own = stand_in if i == index else {"w": LowRank(a, b)}
        # A second module keeps the adapter from being empty.
        found.append(Adapter({"x": LowRank(a, b), **own}, {}, name=f"a{i}"))
    return found


def merged(adapters, name, **options):
    """The dense merge through the public function, at a rank that holds all of it."""
    rank = min(adapters[0].modules["w"].shape)
    update = merge_adapters(adapters, method=name, rank=rank, **options).modules["w"]
    return dense(update.lora_b, update.lora_a)


WITHOUT_CHANCE = {
    **dict.fromkeys(("dare_linear", "della_linear", "knots_dare"), "linear"),
    **dict.fromkeys(("dare_ties", "della"), "ties"),
    "knots_dare_ties": "knots_ties",
    "core_dare_ties": "core_ties",
}
"""What methods that draw are where nothing is dropped."""


@pytest.mark.parametrize("name", WITHOUT_CHANCE)
@pytest.mark.parametrize(
    ("ranks", "index", "weights"),
    [
        ((1, 4, 3), None, [0.5, 0.7, -0.3]),
        ((3, 3, 2), 1, [0.5, 0.7, -0.3]),
        ((3, 3, 3), None, [0.5, 0.0, 0.8]),
        ((3,), None, [1.5]),
        ((3,), None, [-0.5]),
        ((3, 3, 0), None, [0.5, 0.7, 0.3]),
    ],
    ids=["mixed", "missing", "zero", "one", "negative", "identical"],
)
def test_methods_that_draw_are_others_where_nothing_is_dropped(name, ranks, index, weights):
    assert set(WITHOUT_CHANCE) == RANDOM
    pairs = [factors(16, 12, rank, seed=place) for place, rank in enumerate(ranks) if rank]
    pairs += [pairs[0]] * ranks.count(0)
    adapters = adapters_with(pairs, index, {})
    full = {} if WITHOUT_CHANCE[name] == "linear" else {"density": 1.0}
    expected = merged(adapters, WITHOUT_CHANCE[name], weights=weights, **full)
    result = merged(adapters, name, weights=weights, density=1.0)
    assert oracle.relative_error(result, expected) < 1e-6
    thinned = merged(adapters, name, weights=weights, density=0.5)
    assert np.isfinite(thinned).all()
    assert oracle.relative_error(thinned, expected) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_absent_zero_and_weightless_are_alike(name):
    pairs = many((16, 12, 3), seed=3)
    b, a = pairs[1]
    weights = [0.5, 0.7, -0.3]
    absent = merged(adapters_with(pairs, 1, {}), name, size="exact", weights=weights)
    for stand_in in (LowRank(a, torch.zeros_like(b)), LowRank(torch.zeros_like(a), b)):
        zero = merged(adapters_with(pairs, 1, {"w": stand_in}), name, size="exact", weights=weights)
        assert oracle.relative_error(zero, absent) < 1e-5
    if name not in ELSEWHERE:
        shares = np.asarray(weights)
        if STRATEGIES[name].normalize:
            shares = shares / np.abs(shares).sum()
        expected = by_the_paper(name, [pairs[0], pairs[2]], [shares[0], shares[2]])
        assert oracle.relative_error(absent, expected) < 1e-5
    adapters = adapters_with(pairs, 1, {"w": LowRank(a, b)})
    without = merged([adapters[0], adapters[2]], name, size="exact", weights=[0.5, -0.3])
    weightless = merged(adapters, name, size="exact", weights=[0.5, 0.0, -0.3])
    assert oracle.relative_error(weightless, without) < 1e-5


@pytest.mark.parametrize("name", sorted(SINGLE))
@given(shape=shapes, seed=seeds, weight=st.sampled_from([1.0, 0.4, -0.7]))
def test_one_adapter_comes_back(name, shape, seed, weight):
    pair = factors(*shape, seed=seed)
    result = run(name, [pair], [weight])
    assert oracle.relative_error(result, weight * dense(*pair)) < 1e-7


@pytest.mark.parametrize("name", [name for name in ALL if name not in ELSEWHERE])
@pytest.mark.parametrize("weight", [1.0, 0.4, -0.7])
def test_one_adapter_is_merged_as_the_paper_has_it(name, weight):
    pair = factors(16, 12, 3, seed=5)
    expected = by_the_paper(name, [pair], [weight])
    assert oracle.relative_error(run(name, [pair], [weight]), expected) < 1e-7


@pytest.mark.parametrize("name", IDENTICAL)
@given(shape=shapes, seed=seeds)
def test_identical_adapters_come_back(name, shape, seed):
    pair = factors(*shape, seed=seed)
    weights = [0.5, 0.3, 0.2]
    result = run(name, [pair] * 3, weights)
    assert oracle.relative_error(result, IDENTICAL[name](weights) * dense(*pair)) < 1e-6


@pytest.mark.parametrize("name", ALL)
@given(shape=shapes, seed=seeds)
def test_identical_adapters_give_something_finite_that_does_not_change(name, shape, seed):
    pairs = [factors(*shape, seed=seed)] * 3
    first = run(name, pairs, [0.5, 0.3, 0.2])
    assert np.isfinite(first).all()
    assert np.array_equal(run(name, pairs, [0.5, 0.3, 0.2]), first)


@pytest.mark.parametrize("name", ALL)
@given(shape=shapes, seed=seeds)
def test_weights_that_cancel_give_something_finite(name, shape, seed):
    pair = factors(*shape, seed=seed)
    assert np.isfinite(run(name, [pair, pair], [0.5, -0.5])).all()


@pytest.mark.parametrize("name", ALL)
@given(shape=shapes, seed=seeds, weights=signed_weights, order=st.permutations(range(3)))
def test_order_does_not_matter(name, shape, seed, weights, order):
    if name in ORDERED:
        order = [0, *(i for i in order if i)]
    pairs = many(shape, seed)
    expected = run(name, pairs, weights)
    turned = run(name, [pairs[i] for i in order], [weights[i] for i in order])
    assert oracle.relative_error(turned, expected) < tolerance(name)


@pytest.mark.parametrize("name", ALL)
@given(shape=shapes, seed=seeds, weights=signed_weights, factor=st.sampled_from([2.0, -0.25, 16.0]))
def test_homogeneous(name, shape, seed, weights, factor):
    """In the updates and in the weights: a common factor comes out again."""
    pairs = many(shape, seed)
    expected = factor * run(name, pairs, weights)
    scaled = run(name, pairs, weights, scales=[factor] * 3)
    assert oracle.relative_error(scaled, expected) < tolerance(name)
    if name not in TRIMMING:
        weighted = run(name, pairs, [factor * weight for weight in weights])
        assert oracle.relative_error(weighted, expected) < 1e-7


def in_another_gauge(pairs, seed):
    """The same updates, the first of them in factors of condition 100 more."""
    b, a = pairs[0]
    r = b.shape[1]
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
    gauge = turn * torch.logspace(0, 2, r, dtype=torch.float64)
    return [(b.double() @ gauge, torch.linalg.solve(gauge, a.double())), *pairs[1:]]


@pytest.mark.parametrize("name", sorted(set(ALL) - set(dense_methods.FACTORED)))
@given(shape=shapes, seed=seeds, weights=signed_weights)
def test_gauge_changes_nothing(name, shape, seed, weights):
    """(B G, G^-1 A) is the same update for any invertible G."""
    pairs = many(shape, seed)
    changed = in_another_gauge(pairs, seed + 1)
    expected = run(name, pairs, weights)
    assert oracle.relative_error(run(name, changed, weights), expected) < tolerance(name)


@pytest.mark.parametrize(
    ("shape", "seed", "weights"),
    [
        ((20, 14, 2), 1495, (-1.7355686259359733, 0.22965673757171096, -1.3317308839562232)),
        ((14, 15, 2), 424701, (1.403549994948084, -0.25744933819954985, 1.0043439752983583)),
    ],
    ids=str,
)
def test_iso_cts_of_nearly_dependent_directions(shape, seed, weights):
    """Its directions have a condition of a thousand and more, of which no square may be left."""
    pairs = many(shape, seed)
    found = run("iso_cts", pairs, weights)
    other = run("iso_cts", in_another_gauge(pairs, seed + 1), weights)
    assert oracle.relative_error(other, found) < 1e-9
    assert oracle.relative_error(found, by_the_paper("iso_cts", pairs, weights)) < 1e-8


@pytest.mark.parametrize("name", sorted(set(ALL) - ENTRYWISE))
@given(shape=shapes, seed=seeds, weights=signed_weights)
def test_equivariant_under_rotations_of_input_and_output(name, shape, seed, weights):
    d, k, _ = shape
    pairs = many(shape, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        for n in (d, k)
    )
    if name in HALF_ENTRYWISE:
        right = torch.eye(k, dtype=torch.float64)
    turned = run(name, [(left @ b.double(), a.double() @ right) for b, a in pairs], weights)
    expected = left.numpy() @ run(name, pairs, weights) @ right.numpy()
    assert oracle.relative_error(turned, expected) < 1e-6


@pytest.mark.parametrize("name", sorted(set(ALL) - ENTRYWISE))
def test_half_precision_merges_like_float32(name):
    """The fast path in float32 gives up where it is not enough."""
    pairs = [factors(64, 48, 4, seed=i, dtype=torch.bfloat16) for i in range(3)]
    near = [*pairs, (pairs[0][0], pairs[0][1] + pairs[1][1])]
    for chosen in (pairs, near, [pairs[0]] * 2):
        adapters = [
            Adapter({"w": LowRank(a, b)}, {}, name=f"a{i}") for i, (b, a) in enumerate(chosen)
        ]
        exact = merged(adapters, name, dtype="float32")
        assert oracle.relative_error(merged(adapters, name, dtype="bfloat16"), exact) < 5e-3


@pytest.mark.parametrize("size", [3e-20, 4e-13, 1e-5, 1e12], ids=lambda s: f"{s:g}")
@pytest.mark.parametrize("name", sorted(set(ALL) - ENTRYWISE))
def test_half_precision_of_any_size(name, size):
    """Squares and products of the fast path neither underflow nor overflow unseen."""
    pairs = [factors(64, 48, 4, seed=i) for i in range(3)]
    adapters = [
        Adapter({"w": LowRank((a * size).bfloat16(), (b * size).bfloat16())}, {}, name=f"a{i}")
        for i, (b, a) in enumerate(pairs)
    ]
    exact = merged(adapters, name, dtype="float32")
    assert oracle.relative_error(merged(adapters, name, dtype="bfloat16"), exact) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_knots_where_weak_directions_vanish(dtype):
    """TIES leaves nothing of a direction that is far weaker than the others."""
    pairs = [factors(64, 48, 4, seed=i, dtype=dtype) for i in range(2)]
    for b, _ in pairs:
        b[:, 3] = 1e-3 * b[:, 0]
        b[3, 3] *= 2
    adapters = [Adapter({"w": LowRank(a, b)}, {}, name=f"a{i}") for i, (b, a) in enumerate(pairs)]
    expected = dense_methods.knots_ties([dense(*pair) for pair in pairs], [0.5, 0.5], 0.1)
    assert np.linalg.matrix_rank(expected, tol=1e-9 * np.linalg.norm(expected, 2)) < 8
    error = oracle.relative_error(merged(adapters, "knots_ties", density=0.1), expected)
    assert error < (5e-3 if dtype == torch.bfloat16 else 1e-6)


# --- methods that coincide ------------------------------------------------------------


@given(shape=shapes, seed=seeds, weights=signed_weights)
def test_tsv_is_the_sum_whitened_by_the_coverage(shape, seed, weights):
    """K_U^-1/2 (sum w dW) K_V^-1/2, K the sum of the projectors, when nothing is cut off."""
    d, k, _ = shape
    pairs = many((3 * d, 3 * k, shape[2]), seed)
    deltas = [dense(*pair) for pair in pairs]
    svds = [oracle.thin_svd(delta) for delta in deltas]
    whitened = oracle.linear(deltas, weights)
    whitened = _inverse_root(sum(u @ u.T for u, _, _ in svds)) @ whitened
    whitened = whitened @ _inverse_root(sum(v @ v.T for _, _, v in svds))
    assert oracle.relative_error(run("tsv", pairs, weights), whitened) < 1e-7


def _inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    roots = np.array([1 / math.sqrt(value) if value > 1e-8 else 0.0 for value in values])
    return (vectors * roots) @ vectors.T


@given(shape=shapes, seed=seeds, weights=signed_weights)
def test_coverage_is_tsv_but_for_its_size(shape, seed, weights):
    d, k, _ = shape
    pairs = many((3 * d, 3 * k, shape[2]), seed)
    expected = run("tsv", pairs, weights)
    assert oracle.relative_error(run("coverage", pairs, weights), expected) < 1e-7


@given(seed=seeds, weights=signed_weights)
def test_tsv_of_orthogonal_adapters_is_task_arithmetic(seed, weights):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, 9, generator=generator, dtype=torch.float64)).Q
        for n in (20, 24)
    )
    pairs = [
        (left[:, i : i + 3] * torch.tensor([3.0, 2.0, 1.0]), right[:, i : i + 3].mT)
        for i in (0, 3, 6)
    ]
    expected = run("task_arithmetic", pairs, weights)
    assert oracle.relative_error(run("tsv", pairs, weights), expected) < 1e-9


@given(shape=shapes, seed=seeds, weights=signed_weights)
def test_iso_cts_with_everything_common_is_iso_c(shape, seed, weights):
    pairs = many(shape, seed)
    expected = run("iso_c", pairs, weights)
    assert oracle.relative_error(run("iso_cts", pairs, weights, common=1), expected) < 1e-7


@pytest.mark.parametrize("name", SPHERICAL)
@given(shape=shapes, seed=seeds, t=st.floats(0.05, 0.95))
def test_spherical_means_of_two_are_slerp(name, shape, seed, t):
    pairs = many(shape, seed, n=2)
    expected = dense_methods.slerp(*(dense(*pair) for pair in pairs), t)
    assert oracle.relative_error(run(name, pairs, [1 - t, t]), expected) < 1e-7


@pytest.mark.parametrize("name", SPHERICAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(
    seed=seeds,
    weights=st.lists(st.sampled_from([-2, -1, -0.5, 0.5, 1, 3]), min_size=2, max_size=6).filter(
        lambda weights: min(weights) < 0 < max(weights)
    ),
)
@example(seed=1, weights=[2, 1, -1])
@example(seed=1, weights=[1, -0.5])
@example(seed=1, weights=[1, -1])
def test_opposite_copies_keep_the_direction_of_their_sum(name, dtype, seed, weights):
    b, a = factors(20, 16, 3, seed=seed, dtype=dtype)
    copies = [Adapter({"w": LowRank(a, b)}, {}, name=f"a{i}") for i in range(len(weights))]
    result = merge_adapters(
        copies, method=name, weights=weights, rank=3, normalize=False, dtype="float32"
    )
    update, report = result.modules["w"], result.report
    expected = np.sign(sum(weights)) * np.abs(weights).sum() * dense(b, a)
    found = dense(update.lora_b, update.lora_a)
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(dense(b, a))
    assert any("opposite directions" in warning for warning in report.warnings)


@pytest.mark.parametrize("name", SPHERICAL)
def test_copies_rounded_apart_are_opposite(name):
    """The same update, its length split differently into factors, and then rounded."""
    b, a = factors(200, 160, 3, seed=1)
    pairs = [(b.bfloat16(), a.bfloat16()), ((3 * b).bfloat16(), (a / 3).bfloat16())]
    copies = [Adapter({"w": LowRank(a, b)}, {}, name=f"a{i}") for i, (b, a) in enumerate(pairs)]
    result = merge_adapters(copies, method=name, weights=[1, -0.5], normalize=False)
    assert result.report.norm_ratio == pytest.approx(1.5, rel=1e-2)
    assert min(abs(cosine) for cosine in result.report.cosines.values()) > 0.999
    assert any("opposite directions" in warning for warning in result.report.warnings)


@pytest.mark.parametrize("name", SPHERICAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(
    seed=seeds,
    sources=st.lists(st.integers(0, 2), min_size=2, max_size=6),
    weights=st.lists(st.floats(0.01, 2.0) | st.floats(-2.0, -0.01), min_size=6, max_size=6),
    noise=st.sampled_from([0, 1e-9, 1e-6, 1e-4, 1e-2]),
)
def test_spherical_means_of_near_copies_are_finite(name, dtype, seed, sources, weights, noise):
    copies = []
    for i, source in enumerate(sources):
        b, a = factors(20, 16, 3, seed=1000 * seed + source, dtype=torch.float64)
        change, _ = factors(20, 16, 3, seed=1000 * seed + 10 + i, dtype=torch.float64)
        pair = LowRank(a.to(dtype), (b + noise * change).to(dtype))
        copies.append(Adapter({"w": pair}, {}, name=f"a{i}"))
    used = weights[: len(sources)]
    report = merge_adapters(
        copies, method=name, weights=used, rank=16, normalize=False, dtype="float32"
    ).report
    assert math.isfinite(report.norm_ratio)
    if report.norm_ratio > 1e-9:
        sizes = [np.linalg.norm(update.modules["w"].delta()) for update in copies]
        size = np.abs(used) @ sizes / np.mean(sizes)
        assert report.norm_ratio == pytest.approx(size, rel=1e-4)
        assert all(abs(cosine) <= 1 + 1e-6 for cosine in report.cosines.values())


def test_task_arithmetic_and_concat_are_linear_with_other_defaults():
    pairs = many((16, 12, 3), seed=5)
    adapters = adapters_with(pairs, None, None)
    total = 1 + 2 + 0.5
    options = {"method": "linear", "weights": [1, 2, -0.5], "normalize": False}
    for name, rank in (("task_arithmetic", "max"), ("concat", "sum")):
        expected = merge_adapters(adapters, rank=rank, **options)
        result = merge_adapters(adapters, method=name, weights=[1, 2, -0.5])
        assert torch.equal(result.modules["w"].lora_b, expected.modules["w"].lora_b)
        normalized = merge_adapters(
            adapters, method=name, weights=[1, 2, -0.5], normalize=True, scale=total
        )
        difference = normalized.modules["w"].delta() - expected.modules["w"].delta()
        assert difference.norm() < 1e-6 * expected.modules["w"].delta().norm()


def test_concat_is_exact():
    pairs = many((16, 12, 3), seed=5)
    result = merge_adapters(adapters_with(pairs, None, None), method="concat")
    assert result.modules["w"].rank == 9
    assert abs(result.report.energy_kept - 1) < 1e-12
    update = result.modules["w"]
    expected = sum(dense(*pair) for pair in pairs)
    assert oracle.relative_error(dense(update.lora_b, update.lora_a), expected) < 1e-6


# --- calibration ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "tsv", "gam", "ties", "ctm"])
@given(seed=seeds, weights=signed_weights, ranks=st.permutations([2, 3, 4]))
def test_pico_is_the_authors_calibration_before_any_method(name, seed, weights, ranks):
    pairs = [factors(16, 12, rank, seed=1000 * seed + rank) for rank in ranks]
    calibrated = dense_methods.pico(pairs)
    split = [oracle.thin_svd(delta) for delta in calibrated]
    shorter = [(torch.tensor(u * s), torch.tensor(v.T)) for u, s, v in split]
    expected = merged(adapters_with(shorter, None, None), name, weights=weights)
    sizes = [np.linalg.norm(dense(*pair)) for pair in pairs]
    shares = np.abs(weights) / np.abs(weights).sum()
    expected = expected * (shares @ sizes) / np.linalg.norm(expected)
    result = merged(adapters_with(pairs, None, None), name, weights=weights, calibrate="pico")
    assert oracle.relative_error(result, expected) < 1e-4


@pytest.mark.parametrize("name", ["linear", "tsv", "knots_ties", "ties"])
def test_cosines_are_those_of_the_dense_updates(name):
    pairs = many((16, 12, 3), seed=5)
    result = merge_adapters(adapters_with(pairs, None, None), method=name, rank=12)
    update = result.modules["w"].delta().double().numpy()
    for index, pair in enumerate(pairs):
        delta = dense(*pair)
        cosine = (update * delta).sum() / np.linalg.norm(update) / np.linalg.norm(delta)
        assert abs(result.report.cosines[f"a{index}"] - cosine) < 1e-5


def test_pico_reports_the_inputs_and_what_became_of_them():
    pairs = many((16, 12, 3), seed=5)
    adapters = adapters_with(pairs, None, None)
    result = merge_adapters(adapters, method="linear", rank="sum", calibrate="pico")
    assert abs(result.report.norm_ratio - 1) < 1e-6
    update = result.modules["w"].delta().double().numpy()
    for index, pair in enumerate(pairs):
        delta = dense(*pair)
        cosine = (update * delta).sum() / np.linalg.norm(update) / np.linalg.norm(delta)
        assert abs(result.report.cosines[f"a{index}"] - cosine) < 1e-6


def test_pico_leaves_one_adapter_as_it_is():
    pairs = many((16, 12, 3), seed=5, n=1)
    result = merged(adapters_with(pairs, None, None), "linear", calibrate="pico")
    assert oracle.relative_error(result, dense(*pairs[0])) < 1e-6


# --- what went wrong once -------------------------------------------------------------


@pytest.mark.parametrize("common", [1.0, 0.8, 0.5, 0.3])
def test_iso_cts_counts_only_directions_that_are_there(common):
    """Adapters that share their input side reach fewer directions than they have columns."""
    pairs = many((48, 64, 8), seed=2)
    shared = [(b, pairs[0][1]) for b, _ in pairs]
    deltas = [dense(*pair) for pair in shared]
    expected = dense_methods.in_core_space(dense_methods.iso_cts)(deltas, [1, 1, 1], common=common)
    result = run("iso_cts", shared, [1, 1, 1], common=common)
    assert oracle.relative_error(result, expected) < 1e-6


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (2, 3), (3, 2)])
def test_fewer_directions_than_adapters(shape):
    pairs = many((*shape, 1), seed=4)
    for name in ALL:
        assert np.isfinite(run(name, pairs, [0.5, 0.3, 0.2])).all(), name


@pytest.mark.parametrize("name", ["linear", "concat", "iso_c", "tsv", "coverage"])
def test_large_updates_of_low_rank_stay_finite(name):
    pairs = many((24, 20, 4), seed=6)
    adapters = [
        Adapter({"w": LowRank(pairs[0][1] * 1e8, b * 1e8)}, {}, name=f"a{i}")
        for i, (b, _) in enumerate(pairs)
    ]
    result = merge_adapters(adapters, method=name, rank="sum")
    assert torch.isfinite(result.modules["w"].delta()).all()
    assert all(abs(cosine) <= 1 + 1e-6 for cosine in result.report.cosines.values())


@pytest.mark.parametrize("options", [{"scale": 1e300}, {"weights": [1e200, 1], "normalize": False}])
def test_what_overflows_is_refused(options):
    pairs = many((24, 20, 4), seed=6)[:2]
    adapters = [Adapter({"w": LowRank(a, b)}, {}, name=f"a{i}") for i, (b, a) in enumerate(pairs)]
    with pytest.raises(OutputError, match="overflow"):
        merge_adapters(adapters, method="linear", **options)


RESULTS = [(name, {}) for name in STRATEGIES] + [("gam", {"reference": "consensus"})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "params"), RESULTS, ids=str)
def test_batches_and_threads_do_not_change_a_bit(name, params, dtype, monkeypatch):
    modules = {f"layers.{i}.{name}": (40, 36, 6) for i in range(4) for name in ("up", "down")}
    adapters = [memory_adapter(modules, dtype=dtype, seed=ord(n), name=n) for n in "abc"]
    fewer = {**params, "rank": 5}
    threads = torch.get_num_threads()
    found = []
    try:
        for count, size in ((1, 1), (3, 1), (3, 2**30)):
            torch.set_num_threads(count)
            monkeypatch.setattr(gam.merging.batches, "_BATCH_BYTES", {"cpu": size})
            merges = [merge_adapters(adapters, method=name, **p) for p in (params, fewer)]
            found.append([tensor for m in merges for tensor in m.state_dict().values()])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))

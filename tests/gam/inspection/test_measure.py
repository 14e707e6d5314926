"""Inspections: pairs that are known exactly, changes that must not matter, odd inputs, advice."""

import itertools
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.adapters import make_adapter
from helpers.inspection import NAME, adapter, inspect_updates, random_updates, rotation
from hypothesis import given, settings
from hypothesis import strategies as st

from gam import AdapterError, GamError, LowRank, inspect_adapters, merge_adapters

settings.register_profile("inspect", deadline=None, max_examples=25)
settings.load_profile("inspect")

seeds = st.integers(0, 10**6)


def update(left, core, right, scale=1.0):
    """A LoRA update `scale * left core right^T` from dense arrays."""
    b, a = torch.from_numpy(left @ core), torch.from_numpy(np.ascontiguousarray(right.T))
    return LowRank(a, b, scale)


def known_pair(turn, thetas, phis, first, second):
    """Two updates of known singular values, with the principal angles theta on the left side and
    phi on the right: between the l-th singular vectors, the others are at right angles."""

    def sides(size, angles):
        r = len(angles)
        basis = rotation(turn, size)
        return basis[:, :r], basis[:, :r] * np.cos(angles) + basis[:, r : 2 * r] * np.sin(angles)

    (u1, u2), (v1, v2) = sides(20, thetas), sides(14, phis)
    return update(u1, np.diag(first), v1), update(u2, np.diag(second), v2)


def inspect_pair(one, two):
    report = inspect_adapters([adapter("a", {NAME: one}), adapter("b", {NAME: two})])
    return report, report.modules[0].pairs[0]


def test_angles_cosines_and_sizes_of_a_pair_that_is_known():
    thetas, phis = np.radians([10.0, 35.0, 80.0]), np.radians([60.0, 5.0, 45.0])
    s, t = np.array([3.0, 2.0, 0.5]), np.array([2.5, 1.0, 0.75])
    one, two = known_pair(np.random.default_rng(0), thetas, phis, s, t)
    report, pair = inspect_pair(one, two)

    inner = (s * t * np.cos(thetas) * np.cos(phis)).sum()
    assert pair.cosine == pytest.approx(inner / np.linalg.norm(s) / np.linalg.norm(t), rel=1e-12)
    assert pair.norm_ratio == pytest.approx(np.linalg.norm(s) / np.linalg.norm(t), rel=1e-12)
    for side, angles, width in ((pair.left, thetas, 20), (pair.right, phis, 14)):
        assert side.angles_deg == pytest.approx(np.degrees(np.sort(angles)), rel=1e-10)
        assert side.overlap == pytest.approx((np.cos(angles) ** 2).mean(), rel=1e-12)
        assert side.overlap_null == 3 / width
        assert side.grassmann == pytest.approx(np.linalg.norm(angles), rel=1e-10)
        # The l-th singular vectors are paired already, so that rotations change nothing.
        assert side.paired == pytest.approx(np.cos(angles).mean(), rel=1e-12)
        assert side.aligned == pytest.approx(np.cos(angles).mean(), rel=1e-12)
    mean = (np.linalg.norm(s) + np.linalg.norm(t)) / 2
    shrunk = (s + t) / 2 * np.sqrt((1 + np.cos(thetas)) / 2 * (1 + np.cos(phis)) / 2)
    assert pair.gam_norm_ratio == pytest.approx(np.linalg.norm(shrunk) / mean, rel=1e-12)
    linear = math.sqrt((s**2).sum() + (t**2).sum() + 2 * inner) / 2
    assert pair.linear_norm_ratio == pytest.approx(linear / mean, rel=1e-12)
    for values, name in ((s, "a"), (t, "b")):
        own = report.modules[0].updates[name]
        assert own.singular_values == pytest.approx(values, rel=1e-12)
        shares = values / values.sum()
        entropy = -(shares * np.log(shares)).sum()
        assert own.effective_rank == pytest.approx(math.exp(entropy), rel=1e-12)
        assert own.norm == pytest.approx(np.linalg.norm(values), rel=1e-12)


@pytest.mark.parametrize("degrees", [0.0, 60.0, 89.0, 90.0])
def test_one_angle_for_all(degrees):
    angles = np.radians([degrees] * 2)
    s = np.array([2.0, 1.0])
    _, pair = inspect_pair(*known_pair(np.random.default_rng(1), angles, angles, s, s))
    overlap = math.cos(angles[0]) ** 2
    assert pair.left.overlap == pytest.approx(overlap, abs=1e-12)
    assert pair.left.overlap_above_chance == pytest.approx((overlap - 0.1) / 0.9, abs=1e-12)
    assert pair.cosine == pytest.approx(overlap, abs=1e-12)  # cos theta cos phi
    # The angle of a cosine near 1 is good to the square root of its rounding.
    assert pair.left.angles_deg == pytest.approx([degrees] * 2, abs=1e-5)
    if degrees < 90:  # at a right angle every rotation is as good, and the size depends on it
        shrunk = (1 + math.cos(angles[0])) / 2
        assert pair.gam_norm_ratio == pytest.approx(shrunk, rel=1e-9)


def test_spaces_of_unequal_rank():
    # A line at 30 degrees to the plane that it is compared with.
    basis = rotation(np.random.default_rng(2), 10)
    line = basis[:, :1] * math.cos(math.pi / 6) + basis[:, 2:3] * math.sin(math.pi / 6)
    one = update(basis[:, :2], np.diag([2.0, 1.0]), basis[:, 3:5])
    two = update(line, np.array([[3.0]]), basis[:, 4:5])
    _, pair = inspect_pair(one, two)
    assert pair.left.angles_deg == pytest.approx([30.0])
    assert pair.left.overlap == pytest.approx(0.75)
    assert pair.left.overlap_null == 2 / 10
    assert pair.right.angles_deg == pytest.approx([0.0], abs=1e-5)
    # Paired are the first singular vectors only.
    assert pair.left.paired == pytest.approx(math.cos(math.pi / 6))
    assert pair.right.paired == pytest.approx(0, abs=1e-12)
    assert math.isnan(pair.a_cosine)


# --- what must not matter -------------------------------------------------------------


def figures(value, absent):
    """All numbers of a report in order, but for some fields."""
    if isinstance(value, dict):
        return [
            x for key, item in value.items() if key not in absent for x in figures(item, absent)
        ]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in figures(item, absent)]
    return [value] if isinstance(value, (int, float)) else []


def assert_same_geometry(one, two, *absent):
    first, second = (figures(asdict(report), absent) for report in (one, two))
    assert first == pytest.approx(second, rel=1e-6, abs=1e-9, nan_ok=True)


@given(seeds)
def test_the_gauge_does_not_matter(seed):
    generator = np.random.default_rng(seed)
    updates = random_updates(generator)
    changed = []
    for one in updates:
        gauge = torch.from_numpy(
            rotation(generator, one.rank) @ np.diag(generator.uniform(0.2, 5.0, one.rank))
        )
        changed.append(
            LowRank(torch.linalg.solve(gauge, one.lora_a), one.lora_b @ gauge, one.scale)
        )
    assert_same_geometry(inspect_updates(updates), inspect_updates(changed), "a_cosine")


@given(seeds)
def test_orthogonal_changes_of_input_and_output_do_not_matter(seed):
    generator = np.random.default_rng(seed)
    updates = random_updates(generator)
    left, right = (torch.from_numpy(rotation(generator, size)) for size in (18, 13))
    changed = [LowRank(u.lora_a @ right, left @ u.lora_b, u.scale) for u in updates]
    # Signs of entries depend on the basis of the weights, and are meant to.
    assert_same_geometry(
        inspect_updates(updates), inspect_updates(changed), "sign_conflict", "sign_conflict_error"
    )


@given(seeds, st.permutations(range(3)))
def test_the_order_of_the_adapters_only_orders_the_report(seed, order):
    updates = random_updates(np.random.default_rng(seed), ranks=(3, 3, 3))
    names = [str(index) for index in range(3)]
    one, two = (
        inspect_adapters([adapter(names[i], {NAME: updates[i]}) for i in indices])
        for indices in (range(3), order)
    )
    closeness = [{r.name: r.closeness for r in report.references} for report in (one, two)]
    assert closeness[0] == pytest.approx(closeness[1], rel=1e-9)
    cosines = [{frozenset((p.first, p.second)): p.cosine for p in r.pairs} for r in (one, two)]
    assert cosines[0] == pytest.approx(cosines[1], rel=1e-9, abs=1e-12)
    assert one.linear_norm_ratio == pytest.approx(two.linear_norm_ratio, rel=1e-9)


# --- what a merge will do -------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Three adapters on disk: mixed ranks, formats and scalings, a module short, zeros."""
    root = tmp_path_factory.mktemp("uneven")
    q, k, up = (f"model.layers.{n}" for n in ("0.attn.q_proj", "0.attn.k_proj", "1.mlp.up_proj"))
    zero = {f"base_model.model.{up}.lora_B.weight": torch.zeros(30, 3)}
    return [
        make_adapter(root / "a", {q: (20, 16, 4), k: (12, 16, 4)}, seed=1),
        make_adapter(root / "b", {q: (20, 16, 2), up: (30, 16, 4)}, seed=2, dtype=torch.bfloat16),
        make_adapter(root / "c", {q: (20, 16, 3), up: (30, 16, 3)}, seed=3, alpha=-5, tensors=zero),
    ]


def test_the_sizes_of_merges_are_those_of_the_merges(uneven):
    report = inspect_adapters(uneven)
    for method, field in (("gam", "gam_norm_ratio"), ("linear", "linear_norm_ratio")):
        merged = merge_adapters(uneven, method=method, rank="sum", dtype="float32").report
        assert getattr(report, field) == pytest.approx(merged.norm_ratio, rel=1e-5)
        for module, expected in zip(report.modules, merged.modules, strict=True):
            assert getattr(module, field) == pytest.approx(expected.norm_ratio, rel=1e-5)
        for pair, paths in zip(report.pairs, itertools.combinations(uneven, 2), strict=True):
            merged = merge_adapters(paths, method=method, rank="sum", dtype="float32").report
            assert getattr(pair, field) == pytest.approx(merged.norm_ratio, rel=1e-5)


def test_sizes_of_merges_equal_the_literal_algorithm():
    updates = random_updates(np.random.default_rng(3))
    deltas = [u.delta().numpy() for u in updates]
    mean = np.mean([np.linalg.norm(delta) for delta in deltas])
    expected = np.linalg.norm(oracle.gam(deltas)) / mean
    assert inspect_updates(updates).gam_norm_ratio == pytest.approx(expected, rel=1e-9)


def test_changes_between_references_are_those_of_the_merges(uneven):
    report = inspect_adapters(uneven)
    merges = {}
    for reference in report.references:
        merged = merge_adapters(uneven, reference=reference.name, dtype="float32", rank="sum")
        merges[reference.name] = torch.cat([m.delta().flatten() for m in merged.modules.values()])
    natural = merges[report.references[0].name]
    assert {r.name for r in report.references} == {"a", "b", "c"}
    assert report.references[0].change == 0
    for reference in report.references[1:]:
        change = (merges[reference.name] - natural).norm() / natural.norm()
        assert reference.change == pytest.approx(float(change), rel=1e-4)


def test_the_natural_reference_is_the_one_in_the_middle():
    # a and c each stray from b, in directions of their own.
    generator = np.random.default_rng(4)
    middle = [rotation(generator, 16)[:, :3] for _ in "BA"]
    adapters = []
    for name, distance in (("a", 0.15), ("b", 0.0), ("c", 0.15)):
        left, right = (
            np.linalg.qr(basis + distance * generator.standard_normal(basis.shape))[0]
            for basis in middle
        )
        adapters.append(adapter(name, {NAME: update(left, np.diag([3.0, 2.0, 1.0]), right)}))
    report = inspect_adapters(adapters)
    assert report.references[0].name == "b"
    assert {reference.name for reference in report.references[1:]} == {"a", "c"}
    (line,) = [line for line in report.advice if line.startswith("reference:")]
    assert "'b' is closest to the others" in line
    assert "--reference b" in line


# --- odd inputs -----------------------------------------------------------------------


def test_missing_modules_and_zero_updates(uneven):
    report = inspect_adapters(uneven)
    q, k, up = (
        next(m for m in report.modules if m.kind == kind)
        for kind in ("q_proj", "k_proj", "up_proj")
    )
    assert (q.layer, up.layer) == (0, 1)
    assert [(p.first, p.second) for p in q.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert list(k.updates) == ["a"]
    assert k.pairs == up.pairs == []
    assert up.updates["c"].norm == 0
    assert up.updates["c"].singular_values == []
    assert math.isnan(up.updates["c"].effective_rank)
    assert [entry.zero for entry in report.adapters] == [0, 0, 1]
    assert [entry.description.ranks for entry in report.adapters] == [[4], [2, 4], [3]]
    assert [group.name for group in report.layers] == [0, 1]
    # Layer 1 is shared by no two adapters: no overlap, no cosine but 0, no sign conflict.
    pair = next(p for p in report.layers[1].pairs if (p.first, p.second) == ("b", "c"))
    assert pair.modules == 0
    assert math.isnan(pair.left.overlap)
    assert math.isnan(pair.sign_conflict)
    assert any(line.startswith("missing: 2 of 3 modules") for line in report.advice)
    assert "zero: the update of 'c' is zero in 1 of 2 modules" in report.advice


def test_a_missing_module_counts_as_zero_in_the_cosine_of_all():
    one, two, three = random_updates(np.random.default_rng(5), ranks=(2, 2, 2))
    report = inspect_adapters(
        [adapter("a", {"x.0.q": one, "x.1.q": two}), adapter("b", {"x.0.q": three})]
    )
    deltas = [u.delta().flatten() for u in (one, two, three)]
    norm = float(torch.cat(deltas[:2]).norm() * deltas[2].norm())
    assert report.pairs[0].cosine == pytest.approx(float(deltas[0] @ deltas[2]) / norm)
    assert report.pairs[0].modules == 1


def test_one_adapter_and_zero_adapters():
    one = random_updates(np.random.default_rng(6))[0]
    report = inspect_updates([one])
    assert report.pairs == []
    assert report.references == ()
    assert report.gam_norm_ratio == pytest.approx(1)
    nothing = replace(one, lora_b=torch.zeros_like(one.lora_b))
    report = inspect_updates([nothing, nothing, nothing])
    assert report.pairs[0].modules == 0
    assert math.isnan(report.pairs[0].cosine)
    assert math.isnan(report.gam_norm_ratio)
    assert "zero: the update of '0' is zero in 1 of 1 modules" in report.advice
    json.dumps(report.as_dict(), allow_nan=False)


def test_the_record_is_plain_and_has_the_names_of_the_fields(uneven):
    report = inspect_adapters(uneven)
    record = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert list(record) == list(asdict(report))
    assert record["pairs"][0]["left"]["overlap"] == report.pairs[0].left.overlap
    assert record["modules"][0]["updates"]["a"]["singular_values"]
    assert record["layers"][1]["pairs"][0]["left"]["overlap"] is None
    assert len(record["adapters"][0]["sha256"]) == 64


def test_half_precision_is_as_good_as_stated():
    generator = np.random.default_rng(8)
    updates = [
        replace(u, lora_a=u.lora_a.bfloat16(), lora_b=u.lora_b.bfloat16())
        for u in random_updates(generator, ranks=(8, 8, 8), shape=(300, 200))
    ]
    exact = [replace(u, lora_a=u.lora_a.double(), lora_b=u.lora_b.double()) for u in updates]
    fast, slow = (inspect_updates(them).modules[0] for them in (updates, exact))
    for one, two in zip(fast.pairs, slow.pairs, strict=True):
        assert one.left.overlap == pytest.approx(two.left.overlap, abs=1e-4)
        assert one.cosine == pytest.approx(two.cosine, abs=1e-4)
        assert one.gam_norm_ratio == pytest.approx(two.gam_norm_ratio, rel=1e-4)


def test_other_bases_are_refused_as_in_a_merge(uneven, tmp_path):
    other = make_adapter(tmp_path / "other", base_model_name_or_path="other/base")
    with pytest.raises(AdapterError, match="--allow-base-mismatch"):
        inspect_adapters([uneven[0], other])
    report = inspect_adapters([uneven[0], other], allow_base_mismatch=True)
    assert any(line.startswith("base models differ: ") for line in report.advice)
    with pytest.raises(GamError, match="got none"):
        inspect_adapters([])

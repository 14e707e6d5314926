"""Advice: what it says first agrees with merges that were scored, and names what was found."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.inspection import adapter, inspect_updates, random_updates, rotation
from helpers.paths import ROOT

from gam import LowRank, inspect_adapters
from gam.inspection.groups import agreement

TASKS = [ROOT / "examples" / "adapters" / name for name in ("reverse", "sort", "rotate")]
RECORD = ROOT / "examples" / "pda_miniature" / "record"


def deltas(world, seed):
    return [RECORD / f"world-{world}" / f"{family}-{seed}" for family in "ABC"]


def lines(updates, word):
    return [line for line in inspect_updates(updates).advice if line.startswith(word)]


# --- what to try first ----------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_unrelated_tasks_are_to_be_added_up(count):
    """Where they were scored, every average lost a task that the sum kept."""
    report = inspect_adapters(TASKS[:count])
    for pair in report.pairs:
        assert agreement(report.modules, pair.first, pair.second)[0] < 0.15
    assert report.advice[0].startswith("try first: --method concat, the sum.")
    assert f"leaves each {'half' if count == 2 else 'a third'} of its strength" in report.advice[0]
    text = "\n".join(report.advice)
    for harm in ("match_norm", "size: ", "reference: ", "--size mean brings"):
        assert harm not in text


@pytest.mark.parametrize("seed", ["own", "shared"])
@pytest.mark.parametrize("world", range(3))
def test_deltas_of_one_student_are_to_be_averaged_at_their_size(world, seed):
    """Where they were scored, this was as good as the best, and the sum did harm."""
    report = inspect_adapters(deltas(world, seed))
    for pair in report.pairs:
        assert agreement(report.modules, pair.first, pair.second)[0] > 0.2
    assert report.advice[0].startswith("try first: --method linear --size mean, then ties.")
    assert "A sum (concat) is up to 3 times too strong" in report.advice[0]
    assert any(line.startswith("size: ") and "--size mean" in line for line in report.advice)
    starts = [line for line in report.advice if line.startswith("one start: ")]
    assert bool(starts) == (seed == "shared")


def spaces(generator):
    """Orthonormal bases of three spaces at right angles, on each side."""
    left, right = rotation(generator, 60), rotation(generator, 50)
    return [(left[:, i : i + 3], right[:, i : i + 3]) for i in (0, 3, 6)]


def update(left, right, scale=1.0):
    b, a = (torch.from_numpy(np.ascontiguousarray(side)) for side in (left, right.T))
    return LowRank(a, b, scale)


def test_one_task_learned_twice_is_to_be_averaged():
    (u, v), (w, _), (x, _) = spaces(np.random.default_rng(0))
    # Both write u of all that they read, each a little of its own.
    (line,) = lines([update(u + 0.4 * w, v), update(u + 0.4 * x, v)], "try first: ")
    assert "--method linear --size mean" in line
    near = [np.hstack([v[:, :2], z[:, :1]]) for _, z in spaces(np.random.default_rng(0))[1:]]
    large = np.diag([1.0, 1.0, 0.6])
    (line,) = lines([update(u @ large, z) for z in near], "try first: ")
    assert line.startswith("try first: --method linear. The adapters learned much the same")


def test_some_related_ones_are_to_be_averaged_before_the_others_are_added():
    (u, v), (w, z), (x, _) = spaces(np.random.default_rng(1))
    updates = [update(u, v), update(u + w, v), update(x, z)]
    (line,) = lines(updates, "try first: ")
    assert line.startswith("try first: two steps. '0' and '1' are related (agreement 0.71;")
    assert "--method linear --size mean" in line
    assert "--method concat" in line


def test_between_the_two_only_a_score_can_tell():
    (u, v), (w, _), _ = spaces(np.random.default_rng(2))
    cosine = 0.17
    part = update(cosine * u + (1 - cosine**2) ** 0.5 * w, v)
    (line,) = lines([update(u, v), part], "try first: ")
    assert line.startswith("try first: both --method linear --size mean and --method concat")
    assert "Agreement 0.17 lies between" in line


def test_adapters_that_change_different_modules_are_told_so_in_words():
    one, two, three = random_updates(np.random.default_rng(3), ranks=(2, 2, 2))
    pair = [adapter("a", {"x.0.q": one}), adapter("b", {"x.0.up": two})]
    assert inspect_adapters(pair).advice == [
        "try first: --method concat. 'a' and 'b' change different modules, so nothing can collide, "
        "and the sum keeps every adapter whole; an average would weaken each to half, unless "
        "--missing renormalize is given"
    ]
    zero = replace(two, lora_b=torch.zeros_like(two.lora_b))
    nothing = inspect_adapters([pair[0], adapter("b", {"x.0.up": zero})]).advice
    assert not [line for line in nothing if line.startswith("try first: ")]
    # Two that are related, and one apart.
    trio = [*pair, adapter("c", {"x.0.q": one, "x.0.k": three})]
    first, *_ = inspect_adapters(trio).advice
    assert first.startswith("try first: two steps. 'a' and 'c' are related")


# --- what was found -------------------------------------------------------------------


def test_near_duplicates_and_opposites_are_named():
    one, two, _ = random_updates(np.random.default_rng(9), ranks=(2, 2, 2), shape=(80, 90))
    near = replace(one, lora_b=one.lora_b + 0.01 * two.lora_b)
    assert "'0' and '1'" in lines([one, near], "near duplicates: ")[0]
    (line,) = lines([one, replace(near, scale=-1.0)], "opposed: ")
    assert "'0' and '1' undo each other's changes (cosine -1.00)" in line
    assert not lines([one, replace(near, scale=-1.0)], "try first: ")
    assert lines([one, replace(one, scale=-1.0)], "size: ") == [
        "size: merged with equal weights, the adapters cancel"
    ]
    assert not lines([one, two], "near duplicates: ")
    assert lines([one, two], "try first: --method concat")


def test_one_start_is_seen():
    generator = np.random.default_rng(10)
    one, two, three = random_updates(generator, ranks=(2, 2, 2), shape=(80, 90))
    two = LowRank(one.lora_a + 0.05 * two.lora_a, two.lora_b)
    (line,) = lines([one, two], "one start: ")
    assert "'0' and '1' have nearly the same lora_A" in line
    # The same space in another basis is not the same start.
    three = LowRank(torch.tensor([[0.0, 1.0], [-1.0, 0.5]]).double() @ one.lora_a, three.lora_b)
    assert not lines([one, three], "one start: ")


def test_uneven_sizes_come_with_weights_that_balance_them():
    one, two, _ = random_updates(np.random.default_rng(11))
    large = replace(one, scale=20.0)
    (line,) = lines([large, two], "sizes differ: ")
    weights = [float(w) for w in line.partition("--weights ")[2].split()[0].split(",")]
    norms = [float(u.delta().norm()) for u in (large, two)]
    assert weights[0] * norms[0] == pytest.approx(weights[1] * norms[1], rel=0.1)
    assert sum(weights) == pytest.approx(1, abs=0.02)


def test_a_shared_frame_makes_the_reference_matter_little():
    generator = np.random.default_rng(12)
    one, *others = random_updates(generator, ranks=(2, 2, 2), shape=(60, 70))
    near = [LowRank(one.lora_a + 0.01 * u.lora_a, one.lora_b + 0.01 * u.lora_b) for u in others]
    assert "it hardly matters" in lines([one, *near], "reference: ")[0]

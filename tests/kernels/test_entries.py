"""Entry-wise merges in blocks against their dense definition, and the coins against theirs."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from gam_kernels import select
from gam_kernels.entries.blocks import Blocks
from gam_kernels.entries.op import entry_products
from gam_kernels.entries.reference import merge_entries
from gam_kernels.entries.vote import Draw, Vote, marks, words


def votes(d, k, ranks, dtype=torch.float64, **fields):
    generator = torch.Generator().manual_seed(d * k)
    return [
        Vote(
            torch.randn(d, r, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(r, k, generator=generator, dtype=torch.float64).to(dtype),
            share=0.5 + index,
            **fields,
        )
        for index, r in enumerate(ranks)
    ]


RULES = {
    "all": {},
    "low": {"low": 0.8},
    "band": {"low": 0.5, "high": 1.5},
    "none": {"low": math.inf},
    "coin": {"draw": Draw((3, 4), 0.4)},
    "always": {"draw": Draw((3, 4), 1.0)},
    "never": {"draw": Draw((3, 4), 0.0)},
    "window": {"draw": Draw((3, 4), 0.4, 0.3)},
    "wide window": {"draw": Draw((-1, 2**63 - 1), 0.5, 1.0)},
}
SHAPES = [(30, 20), (17, 41), (1, 9), (9, 1), (1, 1)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [(3,), (2, 5), (4, 1, 3)], ids=str)
def test_follows_the_definition(monkeypatch, rule, mean, shape, ranks):
    monkeypatch.setattr(select, "_BLOCK_ENTRIES", 100)
    given = votes(*shape, ranks, **rule)
    expected = merge_entries(given, mean)
    times, onto = torch.randn(shape[1], 2).double(), torch.randn(shape[0], 3).double()
    product, transposed, squared_norm = entry_products(given, mean, times=times, onto=onto)
    scale = 1 + float(expected.abs().max())
    rows = Blocks(given, mean).rows(0, shape[0])
    assert torch.equal(rows != 0, expected != 0)
    assert float((rows - expected).abs().max()) <= 1e-14 * scale * 10
    assert float((product - expected @ times).abs().max()) <= 1e-12 * scale
    assert float((transposed - expected.mT @ onto).abs().max()) <= 1e-12 * scale
    assert squared_norm == pytest.approx(float(expected.square().sum()), rel=1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_float32_is_as_good_as_the_definition_in_float32(rule):
    given = votes(40, 50, (3, 4), torch.float32, **rule)
    exact = [replace(v, left=v.left.double(), right=v.right.double()) for v in given]
    expected = merge_entries(exact, True)
    rows = Blocks(given, True).rows(0, 40)
    assert rows.dtype == torch.float32
    moved = (rows - expected).abs() > 1e-5 * (1 + expected.abs().max())
    # An entry at a threshold, or one of two equal in rank, may fall on the other side.
    assert float(moved.float().mean()) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rows_are_the_same_bits_however_they_are_asked_for(monkeypatch, rule, dtype):
    monkeypatch.setattr(select, "_BLOCK_ENTRIES", 200)
    blocks = Blocks(votes(50, 30, (3, 4), dtype, **rule), True)
    whole = blocks.rows(0, 50)
    for start, stop in [(0, 1), (49, 50), (5, 7), (3, 41), (6, 12)]:
        assert torch.equal(blocks.rows(start, stop), whole[start:stop])


def test_equal_magnitudes_rank_in_the_order_of_the_row():
    left, right = torch.ones(1, 1), torch.tensor([[2.0, -1.0, 1.0, -2.0, 0.0, 2.0]])
    draw = Draw((0, 0), 0.5, 1.0)
    for dtype in (torch.float32, torch.float64):
        given = [Vote(left.to(dtype), right.to(dtype), draw=draw)]
        kept = Blocks(given, False).rows(0, 1)[0]
        probability = torch.tensor([0.6, 0.2, 0.4, 0.8, 0.0, 1.0])
        expected = torch.where(kept != 0, right[0] / probability, 0)
        assert torch.equal(kept != 0, merge_entries(given, False)[0] != 0)
        torch.testing.assert_close(kept.float(), expected)


def word(key, i, j):
    """The word of an entry, in Python's whole numbers."""

    def mark(key, index):
        z = (index * 0x9E3779B97F4A7C15 + key) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) >> 32

    def signed(x):
        return x - 2**32 if x >= 2**31 else x

    x = (mark(key[0], i) ^ mark(key[1], j)) * 0x7FEB352D % 2**32
    x ^= (signed(x) >> 15) % 2**32
    return signed(x * 0x846CA68B % 2**32)


def all_words(key, d, k):
    out = torch.empty(2, d, k, dtype=torch.int32)
    return words(marks(key[0], d), marks(key[1], k), out)


@pytest.mark.parametrize("key", [(0, 0), (1, -1), (2**63 - 1, -(2**63))], ids=str)
def test_words_are_those_of_whole_numbers(key):
    found = all_words(key, 7, 5)
    assert found.tolist() == [[word(key, i, j) for j in range(5)] for i in range(7)]


def test_words_are_evenly_spread_and_unrelated():
    n = 1024
    first, second = (all_words(key, n, n).double() / 2**31 for key in ((5, 6), (7, 6)))
    for bits in (4, 8):
        counts = torch.histc(first, 2**bits, -1, 1)
        expected = n * n / 2**bits
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 2**bits) < 6 * math.sqrt(2 * 2**bits)
    # Of two rows, columns, neighbours or keys the words are uncorrelated; variance is 1/3.
    pairs = [(first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])]
    pairs += [(first[::2], first[1::2]), (first[:, ::2], first[:, 1::2]), (first, first.mT)]
    for one, other in pairs:
        assert abs(float((one * other).mean())) < 6 / 3 / math.sqrt(one.numel())
    for means in (first.mean(0), first.mean(1)):
        assert float(means.abs().max()) < 6 / math.sqrt(3 * n)
    # What the exclusive or of marks could show: rectangles of entries.
    signs = first.sign()
    rectangles = signs[::2, ::2] * signs[1::2, ::2] * signs[::2, 1::2] * signs[1::2, 1::2]
    assert abs(float(rectangles.mean())) < 6 / math.sqrt(rectangles.numel())


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("window", [0.0, 0.1])
def test_the_share_kept_is_the_density(density, window):
    given = votes(400, 500, (3,), draw=Draw((1, 2), density, window))
    kept = float((merge_entries(given, False) != 0).double().mean())
    assert abs(kept - density) < 6 * math.sqrt(density * (1 - density) / 200_000)


def test_probabilities():
    assert Draw((0, 0), 0.5, 0.4).probabilities(5).tolist() == pytest.approx(
        [0.3, 0.4, 0.5, 0.6, 0.7]
    )
    assert Draw((0, 0), 0.3, 0.2).probabilities(1).tolist() == [0.3]
    limits = Draw.limits(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    assert limits.tolist() == [-(2**31), -(2**30) - 1, -1, 2**31 - 1]


def test_votes_must_fit_together():
    with pytest.raises(ValueError, match="votes: got none"):
        entry_products([], True)
    one, other = votes(4, 5, (2,)) + votes(4, 6, (2,))
    with pytest.raises(ValueError, match=r"votes: got .* expected one \(d, k\)"):
        entry_products([one, other], True)
    with pytest.raises(ValueError, match="one dtype"):
        entry_products([one, replace(one, left=one.left.float())], True)
    for name, height in itertools.product(("times", "onto"), (3, 9)):
        with pytest.raises(ValueError, match=rf"{name}: got shape \({height}, 1\)"):
            entry_products([one], True, **{name: torch.ones(height, 1).double()})

"""Layers and kinds of modules, and how alike two adapters change what both read."""

import math

import numpy as np
import pytest
import torch
from helpers.inspection import adapter, random_updates, rotation

from gam import LowRank, inspect_adapters
from gam.inspection.groups import agreement, places


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.12.self_attn.q_proj"], [(12, "q_proj")]),
        (["lm_head"], [(None, "lm_head")]),
        (["h.0.attn.c_proj", "h.0.mlp.c_proj"], [(0, "attn.c_proj"), (0, "mlp.c_proj")]),
        (["layers.3.mlp.experts.7.up_proj"], [(3, "up_proj")]),
        (
            ["vision.layers.0.q_proj", "text.layers.1.q_proj"],
            [(0, "vision.layers.*.q_proj"), (1, "text.layers.*.q_proj")],
        ),
    ],
    ids=["decoder", "no layer", "two of a name", "experts", "two towers"],
)
def test_layers_and_kinds(names, expected):
    assert list(places(names).values()) == expected


def test_agreement_is_blind_to_what_only_one_reads_or_holds():
    """Where each reads half of what the other does, the cosine is 0.5 and the agreement 1."""
    generator = np.random.default_rng(0)
    left, right = rotation(generator, 20)[:, :2], rotation(generator, 30)
    b = torch.from_numpy(np.ascontiguousarray(left))
    one, two, opposite = (
        LowRank(torch.from_numpy(np.ascontiguousarray(right[:, columns].T)), b, scale)
        for columns, scale in (([0, 1], 1.0), ([0, 2], 1.0), ([0, 2], -3.0))
    )
    (extra, *_) = random_updates(generator)
    for second, expected in ((two, 1.0), (opposite, -1.0)):
        report = inspect_adapters(
            [adapter("a", {"x.0.q": one, "x.0.k": extra}), adapter("b", {"x.0.q": second})]
        )
        (pair,) = report.modules[1].pairs
        assert abs(pair.cosine) == pytest.approx(0.5)
        assert abs(report.pairs[0].cosine) < 0.5
        found, _ = agreement(report.modules, "a", "b")
        assert found == pytest.approx(expected)


def test_agreement_spreads_as_stated_for_random_updates():
    generator = np.random.default_rng(1)
    scores = []
    for _ in range(60):
        one, two, _ = random_updates(generator, shape=(40, 30))
        report = inspect_adapters([adapter("a", {"q": one}), adapter("b", {"q": two})])
        found, spread = agreement(report.modules, "a", "b")
        scores.append(found / spread)
    # Standard scores: their mean square is 1, within the spread of 60 of them.
    assert np.mean(np.square(scores)) == pytest.approx(1, abs=4 * math.sqrt(2 / 60))


def test_agreement_needs_a_module_in_common():
    one, two, _ = random_updates(np.random.default_rng(2))
    report = inspect_adapters([adapter("a", {"q": one}), adapter("b", {"k": two})])
    assert all(map(math.isnan, agreement(report.modules, "a", "b")))

"""The candidate merges of the miniature are methods like any other."""

import sys

import numpy as np
import pytest
from helpers import oracle
from helpers.paths import ROOT
from helpers.updates import dense, dense_product, factors, updates_of

from gam import strategies

CANDIDATES = ROOT / "examples/pda_miniature/candidates"
PAIRS = [factors(24, 20, 3, seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def _candidates(monkeypatch):
    monkeypatch.syspath_prepend(CANDIDATES)
    yield
    sys.modules.pop("gam_candidates", None)


def run(name, pairs, **params):
    strategy = strategies.get(name)
    updates = updates_of(pairs)
    weights = [1 / len(pairs)] * len(pairs)
    product = strategy.load()(updates, weights, **{**strategy.check({}, []), **params})
    return dense_product(updates, product)


def test_every_candidate_is_found_and_has_the_size_it_says():
    names = [name for name in strategies.names() if name.startswith("try_")]
    assert len(names) == 6
    mean = np.mean([np.linalg.norm(dense(*pair)) for pair in PAIRS])
    for name in set(names) - {"try_fit"}:
        assert abs(np.linalg.norm(run(name, PAIRS, relative_size=1.2)) - 1.2 * mean) < 1e-8 * mean


def test_least_squares_fit_gives_each_adapter_back_in_its_own_spaces():
    result = run("try_fit", PAIRS, ridge=1e-8)
    for delta in (dense(*pair) for pair in PAIRS):
        u, _, v = oracle.thin_svd(delta)
        assert oracle.relative_error(u @ u.T @ result @ v @ v.T, delta) < 1e-6
    assert oracle.relative_error(run("try_fit", [PAIRS[0]] * 3, ridge=0.0), dense(*PAIRS[0])) < 1e-8

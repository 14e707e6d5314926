"""`size`: what a method gives, or the weighted mean size of the inputs."""

import json
import math

import pytest
import torch
from helpers.adapters import memory_adapter

from gam import OptionError, merge_adapters
from gam.strategies import STRATEGIES

MODULES = {"layers.0.q": (12, 9, 3), "layers.1.q": (10, 11, 2)}
WHOLE = {"rank": 10, "dtype": "float32"}  # no energy is lost


def three(dtype=torch.float32):
    """Three adapters, the last of which lacks a module."""
    found = [memory_adapter(MODULES, seed=seed, name=f"a{seed}", dtype=dtype) for seed in range(3)]
    found[2].modules.pop("layers.1.q")
    return found


def norm(adapter, module):
    update = adapter.modules.get(module)
    return 0.0 if update is None else float(update.delta().double().norm())


@pytest.mark.parametrize("method", STRATEGIES)
@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [2.0, -1.0, 1.0]], ids=str)
def test_every_method_comes_to_the_mean_size(method, weights):
    adapters = three()
    shares = [abs(weight) / sum(map(abs, weights)) for weight in weights]
    options = {"method": method, "weights": weights, "scale": 1.5, **WHOLE}
    merged = merge_adapters(adapters, size="mean", **options)
    exact = merge_adapters(adapters, size="exact", **options)
    for module in MODULES:
        wanted = sum(s * norm(a, module) for s, a in zip(shares, adapters, strict=True))
        assert norm(merged, module) == pytest.approx(1.5 * wanted, rel=2e-5)
        one, two = (a.modules[module].delta().double().flatten() for a in (merged, exact))
        assert float(one @ two / (one.norm() * two.norm())) == pytest.approx(1, abs=1e-6)
    assert merged.report.options["size"] == "mean"


def test_the_share_of_absent_adapters_can_be_given_to_the_others():
    merged = merge_adapters(three(), size="mean", missing="renormalize", **WHOLE)
    present = [norm(adapter, "layers.1.q") for adapter in three()[:2]]
    assert norm(merged, "layers.1.q") == pytest.approx(sum(present) / 2, rel=1e-5)


def test_methods_state_what_they_do_unless_told_otherwise():
    usual = {name: strategy.size for name, strategy in STRATEGIES.items()}
    assert usual == {name: "mean" if name == "coverage" else "exact" for name in STRATEGIES}
    adapters = three()
    for method in ("gam", "coverage"):
        by_default = merge_adapters(adapters, method=method, **WHOLE)
        told = merge_adapters(adapters, method=method, size=usual[method], **WHOLE)
        other = "exact" if usual[method] == "mean" else "mean"
        different = merge_adapters(adapters, method=method, size=other, **WHOLE)
        for module in MODULES:
            assert norm(by_default, module) == norm(told, module)
            assert not math.isclose(norm(by_default, module), norm(different, module), rel_tol=0.1)


def test_pico_goes_with_the_mean_size_unless_told_otherwise():
    merged = merge_adapters(three(), calibrate="pico", **WHOLE)
    wanted = sum(norm(adapter, "layers.0.q") for adapter in three()) / 3
    assert norm(merged, "layers.0.q") == pytest.approx(wanted, rel=1e-5)
    exact = merge_adapters(three(), calibrate="pico", size="exact", **WHOLE)
    assert norm(exact, "layers.0.q") < 0.9 * wanted
    assert all(not module.settings for module in merged.report.modules)


def test_single_modules_have_a_size_of_their_own(tmp_path):
    adapters = three()
    merged = merge_adapters(adapters, modules={"layers.0.*": {"size": "mean"}}, **WHOLE)
    wanted = sum(norm(adapter, "layers.0.q") for adapter in adapters) / 3
    assert norm(merged, "layers.0.q") == pytest.approx(wanted, rel=1e-5)
    exact = merge_adapters(adapters, **WHOLE)
    assert norm(merged, "layers.1.q") == norm(exact, "layers.1.q")
    record = json.loads((merged.save(tmp_path / "out") / "gam_merge.json").read_text())
    assert [module["settings"] for module in record["modules"]] == [{"size": "mean"}, {}]


def test_what_cancels_stays_small():
    adapter = memory_adapter(MODULES, name="a")
    merged = merge_adapters([adapter, adapter], weights=[1, -1], size="mean", method="linear")
    assert all(norm(merged, module) < 1e-6 for module in MODULES)


def test_half_precision_comes_to_the_mean_size_too():
    adapters = three(torch.bfloat16)
    merged = merge_adapters(adapters, size="mean", rank=10)
    wanted = sum(norm(adapter, "layers.0.q") for adapter in adapters) / 3
    assert norm(merged, "layers.0.q") == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize("size", ["big", 1, True])
def test_other_sizes_are_refused(size):
    with pytest.raises(OptionError, match=r"size: got .*, expected one of: exact, mean\."):
        merge_adapters(three(), size=size)
    with pytest.raises(OptionError, match=r"modules '\*': size: got .*, expected one of"):
        merge_adapters(three(), modules={"*": {"size": size}})

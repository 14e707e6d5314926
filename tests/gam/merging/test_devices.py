"""The device of a merge: its choice, its refusals, and whole merges through the kernels."""

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from helpers import oracle
from helpers.adapters import MODULES, Q, assert_refused, make_adapter, memory_adapter

from gam import OptionError, merge_adapters
from gam.adapter import Adapter, LowRank
from gam.commands.merge import main
from gam.merging.batches import batches
from gam.merging.devices import choose_device, natural_device
from gam.merging.execute import _merge_batch, execute
from gam.merging.plan import plan_merge
from gam_kernels.combine import cpu as combine_cpu
from gam_kernels.combine import reference as combine_reference
from gam_kernels.gram import cpu as gram_cpu
from gam_kernels.gram import reference as gram_reference

RAGGED = {Q: (12, 8, 2)}
METHODS = [
    ("gam", {}),
    ("gam", {"retract": True, "size": "mean"}),
    ("linear", {}),
    ("gam", {"reference": "consensus"}),
]
OTHER_NAMES = ["concat", "tsv", "iso_c", "iso_cts", "core_ties", "ctm", "karcher", "multislerp"]
OTHER_NAMES += ["frechet"]
OTHERS = [(name, {}) for name in OTHER_NAMES]
ENTRYWISE = [("ties", {"density": 0.3}), ("dare_linear", {"density": 0.5}), ("della", {})]
IDS = ["gam", "retract", "linear", "consensus"]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def adapters(dtype=torch.float32, count=3):
    """Adapters of unlike ranks; the last one lacks most modules."""
    found = [memory_adapter(seed=seed, dtype=dtype, scale=1.5) for seed in range(count - 1)]
    return [*found, memory_adapter(RAGGED, seed=9, dtype=dtype)]


def dependent(dtype=torch.float32):
    """An adapter with a column twice and a zero module: the careful path."""
    adapter = memory_adapter(seed=5, dtype=dtype)
    modules = dict(adapter.modules)
    b = modules[Q].lora_b.clone()
    b[:, 1] = b[:, 0]
    modules[Q] = LowRank(modules[Q].lora_a, b)
    name = next(name for name in modules if name != Q)
    modules[name] = LowRank(modules[name].lora_a, torch.zeros_like(modules[name].lora_b))
    return replace(adapter, modules=modules)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "cuda:-1", "", 0, None])
def test_names_that_are_no_device(name):
    assert_refused(
        lambda: choose_device(name), OptionError, "device: got", "expected auto, cpu, cuda or"
    )


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_no_cuda_device(name, tmp_path):
    assert_refused(
        lambda: merge_adapters(adapters(), device=name),
        OptionError,
        f"device: got '{name}', but torch {torch.__version__} finds no CUDA device here",
        "--device cpu",
    )
    path = str(make_adapter(tmp_path / "a"))
    result = CliRunner().invoke(main, [path, "-o", str(tmp_path / "out"), "--device", name])
    assert result.exit_code == 2
    assert f"device: got '{name}'" in result.output
    assert not (tmp_path / "out").exists()


def test_device_out_of_range(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert_refused(
        lambda: choose_device("cuda:2"), OptionError, "'cuda:2', expected one of cuda:0, cuda:1"
    )


def test_auto_is_where_the_adapters_are():
    assert choose_device("auto") is None
    assert natural_device(adapters()) == torch.device("cpu")
    assert natural_device([Adapter({})]) == torch.device("cpu")
    assert plan_merge(adapters(), device="auto").device == torch.device("cpu")
    assert plan_merge(adapters(), device="cpu").options["device"] == "cpu"


@pytest.mark.parametrize(("method", "params"), [*METHODS, *OTHERS], ids=[*IDS, *OTHER_NAMES])
def test_every_tensor_is_made_on_the_device_of_the_factors(method, params, monkeypatch):
    # Whatever is made without saying where is then on the meta device, and meeting a real
    # tensor raises. The passes for CPUs alone need not say it.
    monkeypatch.setattr(gram_cpu, "gram", gram_reference.gram)
    monkeypatch.setattr(combine_cpu, "combine", combine_reference.combine)
    for dtype in (torch.float32, torch.bfloat16):
        given = [*adapters(dtype), dependent(dtype)]
        plan = plan_merge(given, method=method, **params)
        for modules in batches(plan):
            with torch.device("meta"):
                done = _merge_batch(plan, torch.device("cpu"), lambda _: None, modules)
            for factors in (module.update for module in done):
                assert factors.lora_a.device.type == factors.lora_b.device.type == "cpu"


@pytest.fixture
def interpreter():
    """Triton's interpreter works in one thread only."""
    pytest.importorskip("triton")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def deltas(merged):
    return {name: module.delta().double().cpu() for name, module in merged.modules.items()}


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# The consensus is found by many small steps, too many for the interpreter.
@pytest.mark.parametrize(("method", "params"), METHODS[:3], ids=IDS[:3])
def test_through_the_kernels(method, params, dtype):
    given = [*adapters(dtype), dependent(dtype)]
    plan = plan_merge(given, method=method, dtype="float32", **params)
    kernels, plain = (deltas(execute(replace(plan, backend=b))) for b in ("triton", "torch"))
    assert sorted(kernels) == sorted(MODULES)
    for name, delta in kernels.items():
        assert float((delta - plain[name]).norm()) <= 1e-6 * float(plain[name].norm())


@pytest.mark.usefixtures("interpreter")
def test_fast_path_through_the_kernels():
    # Half-precision inputs and output: products in float32, as no other test here has them.
    modules = {Q: (200, 150, 6)}
    given = [memory_adapter(modules, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    plan = replace(plan_merge(given), backend="triton")
    delta = deltas(execute(plan))[Q].numpy()
    inputs = [adapter.modules[Q] for adapter in given]
    expected = oracle.gam([m.lora_b.double().numpy() @ m.lora_a.double().numpy() for m in inputs])
    assert oracle.relative_error(delta, expected) < 4e-3  # that of bfloat16 factors


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("method", "params"), ENTRYWISE, ids=[name for name, _ in ENTRYWISE])
def test_merges_of_single_entries_through_the_kernels(method, params):
    modules = {Q: (40, 30, 3)}
    given = [memory_adapter(modules, seed=seed) for seed in range(3)]
    plan = plan_merge(given, method=method, rank=30, **params)  # all of it
    kernels, plain = (execute(replace(plan, backend=b)) for b in ("triton", "torch"))
    assert kernels.report.energy_kept == pytest.approx(plain.report.energy_kept, abs=1e-6)
    found, expected = deltas(kernels)[Q], deltas(plain)[Q]
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.usefixtures("interpreter")
def test_gam_through_the_kernels_is_the_dense_algorithm():
    given = [memory_adapter(seed=seed) for seed in range(3)]
    merged = deltas(execute(replace(plan_merge(given), backend="triton")))
    for name, delta in merged.items():
        inputs = [adapter.modules[name] for adapter in given]
        dense = [m.lora_b.double().numpy() @ m.lora_a.double().numpy() for m in inputs]
        assert oracle.relative_error(delta.numpy(), oracle.gam(dense)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("method", "params"), [*METHODS, *OTHERS, ("ties", {})], ids=[*IDS, *OTHER_NAMES, "ties"]
)
def test_on_a_gpu(method, params, dtype, tmp_path):
    given = [*adapters(dtype), dependent(dtype)]
    resident = [
        replace(
            adapter,
            modules={
                name: LowRank(m.lora_a.cuda(), m.lora_b.cuda(), m.scale)
                for name, m in adapter.modules.items()
            },
        )
        for adapter in given
    ]
    options = {"method": method, "dtype": "float32", **params}
    on_cpu = merge_adapters(given, device="cpu", **options)
    for merged, kind in (
        (merge_adapters(given, device="cuda", **options), "cpu"),
        (merge_adapters(resident, **options), "cuda"),
        (merge_adapters(resident, device="cpu", **options), "cpu"),
    ):
        assert {m.lora_a.device.type for m in merged.modules.values()} == {kind}
        for name, delta in deltas(merged).items():
            expected = on_cpu.modules[name].delta().double()
            assert float((delta - expected).norm()) <= 1e-5 * float(expected.norm())
        merged.save(tmp_path / kind, overwrite=True)

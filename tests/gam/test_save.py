"""The folder that is written: what PEFT makes of it, and that it is complete or absent."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import (
    CONFIG,
    MODULES,
    Q,
    V,
    assert_refused,
    assert_same_update,
    make_adapter,
    memory_adapter,
    quiet_peft,
    unprivileged,
)
from helpers.paths import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import nn

from gam.adapter import Adapter, LowRank, Source
from gam.errors import OutputError
from gam.load import read_adapter
from gam.report.types import InputReport, MergeReport, ModuleReport
from gam.save import check_output, write_adapter

with quiet_peft():
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

FILES = ["adapter_config.json", "adapter_model.safetensors"]
MIXED = {Q: (12, 8, 2), V: (6, 8, 5), "q_proj": (6, 8, 1), "head.q+v(x)": (8, 8, 3)}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def base_for(modules: dict[str, tuple[int, int, int]]) -> nn.Module:
    """A model with linear layers at these paths, and others that suffixes would also match."""
    root = nn.Module()
    for path, (out, width, _) in modules.items():
        *parents, leaf = path.split(".")
        module = root
        for name in parents:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.add_module(leaf, nn.Linear(width, out))
    root.forward = lambda x: x
    return root


def peft_deltas(folder: Path, modules: dict[str, tuple[int, int, int]]) -> dict[str, Any]:
    with quiet_peft():
        model = PeftModel.from_pretrained(base_for(modules), folder)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("modules", [MODULES, MIXED], ids=["one-rank", "mixed-ranks"])
def test_peft_loads_the_same_update(
    modules: dict[str, tuple[int, int, int]], scale: float, tmp_path: Path
) -> None:
    adapter = memory_adapter(modules, scale=scale, config={**CONFIG, "task_type": None})
    folder = adapter.save(tmp_path / "out")
    assert names(folder) == FILES
    deltas = peft_deltas(folder, modules)
    assert sorted(deltas) == sorted(modules)
    again = read_adapter(folder)
    for name, update in adapter.modules.items():
        assert_same_update(deltas[name], update.delta())
        assert_same_update(again.modules[name].delta(), update.delta())
        assert again.modules[name].scale == 1.0


def test_an_adapter_that_was_read_keeps_its_update(tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a", MIXED, alpha=7, use_rslora=True)
    first = read_adapter(source)
    second = read_adapter(first.save(tmp_path / "out"))
    for name, update in first.modules.items():
        assert_same_update(second.modules[name].delta(), update.delta())
    assert second.config["base_model_name_or_path"] == "tiny/base"
    assert second.config["use_rslora"] is False
    # Writing what was written changes nothing.
    third = second.save(tmp_path / "again")
    for name in FILES:
        assert (third / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_are_what_safetensors_would_write(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = memory_adapter(MIXED, dtype=dtype)
    file = adapter.save(tmp_path / "out") / "adapter_model.safetensors"
    expected = save_bytes(adapter.state_dict(), metadata={"format": "pt"})
    assert file.read_bytes() == expected


def test_mixed_dtypes_and_views(tmp_path: Path) -> None:
    whole = torch.randn(8, 12)
    adapter = Adapter(
        {
            "a": LowRank(whole[:, ::2].T[:3], whole[:, 1:4]),
            "b": LowRank(torch.randn(3, 5).bfloat16(), torch.randn(4, 3).double()),
        }
    )
    folder = adapter.save(tmp_path / "out")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == adapter.state_dict().keys()
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(tensors[key], tensor)
        assert tensors[key].dtype == tensor.dtype
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_config_file(tmp_path: Path) -> None:
    folder = memory_adapter(MIXED, config={**CONFIG, "lora_dropout": 0.5}).save(tmp_path / "out")
    text = (folder / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["r"] == config["lora_alpha"] == 5
    assert config["lora_dropout"] == 0.0
    assert config["task_type"] == "CAUSAL_LM"


def test_a_scaling_that_overflows_is_refused(tmp_path: Path) -> None:
    adapter = memory_adapter(dtype=torch.float16, scale=1e6, name="hot")
    assert_refused(lambda: adapter.save(tmp_path / "out"), OutputError, "'hot'", "float16", Q)
    assert names(tmp_path) == []


def test_an_adapter_without_modules_is_refused(tmp_path: Path) -> None:
    assert_refused(lambda: Adapter({}).save(tmp_path / "out"), OutputError, "no modules")


def test_a_dtype_that_is_no_adapters_is_refused(tmp_path: Path) -> None:
    odd = LowRank(torch.ones(1, 2, dtype=torch.int32), torch.ones(2, 1))
    assert_refused(lambda: Adapter({"q": odd}).save(tmp_path / "out"), OutputError, "int32")
    assert names(tmp_path) == []


def test_bytes_do_not_depend_on_order_or_time(tmp_path: Path) -> None:
    adapter = merged()
    turned = replace(adapter, modules=dict(reversed(adapter.modules.items())))
    first, second = adapter.save(tmp_path / "a"), turned.save(tmp_path / "b")
    assert names(first) == names(second)
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_files_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        folder = memory_adapter().save(tmp_path / "out")
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {(folder / name).stat().st_mode & 0o777 for name in FILES} == {0o644}


# The report of a merge.


def merged(**fields: Any) -> Adapter:
    module = ModuleReport(
        name=Q,
        shape=(12, 8),
        ranks={"a": 4},
        rank=4,
        norm=1.0,
        norm_ratio=float("nan"),
        cosines={"a": float("inf"), "b": 0.5},
        energy_kept=1.0,
        rounding_error=0.0,
        diagnostics={"values": torch.tensor([1.0, float("nan")]), "count": 2, "on": True},
    )
    report = MergeReport(
        method="gam",
        paper="arXiv:2607.23395",
        options={
            "method": "gam",
            "weights": (0.5, 0.5),
            "normalize": True,
            "scale": 1.0,
            "rank": "max",
            "uniform_rank": False,
            "missing": "zero",
            "dtype": "auto",
            "alpha": None,
            "allow_pickle": False,
            "allow_base_mismatch": False,
        },
        inputs=[
            InputReport(
                name=name,
                source=f"/nowhere/{name}",
                sha256="0" * 64,
                config_sha256=None,
                commit=None,
                base_model="tiny/base",
                weight=0.5,
                modules=3,
                ranks=[4],
            )
            for name in "ab"
        ],
        dtype="float32",
        modules=[module],
        norm_ratio=1.0,
        cosines={"a": 1.0, "b": 0.5},
        energy_kept=1.0,
        rounding_error=0.0,
    )
    return memory_adapter(report=report, **fields)


def test_a_merge_also_writes_its_record_and_card(tmp_path: Path) -> None:
    folder = merged().save(tmp_path / "out")
    assert names(folder) == ["README.md", *FILES, "gam_merge.json"]
    text = (folder / "gam_merge.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert next(iter(record)) == "gam_merge"
    assert record["method"] == "gam"
    assert record["options"]["weights"] == [0.5, 0.5]
    assert record["modules"][0]["norm_ratio"] is None
    assert record["modules"][0]["cosines"] == {"a": None, "b": 0.5}
    assert record["modules"][0]["diagnostics"] == {"values": [1.0, None], "count": 2, "on": True}
    assert (folder / "README.md").read_text().startswith("---\n")
    assert list(read_adapter(folder).modules) == sorted(MODULES)


# Where it may be written.


def check_refused(path: Path | str, *parts: str, **options: Any) -> None:
    before = sorted(Path(path).rglob("*")) if path else []
    assert_refused(lambda: check_output(path, **options), OutputError, repr(str(path)), *parts)
    assert_refused(
        lambda: write_adapter(
            dataclasses.replace(
                memory_adapter(),
                inputs=[Source(p, Path(p), "") for p in options.get("inputs", [])],
            ),
            path,
            overwrite=options.get("overwrite", False),
        ),
        OutputError,
        *parts,
    )
    assert before == (sorted(Path(path).rglob("*")) if path else [])


def test_a_new_folder_with_new_parents(tmp_path: Path) -> None:
    assert check_output(tmp_path / "x" / "y" / "out") == tmp_path / "x" / "y" / "out"
    assert names(tmp_path) == []
    memory_adapter().save(tmp_path / "x" / "y" / "out")
    assert names(tmp_path / "x" / "y") == ["out"]


def test_returns_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert memory_adapter().save("out") == tmp_path / "out"


def test_an_existing_folder(tmp_path: Path) -> None:
    out = make_adapter(tmp_path / "out")
    before = (out / FILES[1]).read_bytes()
    check_refused(out, "--overwrite")
    assert (out / FILES[1]).read_bytes() == before
    adapter = memory_adapter(seed=3)
    assert adapter.save(out, overwrite=True) == out
    assert torch.equal(read_adapter(out).modules[Q].delta(), adapter.modules[Q].delta())
    assert names(tmp_path) == ["out"]


def test_overwriting_leaves_nothing_old(tmp_path: Path) -> None:
    out = merged().save(tmp_path / "out")
    assert len(names(out)) == 4
    memory_adapter().save(out, overwrite=True)
    assert names(out) == FILES


def test_an_empty_folder_needs_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    check_refused(out, "--overwrite")
    memory_adapter().save(out, overwrite=True)
    assert names(out) == FILES


@pytest.mark.parametrize("name", ["tokenizer.json", "notes", ".git", "optimizer.pt"])
def test_a_folder_with_other_things_is_never_replaced(name: str, tmp_path: Path) -> None:
    out = make_adapter(tmp_path / "out")
    if name == ".git":
        (out / name).mkdir()
    else:
        (out / name).write_text("precious")
    check_refused(out, repr(name), "not just an adapter", overwrite=True)


def test_a_folder_in_place_of_an_adapters_file_is_never_removed(tmp_path: Path) -> None:
    out = make_adapter(tmp_path / "out")
    (out / "README.md").mkdir()
    check_refused(out, "'README.md'", overwrite=True)


def test_a_folder_that_is_no_adapter_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("# Someone's notes")
    check_refused(out, "no adapter_config.json", overwrite=True)


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    check_refused(out, "a file is there", overwrite=True)
    check_refused(out / "deeper", "is a file")
    assert out.read_text() == "precious"


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_what_is_no_name(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_adapter(tmp_path / "out"))
    assert_refused(lambda: check_output(path, overwrite=True), OutputError, repr(path), "name")


def test_paths_that_no_system_takes(tmp_path: Path) -> None:
    for path in ("a\0b", str(tmp_path / ("x" * 300))):
        assert_refused(lambda path=path: memory_adapter().save(path), OutputError, "output")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert_refused(lambda: memory_adapter().save(loop / "out"), OutputError)


def test_a_link_is_followed_and_kept(tmp_path: Path) -> None:
    real = make_adapter(tmp_path / "real")
    link = tmp_path / "latest"
    link.symlink_to(real)
    check_refused(link, "--overwrite")
    adapter = memory_adapter(seed=3)
    assert adapter.save(link, overwrite=True) == real
    assert link.is_symlink()
    assert torch.equal(read_adapter(link).modules[Q].delta(), adapter.modules[Q].delta())


def test_linked_files_in_an_old_folder_lose_only_the_link(tmp_path: Path) -> None:
    blobs = make_adapter(tmp_path / "blobs")
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        (out / name).symlink_to(blobs / name)
    memory_adapter().save(out, overwrite=True)
    assert names(blobs) == FILES
    assert not (out / FILES[1]).is_symlink()


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    link = tmp_path / "link"
    link.symlink_to(folder)
    file = folder / "adapter_model.safetensors"
    for source in (folder, file, link, link / "adapter_model.safetensors"):
        check_refused(folder, "input", repr(str(source)), overwrite=True, inputs=[str(source)])
        check_refused(link, "input", overwrite=True, inputs=[str(source)])
    adapter = read_adapter(folder)
    assert_refused(lambda: adapter.save(folder, overwrite=True), OutputError, "input")
    assert check_output(tmp_path / "out", inputs=[folder, "user/name"]) == tmp_path / "out"


def test_an_input_whose_files_are_links_is_never_replaced(tmp_path: Path) -> None:
    blobs = make_adapter(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in FILES:
        (snapshot / name).symlink_to(blobs / name)
    for out in (snapshot, blobs):
        check_refused(out, "input", overwrite=True, inputs=[str(snapshot / FILES[1])])


def test_no_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    locked.chmod(0o555)
    with unprivileged():
        assert_refused(
            lambda: memory_adapter().save(locked / "out"), OutputError, "permission", "locked"
        )
        assert_refused(lambda: check_output(locked / "out"), OutputError, "permission")


# Complete or absent.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        failed = subprocess.run(command, capture_output=True, check=False).returncode
    except FileNotFoundError:
        failed = True
    if failed:
        pytest.skip("may not mount a small disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    adapter = memory_adapter({Q: (300, 300, 64)})
    assert_refused(lambda: adapter.save(small_disk / "out"), OutputError, "No space", "Free some")
    assert names(small_disk) == []
    old = memory_adapter().save(small_disk / "out")
    assert_refused(lambda: adapter.save(old, overwrite=True), OutputError, "No space")
    assert names(small_disk) == ["out"]
    assert list(read_adapter(old).modules) == sorted(MODULES)


# Runs one save in a forked child that `act` strikes when the system call in question begins.
STRIKE = """
import os, pathlib, resource, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
from helpers.paths import ROOT
from helpers.adapters import MODULES, Q, memory_adapter
from gam.errors import OutputError

def save(out, event, part, act, overwrite):
    def hook(name, args):
        if name == event and isinstance(args[0], str) and args[0].endswith(part):
            act()
    sys.addaudithook(hook)
    try:
        memory_adapter(seed=3).save(out, overwrite=overwrite)
    except KeyboardInterrupt:
        os._exit(30)
    except OutputError as error:
        print(error, flush=True)
        os._exit(31)
    os._exit(0)

def kill(signum):
    return lambda: os.kill(os.getpid(), signum)

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

top = pathlib.Path({top!r})
ACTS = {{"kill": kill(signal.SIGKILL), "int": kill(signal.SIGINT), "limit": limit}}
for number, line in enumerate(sys.stdin.read().splitlines()):
    event, part, act, overwrite = line.split()
    folder = top / str(number)
    folder.mkdir()
    if overwrite == "1":
        memory_adapter(seed=1).save(folder / "out")
    child = os.fork()
    if child == 0:
        save(folder / "out", event, part, ACTS[act], overwrite == "1")
    status = os.waitpid(child, 0)[1]
    print(number, os.waitstatus_to_exitcode(status), flush=True)
"""


# Each case strikes a forked child in the middle of a system call; Windows has no fork.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_write_that_is_struck_leaves_no_half(tmp_path: Path) -> None:
    stages = [("open", "safetensors"), ("open", "config.json"), ("os.rename", ".tmp")]
    cases = [
        (*stage, act, overwrite)
        for stage in stages
        for act, overwrite in (("kill", 0), ("int", 0), ("kill", 1), ("int", 1))
    ]
    cases.append(("open", "safetensors", "limit", 1))
    script = STRIKE.format(tests=str(ROOT / "tests"), root=str(ROOT), top=str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(" ".join(map(str, case)) for case in cases),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    codes = [int(line.split()[1]) for line in run.stdout.splitlines() if line[0].isdigit()]
    assert "cannot write: File too large. Free some space" in run.stdout
    old = memory_adapter(seed=1).modules[Q].delta()
    for number, (event, _, act, overwrite) in enumerate(cases):
        folder = tmp_path / str(number)
        assert codes[number] == {"kill": -9, "int": 30, "limit": 31}[act]
        if act != "kill":
            assert names(folder) == ["out"] * overwrite  # nothing temporary stays
        if overwrite:
            # Between the two renames the old adapter is beside, under its temporary name.
            aside = act == "kill" and event == "os.rename"
            (kept,) = folder.glob(".out.*.old" if aside else "out")
            assert torch.equal(read_adapter(kept).modules[Q].delta(), old)
        else:
            assert not (folder / "out").exists()


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear() -> None:
        make_adapter(out)

    adapter = OnStateDict(memory_adapter(seed=3).modules, config=CONFIG)
    object.__setattr__(adapter, "then", appear)
    assert_refused(lambda: adapter.save(out), OutputError, repr(str(out)))
    assert names(tmp_path) == ["out"]
    assert read_adapter(out).modules[Q].scale == 2.0


class OnStateDict(Adapter):
    """Calls `then` after the checks and before the write."""

    then: Callable[[], None]

    def state_dict(self) -> dict[str, torch.Tensor]:
        self.then()
        return super().state_dict()

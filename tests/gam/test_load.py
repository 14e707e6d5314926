"""An adapter by what the user calls it: where it is looked for, and what it is called then."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.adapters import (
    Q,
    assert_refused,
    assert_unreadable,
    make_adapter,
    make_file,
    memory_adapter,
    unprivileged,
)

from gam.adapter import Adapter, Facts
from gam.errors import AdapterError, OptionError
from gam.hub.names import HubName
from gam.load import (
    LocalPath,
    default_name,
    find,
    known_facts,
    label_of,
    local_paths,
    open_adapter,
    read_adapter,
    settle,
    settle_all,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def test_describes_the_source(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "math-lora")
    adapter = read_adapter(f"{folder}/")
    assert adapter.name == "math-lora"
    assert adapter.config["base_model_name_or_path"] == "tiny/base"
    assert adapter.report is None
    source = adapter.source
    assert source is not None
    assert source.name == f"{folder}/"
    assert source.path == folder / "adapter_model.safetensors"
    assert source.sha256 == hashlib.sha256(source.path.read_bytes()).hexdigest()
    config = (folder / "adapter_config.json").read_bytes()
    assert source.config_sha256 == hashlib.sha256(config).hexdigest()
    assert source.alpha is None


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_adapter(tmp_path / "math")
    file = make_file(tmp_path / "files" / "code.safetensors")
    assert read_adapter(folder / "adapter_model.safetensors").name == "math"
    assert read_adapter(file, alpha=4).name == "code"
    assert read_adapter(file, alpha=4, name="mine").name == "mine"
    monkeypatch.chdir(folder)
    assert read_adapter(".").name == "math"
    assert read_adapter("adapter_model.safetensors").name == "math"
    assert read_adapter("../math/../math/").name == "math"
    (tmp_path / "latest").symlink_to(folder)
    assert read_adapter(tmp_path / "latest").name == "latest"
    # The path holds after the working folder has changed.
    source = read_adapter(".").source
    assert source is not None
    assert source.path.is_absolute()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/math/", "math"),
        ("runs/code.v2", "code.v2"),
        ("x/adapter_model.safetensors", "x"),
        ("x/adapter_model.bin", "x"),
        ("x/y.safetensors", "y"),
    ],
)
def test_default_names_need_no_files(path: str, name: str) -> None:
    assert default_name(path) == name


def test_a_file_uses_the_config_beside_it(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", alpha=6)
    file = (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    adapter = read_adapter(file)
    assert adapter.modules[Q].scale == 1.5
    assert adapter.config["lora_alpha"] == 6


def test_links_are_followed(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (snapshot / name).symlink_to(folder / name)
    adapter = read_adapter(snapshot)
    assert adapter.name == "snapshot"
    assert adapter.modules[Q].scale == 2.0


def test_nothing_there(tmp_path: Path) -> None:
    assert_unreadable(tmp_path / "none", "no such folder or file", "PEFT adapter folder")


def test_hub_id() -> None:
    assert_refused(
        lambda: read_adapter("user/name"), AdapterError, "'user/name'", "no such folder or file"
    )


def test_broken_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert_unreadable(tmp_path / "link", "no such folder or file")


def test_empty_folder(tmp_path: Path) -> None:
    assert_unreadable(tmp_path, f"no {WEIGHTS}", "save_pretrained")


def test_adapter_in_a_subfolder(tmp_path: Path) -> None:
    make_adapter(tmp_path / "run" / "default")
    assert_unreadable(tmp_path / "run", f"no {WEIGHTS}", "subfolder 'default'")


def test_other_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assert_unreadable(tmp_path / "weights.gguf", "not .safetensors")


def test_special_file() -> None:
    assert_unreadable(Path(os.devnull), "not a regular file")


def test_folder_in_place_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "a" / WEIGHTS).mkdir(parents=True)
    assert_unreadable(tmp_path / "a", WEIGHTS, "not a regular file")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_unreadable(name: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / name).chmod(0)
    with unprivileged():
        assert_unreadable(folder, "cannot read", "ermission")


def test_config_is_a_folder(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    assert_unreadable(folder, CONFIG, "cannot read", "directory")


def test_config_is_a_broken_link(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(tmp_path / "gone")
    assert_unreadable(folder, CONFIG, "cannot read")


def test_names_with_line_breaks_stay_in_one_line(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a\nb", tensors={"x\ny.nova": torch.ones(1)})
    assert_unreadable(folder, "x\\ny")


# Path or name on the Hub.


@pytest.fixture
def _both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`here/a` is a path in the working folder, `there/a` in a folder `recipes`."""
    for path in ("here/a", "recipes/there/a"):
        (tmp_path / path).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_both")
def test_a_text_is_settled_by_what_is_there() -> None:
    assert settle("here/a") == LocalPath("here/a")
    assert settle("there/a") == HubName("there/a")
    assert settle("hf://here/a") == HubName("here/a")
    assert settle("./there/a") == LocalPath("./there/a")  # in these words, not as "there/a"
    folder = Path("recipes")
    assert settle("there/a", folder) == folder / "there/a"
    assert settle("here/a", folder) == HubName("here/a")
    assert settle("hf://there/a", folder) == HubName("there/a")
    assert settle("~/a", folder) == Path("~/a").expanduser()
    (folder / "broken").mkdir()
    (folder / "broken" / "link").symlink_to("gone")
    assert settle("broken/link", folder) == folder / "broken/link"


@pytest.mark.usefixtures("_both")
def test_what_is_settled_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = memory_adapter()
    for place in (Path("there/a"), LocalPath("u/n"), HubName("here/a"), adapter):
        assert settle(place) is place
        assert settle(place, Path("recipes")) is place
    local = settle("here/a")
    monkeypatch.setattr(os, "lstat", lambda *_: pytest.fail("the disk is asked again"))
    for place in (local, HubName("here/a")):
        assert settle(place) is place
        assert label_of(place) == "a"
    assert local_paths([local, HubName("here/a"), adapter]) == [local]


def test_several_are_settled_with_their_labels() -> None:
    assert settle_all(["u/n", Path("a")]) == [HubName("u/n"), Path("a")]
    assert settle_all({"one": "u/n"}) == {"one": HubName("u/n")}
    for one in ("u/n", Path("a"), HubName("u/n"), memory_adapter()):
        assert_refused(lambda one=one: settle_all(one), OptionError, "adapters: got one")


def test_the_paths_that_are_read(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    read = read_adapter(folder)
    weights = folder / WEIGHTS
    assert local_paths({"x": read, "y": folder}) == [weights, folder]


# What is known of it.


def test_facts_of_an_adapter_in_memory_are_those_of_its_config(tmp_path: Path) -> None:
    read = read_adapter(make_adapter(tmp_path / "a", revision="v1", fan_in_fan_out=True))
    assert read.facts == Facts("tiny/base", "v1", "CAUSAL_LM")
    assert known_facts(read) == read.facts
    changed = replace(read, config={**read.config, "base_model_name_or_path": "tiny/other"})
    assert known_facts(changed) == replace(read.facts, base="tiny/other")
    assert open_adapter(changed, "b").facts.base == "tiny/other"
    # Of a format without a config, they are what was read.
    assert known_facts(replace(read, config={})) == Facts()
    assert known_facts(tmp_path / "a") is None


def test_an_adapter_in_memory_is_opened_under_its_label() -> None:
    adapter = memory_adapter(name="mine")
    opened = open_adapter(find(adapter), "yours")
    assert (label_of(adapter), opened.name) == ("mine", "yours")
    assert opened.modules.keys() == adapter.modules.keys()
    assert_refused(lambda: open_adapter(Adapter({}), "x"), AdapterError, "'x'", "no modules")

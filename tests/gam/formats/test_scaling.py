"""The scaling of each module: from whatever states it, and never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import (
    DOWN,
    MODULES,
    Q,
    V,
    assert_refused,
    assert_unreadable,
    make_adapter,
    make_file,
)

from gam.errors import OptionError
from gam.load import read_adapter

CONFIG = "adapter_config.json"


def alphas(value: float, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}.alpha": torch.tensor(value) for name in MODULES}


def packed(**configs: dict[str, Any]) -> dict[str, str]:
    """Metadata as diffusers writes it: `component.key` for each key."""
    flat = {
        f"{component}.{key}" if component else key: value
        for component, config in configs.items()
        for key, value in config.items()
    }
    return {"format": "pt", "lora_adapter_metadata": json.dumps(flat)}


LLAMA = {"r": 4, "lora_alpha": 12, "peft_type": "LORA"}


PREFIXED = {f"transformer.{name}": shape for name, shape in MODULES.items()}


BARE: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "given": ({}, {"alpha": 12}, 3.0),
    "tensors": ({"extra": alphas(2)}, {}, 0.5),
    "tensors-prefixed": ({"extra": alphas(2, "base_model.model.")}, {}, 0.5),
    "tensors-before-metadata": ({"extra": alphas(2), "metadata": {"lora_alpha": "8"}}, {}, 0.5),
    "lora-alpha": ({"metadata": {"lora_alpha": "8"}}, {}, 2.0),
    "alpha": ({"metadata": {"alpha": "8.0"}}, {}, 2.0),
    "kohya": ({"metadata": {"ss_network_alpha": "6"}}, {}, 1.5),
    "metadata-before-given": ({"metadata": {"lora_alpha": "8"}}, {"alpha": 12}, 2.0),
    "diffusers-whole": ({"metadata": packed(**{"": LLAMA})}, {}, 3.0),
    "diffusers-component": (
        {"metadata": packed(transformer=LLAMA), "modules": PREFIXED, "prefix": ""},
        {},
        3.0,
    ),
    "diffusers-rslora": (
        {
            "metadata": packed(transformer={**LLAMA, "use_rslora": True}, unet=LLAMA),
            "modules": PREFIXED,
            "prefix": "",
        },
        {},
        6.0,
    ),
}


@pytest.mark.parametrize(("file", "options", "scale"), BARE.values(), ids=BARE.keys())
def test_scaling_of_a_bare_file(
    file: dict[str, Any], options: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    adapter = read_adapter(make_file(tmp_path / "a.safetensors", **file), **options)
    assert {update.scale for update in adapter.modules.values()} == {scale}
    assert adapter.source is not None
    assert adapter.source.config_sha256 is None
    used = scale == 3.0 and "alpha" in options
    assert adapter.source.alpha == (12 if used else None)


def test_patterns_in_diffusers_metadata_use_names_within_the_component(tmp_path: Path) -> None:
    metadata = packed(transformer={**LLAMA, "alpha_pattern": {f"^{Q}": 4}})
    file = make_file(tmp_path / "a.safetensors", PREFIXED, metadata=metadata, prefix="")
    scales = {name: update.scale for name, update in read_adapter(file).modules.items()}
    assert scales == {
        f"transformer.{Q}": 1.0,
        f"transformer.{V}": 3.0,
        f"transformer.{DOWN}": 3.0,
    }


def test_given_alpha_never_overrides_a_config(tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "a", alpha=8), alpha=100)
    assert adapter.modules[Q].scale == 2.0
    assert adapter.source is not None
    assert adapter.source.alpha is None


def test_given_alpha_completes_a_config_without_one(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", use_rslora=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(folder, alpha=6)
    assert adapter.modules[Q].scale == 3.0
    assert adapter.source is not None
    assert adapter.source.alpha == 6


def test_alpha_tensors_that_agree_with_the_config(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", alpha=8, tensors=alphas(8.0))
    assert read_adapter(folder).modules[Q].scale == 2.0


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_given_alpha_is_a_number(alpha: float, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    assert_refused(lambda: read_adapter(folder, alpha=alpha), OptionError, "alpha")


def test_config_is_missing(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / CONFIG).unlink()
    assert_unreadable(folder, f"no {CONFIG}", "--alpha")


ALPHAS = {f"{name}.alpha": torch.tensor(4.0) for name in MODULES if name != V}


METADATA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({}, ("nothing states its scaling", "--alpha", CONFIG)),
    "some-alphas": ({"extra": ALPHAS}, (repr(V), "nothing states its scaling")),
    "dynamic": ({"metadata": {"ss_network_alpha": "Dynamic"}}, ("'Dynamic'", "a number")),
    "infinite": ({"metadata": {"lora_alpha": "inf"}}, ("'inf'", "a number")),
    "no-json": ({"metadata": {"lora_adapter_metadata": "{"}}, ("not JSON",)),
    "no-object": ({"metadata": {"lora_adapter_metadata": "3"}}, ("expected an object",)),
    "dora": (
        {"metadata": {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 4, "use_dora": true}'}},
        ("DoRA",),
    ),
    "rank": (
        {"metadata": {"lora_adapter_metadata": '{"r": 8, "lora_alpha": 4}'}},
        ("rank 4", "says 8"),
    ),
    "other-component": (
        {"metadata": {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 4}'}},
        ("nothing states its scaling",),
    ),
}


@pytest.mark.parametrize(("file", "parts"), METADATA.values(), ids=METADATA.keys())
def test_scaling_is_never_guessed(
    file: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    assert_unreadable(make_file(tmp_path / "a.safetensors", **file), *parts)


NUMBERS: dict[str, tuple[dict[str, torch.Tensor | None], tuple[str, ...]]] = {
    "contradiction": ({f"{Q}.alpha": torch.tensor(1.0)}, (repr(Q), "0.25", "gives 2")),
    "alpha-nan": ({f"{Q}.alpha": torch.tensor(float("nan"))}, (repr(Q), "no finite number")),
    "alpha-vector": ({f"{Q}.alpha": torch.ones(2)}, (repr(Q), "no finite number")),
}


@pytest.mark.parametrize(("tensors", "parts"), NUMBERS.values(), ids=NUMBERS.keys())
def test_alpha_tensors_that_do_not_fit(
    tensors: dict[str, torch.Tensor | None], parts: tuple[str, ...], tmp_path: Path
) -> None:
    assert_unreadable(make_adapter(tmp_path / "a", tensors=tensors), *parts)

"""Adapters that PEFT wrote, and bare files, read as the updates that they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
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
    assert_same_update,
    make_adapter,
    make_file,
    make_tensors,
    quiet_peft,
)
from safetensors.torch import load_file

from gam.adapter import Adapter
from gam.errors import AdapterError, OptionError
from gam.load import default_name, read_adapter

with quiet_peft():
    from peft import (
        AdaLoraConfig,
        IA3Config,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        PeftModel,
        VeraConfig,
        get_peft_model,
    )
    from peft.tuners.lora import LoraLayer
    from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_bias=True,
        )
    )


def peft_model(**config: Any) -> PeftModel:
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    with quiet_peft():
        return get_peft_model(tiny_llama(), LoraConfig(**{**options, **config}))


def save(model: PeftModel, path: Path) -> Path:
    with quiet_peft():
        model.save_pretrained(path)
    return path


def peft_deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


SAVED: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"target_modules": ["q_proj", "v_proj"]}, 4),
    "rslora": ({"target_modules": ["q_proj", "down_proj"], "use_rslora": True}, 4),
    "all-linear": ({"target_modules": "all-linear"}, 14),
    "regex": ({"target_modules": r".*\.layers\.1\..*(q|up)_proj"}, 2),
    "layers": ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
    "patterns": (
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, r"layers\.1\..*q_proj": 7},
            "alpha_pattern": {"v_proj": 3, "^model.layers.0.self_attn.q_proj": 5},
        },
        6,
    ),
    "rslora-patterns": (
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}, "use_rslora": True},
        4,
    ),
    "eva-hint": ({"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, 2),
    "mica": ({"target_modules": ["q_proj"], "init_lora_weights": "mica"}, 2),
    "bias-without-biases": ({"target_modules": ["down_proj"], "bias": "lora_only"}, 2),
}


@pytest.mark.parametrize(("config", "count"), SAVED.values(), ids=SAVED.keys())
def test_reads_what_peft_saves(config: dict[str, Any], count: int, tmp_path: Path) -> None:
    model = peft_model(**config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapter = read_adapter(save(model, tmp_path / "saved"))
    expected = peft_deltas(model)
    assert len(expected) == count
    assert sorted(expected) == list(adapter.modules)
    for name, delta in expected.items():
        assert_same_update(adapter.modules[name].delta(), delta)


def test_mica_leaves_the_base_alone() -> None:
    model = peft_model(target_modules=["q_proj"], init_lora_weights="mica")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = tiny_llama().model.layers[0].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, before.weight)
    assert not layer.get_delta_weight("default").any()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_adapters_are_plain_lora(init: str, tmp_path: Path) -> None:
    model = peft_model(target_modules=["q_proj"], init_lora_weights=init)
    save(model, tmp_path / "start")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    assert_refused(
        lambda: read_adapter(save(model, tmp_path / "raw")), AdapterError, "init_lora_weights"
    )
    with quiet_peft():
        model.save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    adapter = read_adapter(tmp_path / "plain")
    name = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.model.get_submodule(name)
    trained = layer.base_layer.weight + layer.get_delta_weight("default")
    change = trained - tiny_llama().get_submodule(name).weight
    assert (adapter.modules[name].delta() - change).abs().max() < 1e-5


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "embedding"),
    "head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "lora-bias": ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "token"),
    "bias": ({"target_modules": ["q_proj"], "bias": "all"}, "bias='none'"),
    "alora": ({"target_modules": ["q_proj"], "alora_invocation_tokens": [1]}, "aLoRA"),
}


@pytest.mark.parametrize(("config", "part"), OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("bare", [False, True], ids=["folder", "file"])
def test_refuses_what_else_peft_saves(
    config: dict[str, Any], part: str, bare: bool, tmp_path: Path
) -> None:
    folder = save(peft_model(**config), tmp_path / "a")
    if bare:  # the tensors alone give it away, but for the config of aLoRA
        (folder / "adapter_config.json").unlink()
        if "alora_invocation_tokens" in config:
            return
    with pytest.raises(AdapterError, match=re.escape(repr(str(folder)))):
        read_adapter(folder, alpha=4)
    if not bare:
        assert_refused(lambda: read_adapter(folder), AdapterError, part)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig, IA3Config, VeraConfig, AdaLoraConfig])
def test_refuses_other_peft_types(config: Callable[..., Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"]}
    if config is IA3Config:
        options["feedforward_modules"] = []
    if config is AdaLoraConfig:
        options["total_step"] = 10
    with quiet_peft():
        folder = save(get_peft_model(tiny_llama(), config(**options)), tmp_path / "a")
    assert_refused(lambda: read_adapter(folder), AdapterError, "peft_type", "only LoRA")
    (folder / "adapter_config.json").unlink()
    assert_refused(lambda: read_adapter(folder, alpha=4), AdapterError, "belongs to")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", dtype=dtype, alpha=6)
    adapter = read_adapter(folder)
    tensors = make_tensors(dtype=dtype)
    for name, update in adapter.modules.items():
        assert update.lora_a.dtype == update.lora_b.dtype == dtype
        assert torch.equal(update.lora_a, tensors[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(update.lora_b, tensors[f"base_model.model.{name}.lora_B.weight"])
        assert update.scale == 6 / 4


def test_factors_of_different_dtypes(tmp_path: Path) -> None:
    half = {
        key: tensor.half() for key, tensor in make_tensors().items() if key.endswith("A.weight")
    }
    update = read_adapter(make_adapter(tmp_path / "a", tensors=half)).modules[Q]
    assert (update.lora_a.dtype, update.lora_b.dtype) == (torch.float16, torch.float32)
    assert update.delta().dtype == torch.float32


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


def test_the_factors_are_mapped_not_copied(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {Q: (600, 800, 64)})
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux")
    adapter = read_adapter(folder)
    mapped = [line for line in maps.read_text().splitlines() if str(folder) in line]
    bounds = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    for tensor in (adapter.modules[Q].lora_a, adapter.modules[Q].lora_b):
        assert any(start <= tensor.data_ptr() < stop for start, stop in bounds)


FORMS: dict[str, dict[str, str]] = {
    "no-prefix": {"prefix": ""},
    "adapter-name": {"infix": ".default"},
    "no-prefix-adapter-name": {"prefix": "", "infix": ".my-adapter"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forms_of_keys(form: dict[str, str], tmp_path: Path) -> None:
    file = make_file(tmp_path / "a.safetensors", **form)
    assert list(read_adapter(file, alpha=4).modules) == sorted(MODULES)


def test_a_file_uses_the_config_beside_it(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", alpha=6)
    file = (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    adapter = read_adapter(file)
    assert adapter.modules[Q].scale == 1.5
    assert adapter.config["lora_alpha"] == 6


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


def test_pickles_only_when_allowed(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", alpha=8)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    expected = read_adapter(folder).modules[Q].delta()  # prefers safetensors
    del weights
    (folder / "adapter_model.safetensors").unlink()
    assert_refused(lambda: read_adapter(folder), AdapterError, "pickle", "--allow-pickle")
    adapter = read_adapter(folder, allow_pickle=True)
    assert torch.equal(adapter.modules[Q].delta(), expected)
    assert adapter.name == "a"


def test_big_values_that_overflow_a_sum_are_finite(tmp_path: Path) -> None:
    big = {
        f"base_model.model.{Q}.lora_A.weight": torch.full((4, 8), 6e4, dtype=torch.float16),
        f"base_model.model.{V}.lora_B.weight": torch.full((6, 4), 3e38),
    }
    folder = make_adapter(tmp_path / "a", tensors=big)
    assert list(read_adapter(folder).modules) == sorted(MODULES)


def test_links_are_followed(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (snapshot / name).symlink_to(folder / name)
    adapter = read_adapter(snapshot)
    assert adapter.name == "snapshot"
    assert adapter.modules[Q].scale == 2.0


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return read_adapter(make_adapter(tmp_path / "math", {Q: (12, 8, 4), V: (6, 8, 2)}))


def test_repr_shows_no_values(adapter: Adapter) -> None:
    assert repr(adapter) == "Adapter('math', 2 modules, ranks 2-4, float32, base 'tiny/base')"
    assert repr(adapter.modules[Q]) == "LowRank(12x8, rank 4, float32, scale 2)"


def test_adapters_compare_by_identity(adapter: Adapter) -> None:
    assert adapter in [adapter]
    assert adapter.modules[Q] != adapter.modules[V]


def test_state_dict_holds_the_whole_update(adapter: Adapter) -> None:
    tensors = adapter.state_dict()
    assert len(tensors) == 4
    for name, update in adapter.modules.items():
        lora_a = tensors[f"base_model.model.{name}.lora_A.weight"]
        lora_b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert_same_update(lora_b @ lora_a, update.delta())
        assert lora_a.data_ptr() == update.lora_a.data_ptr()


def test_modules_are_sorted_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"b.q_proj": (6, 8, 4), "a-1": (6, 8, 4), "a": (6, 8, 4)})
    assert list(read_adapter(folder).modules) == ["a", "a-1", "b.q_proj"]

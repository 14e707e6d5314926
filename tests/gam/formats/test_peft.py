"""What PEFT saves, read as the updates that it is, and everything else refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import (
    MODULES,
    Q,
    V,
    assert_refused,
    assert_same_update,
    assert_unreadable,
    make_adapter,
    make_file,
    make_tensors,
    quiet_peft,
)

from gam.errors import AdapterError
from gam.load import read_adapter

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


PREFIX = "base_model.model."


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


FORMS: dict[str, dict[str, str]] = {
    "no-prefix": {"prefix": ""},
    "adapter-name": {"infix": ".default"},
    "no-prefix-adapter-name": {"prefix": "", "infix": ".my-adapter"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forms_of_keys(form: dict[str, str], tmp_path: Path) -> None:
    file = make_file(tmp_path / "a.safetensors", **form)
    assert list(read_adapter(file, alpha=4).modules) == sorted(MODULES)


def test_modules_are_sorted_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"b.q_proj": (6, 8, 4), "a-1": (6, 8, 4), "a": (6, 8, 4)})
    assert list(read_adapter(folder).modules) == ["a", "a-1", "b.q_proj"]


def factor(module: str, side: str) -> str:
    return f"{PREFIX}{module}.lora_{side}.weight"


NAMES: dict[str, tuple[dict[str, torch.Tensor | None], tuple[str, ...]]] = {
    "only-a": ({factor(Q, "B"): None}, (repr(Q), "lora_A without lora_B")),
    "only-b": ({factor(V, "A"): None}, (repr(V), "lora_B without lora_A")),
    "twice": ({f"{Q}.lora_A.weight": torch.ones(4, 8)}, (Q, "both lora_A of one module")),
    "two-adapters": (
        {
            "other.lora_A.default.weight": torch.ones(4, 8),
            "other.lora_B.default.weight": torch.ones(8, 4),
        },
        ("several adapters", "'default'"),
    ),
    "nested": (
        {
            "experts.base_layer.lora_A.weight": torch.ones(4, 8),
            "experts.base_layer.lora_B.weight": torch.ones(8, 4),
        },
        ("'experts.base_layer'", "target_parameters"),
    ),
}


@pytest.mark.parametrize(("tensors", "parts"), NAMES.values(), ids=NAMES.keys())
def test_names_that_do_not_fit(
    tensors: dict[str, torch.Tensor | None], parts: tuple[str, ...], tmp_path: Path
) -> None:
    assert_unreadable(make_adapter(tmp_path / "a", tensors=tensors), *parts)

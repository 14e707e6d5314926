"""The scaling by PEFT's rule, and configs that PEFT reads as we mean them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import assert_refused, assert_unreadable, make_adapter, quiet_peft
from torch import nn

from gam.errors import AdapterError
from gam.formats.peft_config import check_config, resolve_scaling
from gam.formats.peft_output import output_config

with quiet_peft():
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 6)
        self.v_proj = nn.Linear(8, 6)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 6), "qXproj": nn.Linear(8, 6)})


class Net(nn.Module):
    """Names that patterns confuse: at the root, nested, and with characters of regexes."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 6)
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.odd = nn.ModuleDict({"a+b": nn.Linear(8, 6), "a(b": nn.Linear(8, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)


def peft_model(**config: Any) -> PeftModel:
    with quiet_peft():
        return get_peft_model(Net(), LoraConfig(init_lora_weights=False, **config))


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def saved(config: LoraConfig) -> dict[str, Any]:
    """The config as a reader of adapter_config.json sees it."""
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return json.loads(json.dumps(values))


TARGETS = ["q_proj", "v_proj", "qXproj"]
SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16},
    "fraction": {"r": 3, "lora_alpha": 16},
    "rslora": {"r": 3, "lora_alpha": 16, "use_rslora": True},
    "suffix": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}},
    "both": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "layers.1.q_proj": 3},
        "alpha_pattern": {"v_proj": 5, "layers.0.v_proj": 6},
    },
    "first-match-wins": {
        "r": 4,
        "lora_alpha": 8,
        "alpha_pattern": {"layers.0.v_proj": 6, "v_proj": 5},
        "rank_pattern": {r"layers\.1\.q_proj": 3, "q_proj": 2},
    },
    "regex": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"layers\.(0|1)\.[qv]_proj": 2, r".*attn\.q.proj": 5},
        "alpha_pattern": {r"layers\.\d\.v_proj": 3, r"^q_proj": 7},
    },
    "no-partial-name": {"r": 4, "lora_alpha": 8, "rank_pattern": {"proj": 2, "_proj": 3}},
    "anchored": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"^q_proj": 1, "^layers.0.q_proj": 2},
    },
    "dot-is-any": {"r": 4, "lora_alpha": 8, "rank_pattern": {"self_attn.q.proj": 2}},
    "alternatives": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj|v_proj": 2}},
}


@pytest.mark.parametrize("config", SCALINGS.values(), ids=SCALINGS.keys())
def test_scaling_is_pefts(config: dict[str, Any]) -> None:
    model = peft_model(target_modules=TARGETS, **config)
    values = saved(model.peft_config["default"])
    layers = lora_layers(model)
    assert len(layers) == 1 + 12 * 4
    check_config(values, "a")
    for name, layer in layers.items():
        rank = layer.lora_A["default"].weight.shape[0]
        assert resolve_scaling(values, name, rank, "a") == layer.scaling["default"]


def test_a_key_that_is_a_path_with_special_characters_matches_itself() -> None:
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"odd.a+b": 2}}
    model = peft_model(target_modules=[r"a+b", "a(b"], **config)
    for name, layer in lora_layers(model).items():
        rank = layer.lora_A["default"].weight.shape[0]
        assert resolve_scaling(config, name, rank, "a") == layer.scaling["default"]
        assert rank == {"odd.a+b": 2, "odd.a(b": 4}[name]


@pytest.mark.parametrize("key", sorted(LoraConfig().to_dict()))
def test_every_key_of_the_installed_peft_is_known(key: str) -> None:
    refusal = ""
    try:
        check_config({key: "x"}, "a")
    except AdapterError as error:
        refusal = str(error)
    assert "does not know this key" not in refusal


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False},
        {"bias": "all"},
        {"target_modules": r".*\.q_proj"},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"lora_dropout": 0.1, "fan_in_fan_out": True},
        {"modules_to_save": [], "loftq_config": {}, "trainable_token_indices": None},
    ],
)
def test_what_peft_writes_for_plain_lora_is_accepted(config: dict[str, Any]) -> None:
    with quiet_peft():
        written = saved(LoraConfig(**config))
    check_config(written, "a")


def test_keys_of_old_and_foreign_writers_are_accepted() -> None:
    check_config({"r": 8, "lora_alpha": 16, "enable_lora": None, "merge_weights": False}, "a")
    check_config({"lora_dtype": "bf16", "lorap_lr_ratio": 16.0, "future_key": None}, "a")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adalora": ({"peft_type": "ADALORA"}, "only LoRA"),
    "loha": ({"peft_type": "LOHA"}, "only LoRA"),
    "vera": ({"peft_type": "VERA"}, "only LoRA"),
    "ia3": ({"peft_type": "IA3"}, "save_as_lora"),
    "no-type": ({"peft_type": None}, "only LoRA"),
    "dora": ({"use_dora": True}, "DoRA"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "pissa-niter": ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model"),
    "olora": ({"init_lora_weights": "olora"}, "path_initial_model"),
    "olora-case": ({"init_lora_weights": "OLoRA"}, "path_initial_model"),
    "corda": ({"init_lora_weights": "corda"}, "path_initial_model"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "path_initial_model"),
    "loftq": ({"init_lora_weights": "loftq"}, "LoftQ"),
    "unknown-init": ({"init_lora_weights": "nova"}, "does not know this initialisation"),
    "init-type": ({"init_lora_weights": [1]}, "does not know this initialisation"),
    "replication": ({"layer_replication": [[0, 4], [2, 5]]}, "replicated"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "Arrow"),
    "velora": ({"velora_config": {"num_groups": 2}}, "VeLoRA"),
    "monteclora": ({"monteclora_config": {"num_samples": 8}}, "MonteCLoRA"),
    "kasa": ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
    "parameters": ({"target_parameters": ["experts.down_proj"]}, "not supported yet"),
    "lora-bias": ({"lora_bias": True}, "not supported yet"),
    "modules-to-save": ({"modules_to_save": ["lm_head"]}, "not supported yet"),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [1]}}, "not supported yet"),
    "megatron": ({"megatron_config": {"tp": 2}}, "Megatron"),
    "fused": ({"enable_lora": [True, False, True]}, "fused"),
    "unknown": ({"use_nova": True}, "does not know this key"),
    "bias-value": ({"bias": "some"}, "'lora_only'"),
    "r-zero": ({"r": 0}, "whole number above 0"),
    "r-text": ({"r": "8"}, "whole number above 0"),
    "r-bool": ({"r": True}, "whole number above 0"),
    "alpha-text": ({"lora_alpha": "16"}, "finite number"),
    "alpha-null": ({"lora_alpha": None}, "finite number"),
    "alpha-nan": ({"lora_alpha": float("nan")}, "finite number"),
    "alpha-huge": ({"lora_alpha": 10**400}, "finite number"),
    "rslora-text": ({"use_rslora": "yes"}, "true or false"),
    "pattern-list": ({"rank_pattern": [1]}, "object"),
    "pattern-rank": ({"rank_pattern": {"q_proj": 0}}, "whole number above 0"),
    "pattern-alpha": ({"alpha_pattern": {"q_proj": "big"}}, "finite number"),
    "bad-regex": ({"rank_pattern": {"q_proj(": 4}}, "regular expression"),
    "huge-regex": ({"alpha_pattern": {"a{99999999999999999999}": 4}}, "regular expression"),
    "base-type": ({"base_model_name_or_path": 3}, "text or null"),
    "targets-type": ({"target_modules": [1]}, "list of text"),
}


@pytest.mark.parametrize(("config", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(config: dict[str, Any], part: str) -> None:
    key = next(iter(config))
    assert_refused(
        lambda: check_config({"lora_alpha": 8, "r": 4, **config}, "runs/a"),
        AdapterError,
        "adapter 'runs/a'",
        key,
        part,
        "adapter_config.json",
    )


def test_long_values_are_cut() -> None:
    with pytest.raises(AdapterError) as caught:
        check_config({"modules_to_save": ["x" * 1000]}, "a")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"r": 8, "lora_alpha": 8}, ("rank 4", "says 8", "rank_pattern")),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}}, ("rank 4", "says 2")),
        ({"r": 4}, ("no lora_alpha", "--alpha")),
        ({"r": 4, "lora_alpha": "8"}, ("finite number",)),
        ({"r": "4", "lora_alpha": 8}, ("whole number",)),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 1}}, ("regular expression",)),
    ],
)
def test_scaling_refused(config: dict[str, Any], parts: tuple[str, ...]) -> None:
    assert_refused(
        lambda: resolve_scaling(config, "layers.0.q_proj", 4, "runs/a"),
        AdapterError,
        "'runs/a'",
        *parts,
    )


def test_the_rank_may_be_left_to_the_tensors() -> None:
    assert resolve_scaling({"lora_alpha": 8}, "q_proj", 16, "a") == 0.5


MIXED = {
    "q_proj": 2,
    "layers.0.q_proj": 5,
    "layers.0.self_attn.q_proj": 3,
    "layers.0.self_attn.qXproj": 4,
    "layers.1.q_proj": 4,
    "layers.10.q_proj": 5,
    "layers.11.q_proj": 1,
    "odd.a+b": 1,
    "odd.a(b": 5,
}


def test_output_patterns_give_peft_exactly_these_ranks_and_scaling_one() -> None:
    config = output_config(MIXED, [])
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert len(config["rank_pattern"]) == 6
    with quiet_peft():
        model = get_peft_model(Net(), LoraConfig(**json.loads(json.dumps(config))))
    layers = lora_layers(model)
    for name, rank in MIXED.items():
        assert layers[name].r["default"] == rank
        assert layers[name].scaling["default"] == 1.0
        assert resolve_scaling(config, name, rank, "out") == 1.0
    # PEFT adapts more than we named here, since "q_proj" is also a suffix; at the default rank.
    assert all(layers[name].r["default"] == 5 for name in layers.keys() - MIXED.keys())


def test_output_of_one_rank_has_no_patterns() -> None:
    config = output_config({"layers.0.q_proj": 4, "layers.1.v_proj": 4}, [])
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert (config["init_lora_weights"], config["inference_mode"]) == (True, True)


RANKS = {"layers.0.q_proj": 4, "layers.1.q_proj": 4, "layers.1.v_proj": 4}
TARGET_CASES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "union": (
        [{"target_modules": ["v_proj"]}, {"target_modules": ["q_proj"]}],
        ["q_proj", "v_proj"],
    ),
    "unused": ([{"target_modules": ["v_proj", "q_proj", "gate"]}], ["q_proj", "v_proj"]),
    "redundant": (
        [{"target_modules": ["q_proj", "layers.1.q_proj", "v_proj"]}],
        ["q_proj", "v_proj"],
    ),
    "not-covered": ([{"target_modules": ["q_proj"]}], sorted(RANKS)),
    "part-of-a-name": ([{"target_modules": ["proj"]}], sorted(RANKS)),
    "regex": (
        [{"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ".*_proj"}],
        sorted(RANKS),
    ),
    "missing": ([{"target_modules": ["q_proj", "v_proj"]}, {}], sorted(RANKS)),
    "layers": (
        [{"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0}],
        sorted(RANKS),
    ),
    "excluded": (
        [{"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.v_proj"]}],
        sorted(RANKS),
    ),
    "empty-hints": (
        [
            {
                "target_modules": ["q_proj", "v_proj"],
                "layers_to_transform": None,
                "exclude_modules": [],
            }
        ],
        ["q_proj", "v_proj"],
    ),
    "full-paths": ([{"target_modules": [*RANKS, "q_proj"]}], sorted(RANKS)),
    "none": ([], sorted(RANKS)),
}


@pytest.mark.parametrize(("inputs", "expected"), TARGET_CASES.values(), ids=TARGET_CASES.keys())
def test_output_targets(inputs: list[dict[str, Any]], expected: list[str]) -> None:
    assert output_config(RANKS, inputs)["target_modules"] == expected


def test_output_carries_what_the_inputs_agree_on() -> None:
    first = {
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
        "revision": "main",
        "fan_in_fan_out": True,
    }
    config = output_config(RANKS, [first, {**first, "revision": "v2", "task_type": None}, {}])
    assert config["base_model_name_or_path"] == "org/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["revision"] is None
    assert config["fan_in_fan_out"] is True


def test_output_of_an_output_is_itself() -> None:
    inputs = [{"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "org/base"}]
    config = output_config({**RANKS, "layers.0.q_proj": 2}, inputs)
    assert output_config({**RANKS, "layers.0.q_proj": 2}, [config]) == config
    check_config(config, "out")


# The file itself.

CONFIG = "adapter_config.json"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{'r': 8}", "not JSON"),
        (b"", "not JSON"),
        (b'{"r": 8,\n', "not JSON"),
        (b"[1]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'{"r": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", CONFIG),
    ],
    ids=["quotes", "empty", "cut", "list", "null", "latin1", "deep", "digits"],
)
def test_config_is_not_an_object(content: bytes, part: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / CONFIG).write_bytes(content)
    assert_unreadable(folder, CONFIG, part)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model"),
    "adalora": ({"peft_type": "ADALORA"}, "only LoRA"),
    "unknown": ({"new_maths": 1}, "does not know"),
    "rank": ({"r": 16, "rank_pattern": {}}, "lora_A has rank 4 but adapter_config.json says 16"),
    "alpha": ({"lora_alpha": "8"}, "finite number"),
    "regex": ({"alpha_pattern": {"[": 8}}, "regular expression"),
}


@pytest.mark.parametrize(("config", "part"), CONFIGS.values(), ids=CONFIGS.keys())
def test_config_says_more_than_plain_lora(
    config: dict[str, Any], part: str, tmp_path: Path
) -> None:
    assert_unreadable(make_adapter(tmp_path / "a", **config), part)

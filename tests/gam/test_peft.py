"""The whole way: adapters saved by PEFT, merged, loaded by PEFT into the same model."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.adapters import quiet_peft
from helpers.updates import dense
from safetensors.torch import load_file

from gam import load_adapter, merge_adapters

with quiet_peft():
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "plain": [{"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}] * 3,
    "rslora": [
        {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION, "use_rslora": True},
        {"r": 8, "lora_alpha": 8, "target_modules": ATTENTION},
    ],
    "patterns": [
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 4, r".*layers\.1\..*v_proj": 12},
            "alpha_pattern": {"q_proj": 32, "layers.0.self_attn.o_proj": 5},
        },
        {"r": 6, "lora_alpha": 9, "target_modules": r".*\.(q|v)_proj"},
    ],
    "mixed ranks": [{"r": r, "lora_alpha": 8, "target_modules": "all-linear"} for r in (2, 8, 5)],
    "mixed dtypes": [
        {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION, "save": dtype}
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
    "disjoint targets": [
        {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
        {"r": 4, "lora_alpha": 16, "target_modules": MLP},
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def save_trained(folder, seed, save=torch.float32, **options):
    """Save with PEFT an adapter whose B is no longer zero."""
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
                parameter.data = parameter.data.to(save)
    model.save_pretrained(folder)
    return folder


def logits(model):
    tokens = torch.arange(24).reshape(2, 12) % 64
    with torch.no_grad():
        return model(tokens).logits.double()


def with_updates(model, updates):
    """The base model with dense updates added to its weights."""
    changed = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, delta in updates.items():
            changed.get_submodule(name).weight += torch.from_numpy(delta)
    return changed


def expected_updates(folders, method, weights, rank):
    adapters = [load_adapter(folder) for folder in folders]
    names = sorted({name for adapter in adapters for name in adapter.modules})
    updates = {}
    for name in names:
        shape = next(a.modules[name].shape for a in adapters if name in a.modules)
        found = [adapter.modules.get(name) for adapter in adapters]
        deltas = [
            np.zeros(shape) if u is None else dense(u.lora_b, u.lora_a, u.scale) for u in found
        ]
        if method == "gam":
            updates[name] = oracle.gam(deltas, weights)
        else:
            width = sum(u.rank for u in found if u) if rank == "sum" else rank
            updates[name] = oracle.linear(deltas, np.array(weights) / np.abs(weights).sum(), width)
    return updates


@pytest.mark.parametrize(("method", "rank"), [("gam", "max"), ("linear", "sum"), ("linear", 3)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_logits_are_those_of_the_oracle(setting, method, rank, tmp_path):
    with quiet_peft():
        folders = [
            save_trained(tmp_path / str(seed), seed, **options)
            for seed, options in enumerate(SETTINGS[setting])
        ]
        weights = [0.5, 0.3, -0.2][: len(folders)]
        merge_adapters(
            folders,
            method=method,
            weights=weights,
            rank=rank,
            output=tmp_path / "out",
            dtype="float32",
        )
        base = llama()
        before = logits(base.double())
        updates = expected_updates(folders, method, weights, rank)
        expected = logits(with_updates(base, updates))
        model = PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
        loaded = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            for name, _ in model.named_parameters()
            if "lora_A" in name
        }
        assert loaded == set(updates)
        result = logits(model)
    change = float((expected - before).norm())
    assert change > 0.1
    assert float((result - expected).norm()) < 1e-3 * change


def test_merging_a_merge_again_is_the_same_update(tmp_path):
    with quiet_peft():
        folder = save_trained(tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=ATTENTION)
    once = merge_adapters([folder], output=tmp_path / "b")
    twice = merge_adapters([tmp_path / "b"], output=tmp_path / "c")
    first = load_adapter(folder)
    for name, update in first.modules.items():
        wanted = dense(update.lora_b, update.lora_a, update.scale)
        for merged in (once, twice, load_adapter(tmp_path / "c")):
            got = merged.modules[name]
            assert oracle.relative_error(dense(got.lora_b, got.lora_a, got.scale), wanted) < 1e-6


@pytest.mark.parametrize("setting", ["patterns", "mixed ranks", "disjoint targets"])
def test_one_global_scaling_gives_the_same_update(setting, tmp_path):
    """As vLLM reads an adapter: lora_alpha / r for all modules, the patterns ignored."""
    with quiet_peft():
        folders = [
            save_trained(tmp_path / str(seed), seed, **options)
            for seed, options in enumerate(SETTINGS[setting])
        ]
    merged = merge_adapters(folders, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not config["use_rslora"]
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert config["r"] == max(update.rank for update in merged.modules.values())
    scaling = config["lora_alpha"] / config["r"]
    for name, update in merged.modules.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert np.array_equal(dense(b, a, scaling), dense(update.lora_b, update.lora_a))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_report_gives_the_weights_as_applied(normalize, tmp_path):
    with quiet_peft():
        folders = [
            save_trained(tmp_path / str(seed), seed, **options)
            for seed, options in enumerate(SETTINGS["plain"][:2])
        ]
    merged = merge_adapters(folders, method="linear", weights=[2, 3], normalize=normalize)
    expected = [0.4, 0.6] if normalize else [2, 3]
    assert [entry.weight for entry in merged.report.inputs] == pytest.approx(expected)

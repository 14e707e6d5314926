"""Tensors that are no LoRA factors: never left out, and called by their true names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.adapters import (
    Q,
    assert_refused,
    assert_unreadable,
    make_adapter,
    make_tensors,
)

from gam.errors import AdapterError
from gam.formats import PEFT, detect

PREFIX = "base_model.model."


EXTRA = {
    "embedding": (f"{PREFIX}model.embed_tokens.lora_embedding_A", "embedding"),
    "dora": (f"{PREFIX}{Q}.lora_magnitude_vector", "DoRA"),
    "head": (f"{PREFIX}lm_head.weight", "modules_to_save"),
    "classifier": (f"{PREFIX}score.weight", "modules_to_save"),
    "bias": (f"{PREFIX}{Q}.bias", "bias='none'"),
    "lora-bias": (f"{PREFIX}{Q}.lora_B.bias", "lora_bias"),
    "adalora": (f"{PREFIX}{Q}.lora_E", "AdaLoRA"),
    "loha": (f"{PREFIX}{Q}.hada_w1_a", "LoHa"),
    "lokr": (f"{PREFIX}{Q}.lokr_w1", "LoKr"),
    "vera": (f"{PREFIX}{Q}.vera_lambda_b", "VeRA"),
    "ia3": (f"{PREFIX}{Q}.ia3_l", "IA3"),
    "oft": (f"{PREFIX}{Q}.oft_R.weight", "not LoRA"),
    "tokens": (f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", "tokens"),
    "kohya": ("lora_unet_mid_block_attentions_0.lora_down.weight", "kohya"),
    "kohya-up": ("lora_te_text_model.lora_up.weight", "kohya"),
    "diffusers": ("unet.mid_block.to_q.lora.down.weight", "old diffusers"),
    "unknown": (f"{PREFIX}{Q}.nova", "not a LoRA factor"),
    "no-module": (f"{PREFIX}lora_A.weight", "lora_A.weight"),
    "alpha-alone": ("other.alpha", "not a LoRA factor"),
}


@pytest.mark.parametrize(("key", "part"), EXTRA.values(), ids=EXTRA.keys())
def test_other_tensors_are_never_dropped(key: str, part: str, tmp_path: Path) -> None:
    assert_unreadable(
        make_adapter(tmp_path / "a", tensors={key: torch.ones(4, 4)}), repr(key), part
    )


def test_no_lora_tensors(tmp_path: Path) -> None:
    nothing = dict.fromkeys(make_tensors())
    assert_unreadable(make_adapter(tmp_path / "a", tensors=nothing), "no LoRA tensors")


@pytest.mark.parametrize(("name", "part"), EXTRA.values(), ids=EXTRA.keys())
def test_a_file_of_no_format_is_called_by_its_name(name: str, part: str) -> None:
    assert_refused(lambda: detect([name], None, {}, "a"), AdapterError, "'a'", repr(name), part)


def test_a_format_is_known_by_its_config_or_by_its_names() -> None:
    factor = f"{Q}.lora_A.weight"
    for names, config in (([], {}), (["other", factor], None), ([PREFIX + factor], None)):
        assert detect(names, config, {}, "a") is PEFT

"""Every kind of bad input: one line that names the adapter, what was found, and the way out."""

from __future__ import annotations

import json
import os
import struct
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
    make_adapter,
    make_file,
    make_tensors,
    unprivileged,
)

from gam.errors import AdapterError
from gam.load import read_adapter

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def refused(path: Path, *parts: str, **options: Any) -> None:
    assert_refused(
        lambda: read_adapter(path, **options), AdapterError, f"adapter {str(path)!r}", *parts
    )


# What is on the disk.


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder or file", "PEFT adapter folder")


def test_hub_id() -> None:
    assert_refused(
        lambda: read_adapter("user/name"), AdapterError, "'user/name'", "no such folder or file"
    )


def test_broken_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused(tmp_path / "link", "no such folder or file")


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, f"no {WEIGHTS}", "save_pretrained")


def test_adapter_in_a_subfolder(tmp_path: Path) -> None:
    make_adapter(tmp_path / "run" / "default")
    refused(tmp_path / "run", f"no {WEIGHTS}", "subfolder 'default'")


def test_other_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "weights.gguf", "not .safetensors")


def test_special_file() -> None:
    refused(Path(os.devnull), "not a regular file")


def test_folder_in_place_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "a" / WEIGHTS).mkdir(parents=True)
    refused(tmp_path / "a", WEIGHTS, "not a regular file")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_unreadable(name: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / name).chmod(0)
    with unprivileged():
        refused(folder, "cannot read", "ermission")


# The config.


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
    refused(folder, CONFIG, part)


def test_config_is_a_folder(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    refused(folder, CONFIG, "cannot read", "directory")


def test_config_is_a_broken_link(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(tmp_path / "gone")
    refused(folder, CONFIG, "cannot read")


def test_config_is_missing(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / CONFIG).unlink()
    refused(folder, f"no {CONFIG}", "--alpha")


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
    refused(make_adapter(tmp_path / "a", **config), part)


# The file as a file.


def write_header(path: Path, header: bytes, size: int | None = None, body: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + body)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def beyond(path: Path) -> None:
    header = {f"{PREFIX}{Q}.lora_A.weight": {"dtype": "F32", "shape": [4, 8]}}
    header[f"{PREFIX}{Q}.lora_A.weight"]["data_offsets"] = [0, 10**9]
    write_header(path, json.dumps(header).encode(), body=b"\0" * 128)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"\1\2"),
    "text": lambda path: path.write_bytes(b"<!DOCTYPE html><html>Not found</html>"),
    "zeros": lambda path: path.write_bytes(b"\0" * 64),
    "truncated": cut,
    "truncated-header": cut_header,
    "longer": grow,
    "header-too-large": lambda path: write_header(path, b"{}", size=2**62),
    "header-no-json": lambda path: write_header(path, b"{nonsense}"),
    "header-list": lambda path: write_header(path, b"[1,2]   "),
    "offsets-beyond": beyond,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_file(damage: Callable[[Path], object], tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    damage(folder / WEIGHTS)
    refused(folder, WEIGHTS, "not a complete safetensors file", "Download or save it again")


def test_git_lfs_pointer(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(folder, "Git LFS pointer", "git lfs pull")


def test_pickle_of_something_else(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    file = folder / "adapter_model.bin"
    torch.save([torch.zeros(2)], file)
    refused(folder, "named tensors", allow_pickle=True)
    torch.save({"a": Path("x")}, file)
    refused(folder, "plain tensors", allow_pickle=True)
    file.write_bytes(b"not a pickle")
    refused(folder, "plain tensors", allow_pickle=True)
    refused(file, "is a pickle", "--allow-pickle")


# The tensors.

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
    refused(make_adapter(tmp_path / "a", tensors={key: torch.ones(4, 4)}), repr(key), part)


def factor(module: str, side: str) -> str:
    return f"{PREFIX}{module}.lora_{side}.weight"


FACTORS: dict[str, tuple[dict[str, torch.Tensor | None], tuple[str, ...]]] = {
    "only-a": ({factor(Q, "B"): None}, (repr(Q), "lora_A without lora_B")),
    "only-b": ({factor(V, "A"): None}, (repr(V), "lora_B without lora_A")),
    "ranks": ({factor(Q, "B"): torch.ones(12, 3)}, (repr(Q), "[4, 8]", "[12, 3]", "differ")),
    "vector": ({factor(Q, "A"): torch.ones(32)}, (repr(Q), "[32]", "gather")),
    "scalar": ({factor(Q, "A"): torch.tensor(1.0)}, (repr(Q), "gather")),
    "convolution": ({factor(Q, "A"): torch.ones(4, 8, 3, 3)}, (repr(Q), "convolution")),
    "empty": ({factor(Q, "A"): torch.ones(0, 8)}, (repr(Q), "[0, 8]", "gather")),
    "no-inputs": ({factor(Q, "A"): torch.ones(4, 0)}, (repr(Q), "[4, 0]")),
    "integers": ({factor(Q, "A"): torch.ones(4, 8, dtype=torch.int8)}, (repr(Q), "int8")),
    "bools": ({factor(Q, "A"): torch.ones(4, 8, dtype=torch.bool)}, (repr(Q), "bool")),
    "float8": (
        {factor(Q, "B"): torch.ones(12, 4).to(torch.float8_e4m3fn)},
        (repr(Q), "float8_e4m3fn"),
    ),
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
    "contradiction": ({f"{Q}.alpha": torch.tensor(1.0)}, (repr(Q), "0.25", "gives 2")),
    "alpha-nan": ({f"{Q}.alpha": torch.tensor(float("nan"))}, (repr(Q), "no finite number")),
    "alpha-vector": ({f"{Q}.alpha": torch.ones(2)}, (repr(Q), "no finite number")),
}


@pytest.mark.parametrize(("tensors", "parts"), FACTORS.values(), ids=FACTORS.keys())
def test_factors_that_do_not_fit(
    tensors: dict[str, torch.Tensor | None], parts: tuple[str, ...], tmp_path: Path
) -> None:
    refused(make_adapter(tmp_path / "a", tensors=tensors), *parts)


def test_no_lora_tensors(tmp_path: Path) -> None:
    nothing = dict.fromkeys(make_tensors())
    refused(make_adapter(tmp_path / "a", tensors=nothing), "no LoRA tensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["A", "B"])
def test_values_that_are_not_finite(
    side: str, dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    tensors = make_tensors(dtype=dtype)
    tensor = tensors[factor(DOWN, side)]
    tensor[-1, -1] = value
    folder = make_adapter(tmp_path / "a", dtype=dtype, tensors={factor(DOWN, side): tensor})
    refused(folder, repr(DOWN), f"lora_{side} holds NaN or infinity")


def test_infinities_that_cancel(tmp_path: Path) -> None:
    tensor = torch.zeros(4, 10)
    tensor[0, 0], tensor[0, 1] = float("inf"), -float("inf")
    refused(make_adapter(tmp_path / "a", tensors={factor(DOWN, "A"): tensor}), "NaN or infinity")


# Bare files.

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
    refused(make_file(tmp_path / "a.safetensors", **file), *parts)


def test_names_with_line_breaks_stay_in_one_line(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a\nb", tensors={"x\ny.nova": torch.ones(1)})
    refused(folder, "x\\ny")

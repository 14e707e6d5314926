"""A language model of a few hundred weights, on disk, for the tests of the loop."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers.adapters import quiet_peft

RECIPE: Mapping[str, Any] = {
    "student": "student",
    "seed": 3,
    "families": {
        "one": {"weak": "weak-1", "weaker": "weaker-1", "prompts": "prompts.jsonl"},
        "two": {"weak": "weak-2", "weaker": "weaker-2", "prompts": "prompts.jsonl"},
    },
    "generation": {"max_new_tokens": 3, "temperature": 1.0, "batch_size": 32},
    "training": {
        "rank": 2,
        "alpha": 4,
        "dropout": 0,
        "learning_rate": 0.01,
        "batch_size": 8,
        "device_batch_size": 8,
        "max_length": 16,
        "gradient_checkpointing": False,
    },
    "lora_seeds": ["shared", "own"],
    "merges": {
        "average": {"method": "linear", "rank": "sum"},
        "GAM, tuned": {"method": "gam", "tune": {"scale": [1, 2]}},
    },
    "controls": ["joint", "sequential", "sft", "swapped"],
    "evaluation": {
        "validation": "validation.jsonl",
        "test": "test.jsonl",
        "max_new_tokens": 3,
        "extractor": r"(\d)",
    },
}

CHARACTERS = "=+0123456789abc"


def write_model(folder: Path, seed: int = 0, *, width: int = 16, chat: bool = False) -> Path:
    """Write a random Llama of one layer and a tokenizer of characters, and return the folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    )
    if chat:
        wrapped.chat_template = (
            "{% for message in messages %}{{ message['content'] }}="
            "{% endfor %}{% if add_generation_prompt and plus %}+{% endif %}"
        )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with quiet_peft():
        LlamaForCausalLM(config).save_pretrained(folder)
        wrapped.save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a JSON-lines file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, by nothing but the standard library."""
    return [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n") if line]


def sums(count: int) -> list[dict[str, str]]:
    """Return questions such as 1+2= with their answers."""
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(40) for b in range(10)][
        :count
    ]


def plain_greedy(folder: str, prompt: str, count: int) -> str:
    """Return the likeliest answer, one forward pass over the whole text for each token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    answer: list[int] = []
    while len(answer) < count:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
    return tokenizer.decode(answer, skip_special_tokens=True)


def write_world(folder: Path) -> Path:
    """Write the models and the files of `RECIPE`, and return the folder."""
    for seed, name in enumerate(("student", "weak-1", "weaker-1", "weak-2", "weaker-2")):
        write_model(folder / name, seed)
    rows = [{**row, "answer": row["answer"][-1]} for row in sums(120)]
    write_lines(folder / "prompts.jsonl", rows[:40])
    write_lines(folder / "validation.jsonl", rows[40:60])
    write_lines(folder / "test.jsonl", rows[60:])
    return folder


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write `RECIPE` with other values for some names, and return its path."""
    path = folder / "run.yaml"
    kept = {name: value for name, value in RECIPE.items() if name not in changes}
    path.write_text(yaml.safe_dump({**changes, **kept}, sort_keys=False), encoding="utf-8")
    return path

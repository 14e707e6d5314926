"""Train the tiny language models of a world: a student, and weak and weaker ones."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import Preset, Rates, Size, examples


def make_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        model_max_length=32,
        clean_up_tokenization_spaces=False,
    )


def make_model(size: Size, tokens: int, seed: str) -> LlamaForCausalLM:
    """Return an untrained decoder with 4 heads and 12 width^2 weights a layer."""
    torch.manual_seed(random.Random(seed).getrandbits(63))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens,
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            max_position_embeddings=32,
            rope_theta=100.0,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def train_model(
    folder: Path, preset: Preset, size: Size, rates: Rates, seed: str, batch: int = 128
) -> float:
    """Train a model on a corpus and save the average of its weights.

    Returns:
        The mean loss of the last 50 steps, in nats per token of the answers.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, steps = make_tokenizer(preset.characters), size.steps
    model = make_model(size, len(tokenizer), seed).to(device)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    stream = examples(preset, random.Random(seed), rates)
    losses = []
    for _ in range(steps):
        rows = list(itertools.islice(stream, batch))
        ids, labels = (tensor.to(device) for tensor in encode(tokenizer, rows))
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        losses.append(float(loss.detach()))
    average.module.to(torch.bfloat16).save_pretrained(folder)  # small enough to keep a record of
    tokenizer.save_pretrained(folder)
    return sum(losses[-50:]) / len(losses[-50:])


def encode(
    tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids, padded on the right, and labels that cover the answers only."""
    prompts = tokenizer([prompt for prompt, _ in rows])["input_ids"]
    answers = tokenizer([answer for _, answer in rows])["input_ids"]
    length = max(len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = [*prompt, *answer, tokenizer.eos_token_id]
        ids[row, : len(whole)] = torch.tensor(whole)
        labels[row, len(prompt) : len(whole)] = ids[row, len(prompt) : len(whole)]
    return ids, labels

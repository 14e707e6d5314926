"""Answers of local weights, and of local weights with an adapter."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gam.pda.files import DataError, Row
from gam.pda.models.base import Generation
from gam.pda.prompts import Prompt, Text

if TYPE_CHECKING:
    import torch

    from gam.adapter import Adapter


LIBRARIES = ("torch", "transformers", "tokenizers")


@contextmanager
def old_names() -> Iterator[None]:
    """Let TRL and PEFT use the names that transformers 5 has renamed, without a warning."""
    with warnings.catch_warnings():
        message = "`(is_)?gradient_checkpointing.* is deprecated"
        warnings.filterwarnings("ignore", message, FutureWarning)
        yield


def load_model(source: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Return a causal language model, in main memory, and its tokenizer.

    Args:
        source: A folder or a Hub id ``user/name[@revision]``.
        dtype: Of the weights, by its name in torch, or "auto".

    Raises:
        DataError: It cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    revision = None
    if "@" in source:
        source, _, revision = source.partition("@")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"cannot load the model {source!r}: {reason}.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def find_config(source: str, role: str) -> None:
    """Look up the configuration of a model on the Hub, or in the cache.

    Args:
        source: Hub id ``user/name[@revision]``.
        role: What the model is for, for the message.

    Raises:
        DataError: It is not there.
    """
    from transformers import AutoConfig

    name, _, revision = source.partition("@")
    try:
        AutoConfig.from_pretrained(name, revision=revision or None)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"{role}: {source!r} is no folder here, and not found on the Hub: {reason}."
        ) from None


class Local:
    """A model in this process.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, with a padding token.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Take a loaded model."""
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, source: str, dtype: str = "auto") -> Local:
        """Load a model, on the GPU where there is one; see `load_model`."""
        import torch

        model, tokenizer = load_model(source, dtype)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)

    def answer(
        self, prompts: Sequence[Prompt], settings: Generation, done: Container[str] = ()
    ) -> Iterator[list[Row]]:
        """Yield answers in batches of prompts of like lengths, the longest first.

        The batches do not depend on what is done, so that going on gives the same bits.
        """
        coded = {prompt: self._encode(prompt.text, settings.chat_template) for prompt in prompts}
        order = sorted(prompts, key=lambda prompt: len(coded[prompt]), reverse=True)
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            if all(prompt.id in done for prompt in batch):
                continue
            tokens = self._generate([coded[prompt] for prompt in batch], batch, settings)
            yield [self._row(prompt, row) for prompt, row in zip(batch, tokens, strict=True)]

    def _encode(self, text: Text, extra: Mapping[str, Any]) -> list[int]:
        if isinstance(text, str):
            ids: list[int] = self.tokenizer(text)["input_ids"]
            return ids
        text = self.tokenizer.apply_chat_template(
            list(text), add_generation_prompt=True, tokenize=False, **extra
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _generate(
        self, rows: Sequence[list[int]], prompts: Sequence[Prompt], settings: Generation
    ) -> list[list[int]]:
        import torch
        from transformers import (
            GenerationConfig,
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        steps: Any = LogitsProcessorList()
        if settings.temperature > 0:
            steps.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_p < 1:
                steps.append(TopPLogitsWarper(settings.top_p))
            steps.append(_Draw([settings.seed_of(prompt.id) for prompt in prompts]))
        ends = self.model.generation_config.eos_token_id
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self.tokenizer.eos_token_id if ends is None else ends,
        )
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=config,
                logits_processor=steps,
            )
        answers: list[list[int]] = found[:, length:].tolist()
        return answers

    def _row(self, prompt: Prompt, tokens: list[int]) -> Row:
        ends = self.model.generation_config.eos_token_id
        stops = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        count = next((i for i, token in enumerate(tokens) if token in stops), None)
        text = self.tokenizer.decode(tokens[:count], skip_special_tokens=True)
        return {
            "id": prompt.id,
            "text": text,
            "finish": "length" if count is None else "stop",
            "tokens": len(tokens) if count is None else count,
        }


class _Draw:
    """Samples inside greedy decoding: keeps one drawn token a row, each row from its own stream.

    A draw looks up one uniform number in the cumulative distribution, so it depends on nothing
    but the row's own logits and seed.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.streams = [random.Random(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        shares = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        draws = shares.new_tensor([[stream.random()] for stream in self.streams])
        token = torch.searchsorted(shares, draws * shares[:, -1:], right=True)
        token.clamp_(max=shares.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@contextmanager
def adapted(model: Local, adapter: str | Path | Adapter | None) -> Iterator[Local]:
    """Give a local model an adapter for a while.

    Args:
        model: The student.
        adapter: An adapter folder, an adapter in memory, or None for the student as it is.
    """
    if adapter is None:
        yield model
        return
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder, old_names():
        if not isinstance(adapter, str | Path):
            adapter.save(folder, overwrite=True)
            adapter = folder
        wrapped: Any = PeftModel.from_pretrained(model.model, str(adapter)).eval()
    try:
        yield Local(wrapped, model.tokenizer)
    finally:
        wrapped.unload()

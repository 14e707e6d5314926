"""Answers of a language model, from local weights or from a server.

Both kinds give the same answer to the same prompt and seed whatever else is asked beside it:
sampling draws from a stream of its own for each prompt.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gam.errors import OptionError
from gam.pda.prompts import Prompt, Text
from gam.pda.records import DataError, Row, setting

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Generation:
    """How answers are made."""

    max_new_tokens: int = setting(512, "Longest answer, in tokens; it is cut there, and marked.")
    temperature: float = setting(0.0, "0 always takes the likeliest token.")
    top_p: float = setting(1.0, "Draw from the likeliest tokens that hold this probability.")
    seed: int = setting(0, "Seed of all draws.")
    chat_template: Mapping[str, Any] = setting(dict, "More arguments of the chat template.")
    batch_size: int = setting(16, "Prompts at a time, or requests at a time to a server.")

    def __post_init__(self) -> None:
        """Check the values."""
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise OptionError("max_new_tokens and batch_size: expected at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise OptionError("expected a temperature of at least 0 and 0 < top_p <= 1.")

    def record(self) -> dict[str, Any]:
        """Return what can change an answer."""
        values = asdict(self)
        del values["batch_size"]
        return values

    def seed_of(self, name: str) -> int:
        """Return the seed of the draws for one prompt, or one model, by its name."""
        text = f"{self.seed} {name}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


@contextmanager
def old_names() -> Iterator[None]:
    """Let TRL and PEFT use the names that transformers 5 has renamed, without a warning."""
    with warnings.catch_warnings():
        message = "`(is_)?gradient_checkpointing.* is deprecated"
        warnings.filterwarnings("ignore", message, FutureWarning)
        yield


class Model(Protocol):
    """Something that answers prompts."""

    def answer(
        self, prompts: Sequence[Prompt], settings: Generation, done: Container[str] = ()
    ) -> Iterator[list[Row]]:
        """Yield answers, a batch at a time: ``id``, ``text``, ``finish`` and ``tokens``.

        ``finish`` is "stop", "length" (cut at the longest length), or "error"; then ``error``
        says why, and there is no text. Prompts whose id is in ``done`` need no answer, but may
        get one.
        """


def open_model(source: str, dtype: str = "auto") -> Model:
    """Return a model from its name.

    Args:
        source: A folder of weights, a Hub id ``user/name[@revision]``, or ``NAME@URL`` for the
            model NAME of a server that speaks OpenAI's protocol, such as
            ``qwen@http://localhost:8000/v1``.
        dtype: Of local weights.
    """
    name, _, where = source.partition("@")
    if where.startswith(("http://", "https://")):
        return Server(name, where)
    return Local.load(source, dtype)


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
        reason = " ".join(str(error).split())
        raise DataError(f"cannot load the model {source!r}: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


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


class Server:
    """A model behind OpenAI's protocol (vLLM, SGLang, llama.cpp, ``transformers serve``).

    Args:
        name: Of the model, as the server knows it.
        url: Up to and including ``/v1``.
        key: Sent as the bearer token; by default the environment's ``OPENAI_API_KEY``.
        timeout_s: For one request.
        attempts: In all, before a prompt is given up.
        backoff_s: Wait after the first failure; doubled each time, up to a minute.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 600.0,
        attempts: int = 6,
        backoff_s: float = 1.0,
    ) -> None:
        """Ask nothing yet."""
        self.name = name
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.attempts = attempts
        self.backoff_s = backoff_s
        key = os.environ.get("OPENAI_API_KEY") if key is None else key
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._closing = threading.Event()

    def answer(
        self, prompts: Sequence[Prompt], settings: Generation, done: Container[str] = ()
    ) -> Iterator[list[Row]]:
        """Yield answers as they come, ``batch_size`` requests at a time."""
        with ThreadPoolExecutor(settings.batch_size) as pool:
            try:
                missing = [prompt for prompt in prompts if prompt.id not in done]
                waiting = [pool.submit(self._ask, prompt, settings) for prompt in missing]
                for answered in as_completed(waiting):
                    yield [answered.result()]
            finally:
                self._closing.set()
                pool.shutdown(cancel_futures=True)

    def _ask(self, prompt: Prompt, settings: Generation) -> Row:
        chat = not isinstance(prompt.text, str)
        body: dict[str, Any] = {
            "model": self.name,
            "messages" if chat else "prompt": prompt.text,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed_of(prompt.id),
        }
        if chat and settings.chat_template:
            body["chat_template_kwargs"] = dict(settings.chat_template)
        path = "/chat/completions" if chat else "/completions"
        problem = ""
        for attempt in range(self.attempts):
            if attempt and self._closing.wait(min(60.0, self.backoff_s * 2 ** (attempt - 1))):
                break
            try:
                return {"id": prompt.id, **_read_answer(self._post(path, body), chat)}
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(300).decode('utf-8', 'replace')}"
                if error.code in (400, 401, 403, 404, 422):  # asking again would not help
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
        return {"id": prompt.id, "finish": "error", "error": " ".join(problem.split())}

    def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        data = json.dumps(body).encode("utf-8")
        request = urllib.request.Request(self.url + path, data, self._headers)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
            content: bytes = reply.read()
        return content


def _read_answer(content: bytes, chat: bool) -> Row:
    """Return the answer in a reply; a ValueError where the reply is not one."""
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        finish = choice["finish_reason"]
        tokens = (reply.get("usage") or {}).get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the reply is not an answer: {content[:100]!r}") from error
    if not isinstance(text, str) or finish not in ("stop", "length"):
        raise ValueError(f"the reply holds no finished text: {content[:100]!r}")
    return {"text": text, "finish": finish, "tokens": tokens}

"""Answers of a model behind a server that speaks OpenAI's protocol."""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from gam.pda.files import Row
from gam.pda.models.base import Generation
from gam.pda.prompts import Prompt


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

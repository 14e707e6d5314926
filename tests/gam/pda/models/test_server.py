"""Answers from a server on loopback that behaves well, late, wrongly, or not at all."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import assert_refused
from helpers.pda import read_lines, sums, write_lines

import gam.pda.pairs
from gam.pda.files import DataError
from gam.pda.models import Generation, open_model
from gam.pda.models.server import Server
from gam.pda.pairs import make_pairs
from gam.pda.prompts import load_prompts

SETTINGS = Generation(max_new_tokens=5, temperature=0.5, batch_size=8, seed=1)


class Fake:
    """A server whose answers are made by a function of the request and its number."""

    def __init__(self, answer: Callable[[dict[str, Any], int], tuple[int, bytes]]) -> None:
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        self.counts: Counter[str] = Counter()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = json.dumps(body.get("prompt", body.get("messages")))
                fake.requests.append((self.path, body, self.headers.get("Authorization")))
                fake.counts[asked] += 1
                status, content = answer(body, fake.counts[asked])
                if status == 0:  # hang up
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) + (7 if status == 206 else 0)))
                self.end_headers()
                try:
                    self.wfile.write(content)
                except OSError:
                    return  # the client has given up

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def serve() -> Iterator[Callable[..., Fake]]:
    started: list[tuple[Fake, threading.Thread]] = []

    def start(answer: Callable[[dict[str, Any], int], tuple[int, bytes]]) -> Fake:
        fake = Fake(answer)
        thread = threading.Thread(target=fake.server.serve_forever, args=(0.01,))
        thread.start()
        started.append((fake, thread))
        return fake

    yield start
    for fake, thread in started:
        fake.server.shutdown()
        thread.join()
        fake.server.server_close()


def reply(text: str, *, chat: bool = False, finish: str = "stop") -> bytes:
    choice = {"message": {"content": text}} if chat else {"text": text}
    return json.dumps(
        {"choices": [{**choice, "finish_reason": finish}], "usage": {"completion_tokens": 3}}
    ).encode()


def say(body: dict[str, Any], _: int) -> tuple[int, bytes]:
    """Answer with the model's name and the prompt."""
    return 200, reply(f"{body['model']} {body['prompt']}")


def test_plain_prompts(serve: Callable[..., Fake], tmp_path: Path) -> None:
    fake = serve(say)
    prompts = load_prompts(str(write_lines(tmp_path / "p.jsonl", sums(30))))
    make_pairs(prompts, f"big@{fake.url}", f"small@{fake.url}", tmp_path / "o", SETTINGS)
    assert [(row["chosen"], row["rejected"]) for row in read_lines(tmp_path / "o/pairs.jsonl")] == [
        (f"big {p.text}", f"small {p.text}") for p in prompts
    ]
    path, body, _ = fake.requests[0]
    assert path == "/v1/completions"
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (5, 0.5, 1.0)
    assert len({body["seed"] for _, body, _ in fake.requests}) == 60  # no two draw alike


def test_chats(serve: Callable[..., Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    fake = serve(lambda body, _: (200, reply(body["messages"][0]["content"], chat=True)))
    prompts = load_prompts(str(write_lines(tmp_path / "p.jsonl", sums(2))), chat=True)
    settings = Generation(chat_template={"enable_thinking": False})
    found = [
        row for batch in open_model(f"m@{fake.url}").answer(prompts, settings) for row in batch
    ]
    assert {row["text"] for row in found} == {"0+0=", "0+1="}
    path, body, key = fake.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


def bad_then_good(body: dict[str, Any], count: int) -> tuple[int, bytes]:
    """Fail in a way that depends on the prompt, twice, then answer."""
    if count > 2:
        return say(body, count)
    kind = int(body["prompt"][-2]) % 8
    if kind == 0:
        time.sleep(0.5)  # beyond the timeout
    return {
        0: (200, reply("too late")),
        1: (500, b"overloaded"),
        2: (429, b"slow down"),
        3: (200, b"<html>not JSON"),
        4: (200, b'{"choices": []}'),
        5: (200, b'{"choices": [{"text": null, "finish_reason": "stop"}]}'),
        6: (206, b'{"cho'),  # cut short
        7: (0, b""),
    }[kind]


def patient(monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """Let pairs use a server with short waits."""

    def opened(source: str, dtype: str) -> Server:
        name, _, url = source.partition("@")
        return Server(name, url, **{"timeout_s": 0.25, "attempts": 4, "backoff_s": 0.01, **more})

    monkeypatch.setattr(gam.pda.pairs, "open_model", opened)


def test_every_failure_is_tried_again(
    serve: Callable[..., Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch)
    fake = serve(bad_then_good)
    prompts = load_prompts(str(write_lines(tmp_path / "p.jsonl", sums(20))))
    make_pairs(prompts, f"big@{fake.url}", f"small@{fake.url}", tmp_path / "o", SETTINGS)
    assert [(row["chosen"], row["rejected"]) for row in read_lines(tmp_path / "o/pairs.jsonl")] == [
        (f"big {p.text}", f"small {p.text}") for p in prompts
    ]


def test_what_stays_unanswered_is_reported_and_the_rest_kept(
    serve: Callable[..., Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, attempts=2)
    healed = threading.Event()

    def answer(body: dict[str, Any], count: int) -> tuple[int, bytes]:
        if body["prompt"] == "1+3=" and not healed.is_set():
            return 503, b"down for maintenance"
        return say(body, count)

    fake = serve(answer)
    prompts = load_prompts(str(write_lines(tmp_path / "p.jsonl", sums(20))))

    def ask() -> None:
        make_pairs(prompts, f"big@{fake.url}", f"small@{fake.url}", tmp_path / "o", SETTINGS)

    assert_refused(
        ask, DataError, "1 of 20 prompts", "weak model", "HTTP 503", "down for maintenance"
    )
    assert len(read_lines(tmp_path / "o" / "weak.jsonl")) == 19
    assert not (tmp_path / "o" / "pairs.jsonl").exists()
    healed.set()
    asked = len(fake.requests)
    ask()
    assert len(fake.requests) == asked + 2  # the one that failed, of either model
    assert len(read_lines(tmp_path / "o" / "pairs.jsonl")) == 20


def test_a_wrong_request_is_not_repeated(serve: Callable[..., Fake], tmp_path: Path) -> None:
    fake = serve(lambda *_: (404, b"no such model"))
    prompts = load_prompts(str(write_lines(tmp_path / "p.jsonl", sums(1))))
    ((row,),) = open_model(f"m@{fake.url}").answer(prompts, SETTINGS)
    assert (row["finish"], row["error"]) == ("error", "HTTP 404: no such model")
    assert len(fake.requests) == 1


def test_no_server_at_all(tmp_path: Path) -> None:
    prompts = load_prompts(str(write_lines(tmp_path / "p.jsonl", sums(1))))
    server = Server("m", "http://127.0.0.1:9/v1", attempts=2, backoff_s=0.01)
    ((row,),) = server.answer(prompts, SETTINGS)
    assert "refused" in row["error"]

"""The Hub that the tests talk to through the real client.

On loopback unless `GAM_TEST_REAL_HUB` is set: then it is the real one, where the account of
`HF_TOKEN` gets private repositories that are deleted afterwards, and tests of faults, which
the real one cannot be asked for, are skipped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_server import TOKEN, Hub, Place, running
from huggingface_hub import HfApi, constants

REAL = bool(os.environ.get("GAM_TEST_REAL_HUB"))


@pytest.fixture
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub | None]:
    """Point the client at a Hub on loopback, with a cache and a login of the test's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    if REAL:
        yield None
        return
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # The storage that loopback offers is LFS; without this the client talks to Xet's.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def place(server: Hub | None) -> Iterator[Place]:
    """A Hub of either kind."""
    found = Place(HfApi().whoami()["name"])
    yield found
    if server is None:
        for repo in found.used:
            HfApi().delete_repo(repo, missing_ok=True)


@pytest.fixture
def hub(server: Hub | None) -> Hub:
    """The Hub on loopback, whose faults can be chosen."""
    if server is None:
        pytest.skip("the real Hub does not fail on demand")
    return server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the client's pauses between attempts pass at once; return them."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept

"""Adapters from the Hub by name, through the real client."""

import json
import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.adapters import assert_refused, make_adapter, make_tensors
from helpers.hub_server import TOKEN, Hub, Place, contents
from helpers.paths import ROOT
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from gam import AdapterError, inspect_adapters, load_adapter, merge_adapters
from gam.commands import inspect as inspect_cli
from gam.hub.names import HubName, hub_name

# What the client says to itself when it uploads through LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

EXAMPLES = ROOT / "examples" / "adapters"


def refused(name: str, *parts: str, **options: object) -> None:
    """Assert that loading is refused in one line without the token, also in its causes."""
    assert_refused(lambda: load_adapter(name, **options), AdapterError, repr(name), *parts)


# --- names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("u/n", HubName("u/n")),
        ("u/n@v1", HubName("u/n", "v1")),
        ("u/n@feature/x", HubName("u/n", "feature/x")),
        ("u/n:a/b/", HubName("u/n", None, "a/b")),
        ("u/n@refs/pr/3:a", HubName("u/n", "refs/pr/3", "a")),
        ("hf://u/n", HubName("u/n")),
        ("hf://models/u/n@v1:a", HubName("u/n", "v1", "a")),
        ("hf://u/n@v1/a/b", HubName("u/n", "v1", "a/b")),
        ("hf://u/n@refs/pr/3/a", HubName("u/n", "refs/pr/3", "a")),
        ("hf://u/n/a", HubName("u/n", None, "a")),
        ("n", None),
        ("a/b/c", None),
        ("./u/n", None),
        ("../n", None),
        ("/u/n", None),
        ("u/n/", None),
        (Path("u/n"), None),
    ],
)
def test_names(text: object, name: HubName | None) -> None:
    assert hub_name(text) == name


@pytest.mark.parametrize("name", ["u/n", "u/n@v1", "u/n@refs/pr/3:a/b", "u/n:a"])
def test_a_name_is_read_as_it_is_written(name: str) -> None:
    assert str(hub_name(name)) == name


PART = st.from_regex(r"[a-zA-Z0-9]([a-zA-Z0-9._-]{0,8}[a-zA-Z0-9])?", fullmatch=True)


@given(PART, PART, st.none() | PART, st.lists(PART, max_size=2), st.booleans())
def test_every_name_is_read_as_it_is_written(
    user: str, name: str, revision: str | None, folder: list[str], forced: bool
) -> None:
    expected = HubName(f"{user}/{name}", revision, "/".join(folder))
    if expected.repo.startswith("models/") and forced:
        return
    assert hub_name(f"{'hf://' if forced else ''}{expected}") == expected


@pytest.mark.parametrize("text", ["hf://", "hf://n", "hf://datasets/u/n/x@", "hf://u/n@"])
def test_a_malformed_uri_is_refused(text: str) -> None:
    assert_refused(lambda: load_adapter(text), AdapterError, text, "hf://user/name[@revision]")


def test_a_name_that_is_neither_a_path_nor_a_name_on_the_hub() -> None:
    for text in ("nowhere", "a/b/c", "./u/n"):
        refused(text, "no such folder or file", "user/name[@revision][:folder]")


# --- what is downloaded ---------------------------------------------------------------


def test_an_adapter_comes_from_the_hub(place: Place, tmp_path: Path) -> None:
    folder = EXAMPLES / "sort"
    repo = place.upload({**contents(folder), "optimizer.pt": b"large", "other.json": b"{}"}, "sort")
    there, here = load_adapter(repo), load_adapter(folder)
    assert there.name == repo.partition("/")[2]
    assert there.config == here.config
    for key, tensor in here.state_dict().items():
        assert torch.equal(there.state_dict()[key], tensor)
    source = there.source
    assert source is not None
    assert here.source is not None
    commit = source.commit
    assert commit is not None
    assert len(commit) == 40
    assert source.name == f"{repo}@{commit}"
    assert (source.sha256, source.config_sha256) == (here.source.sha256, here.source.config_sha256)
    stored = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert stored == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_on_the_hub_is_inspected(place: Place) -> None:
    folder = EXAMPLES / "sort"
    repo = place.upload(contents(folder), "sort")
    there, here = inspect_adapters([repo, folder]).adapters
    assert len(there.description.commit) == 40
    assert here.description.commit is None
    assert there.norm == here.norm


def test_revisions_folders_and_uris(place: Place, tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "first", seed=1)
    second = make_adapter(tmp_path / "second", seed=2)
    repo = place.upload(first, "two")
    old = load_adapter(repo)
    assert old.source is not None
    nested = {f"runs/last/{name}": data for name, data in contents(second).items()}
    place.commit(repo, nested)
    new = load_adapter(f"{repo}:runs/last")
    assert new.name == "last"
    assert new.source is not None
    assert new.source.commit != old.source.commit
    assert new.source.name == f"{repo}@{new.source.commit}:runs/last"
    expected = load_adapter(second).state_dict()
    for name in (new.source.name, f"hf://{repo}/runs/last", f"hf://{repo}@main/runs/last"):
        found = load_adapter(name).state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    pinned = load_adapter(old.source.name)
    assert pinned.source == old.source


def test_a_local_path_wins_and_a_uri_does_not_look(
    hub: Hub, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = place.upload(make_adapter(tmp_path / "there", seed=1), "x")
    monkeypatch.chdir(tmp_path)
    make_adapter(tmp_path / repo, seed=2)
    hub.seen.clear()
    local = load_adapter(repo)
    assert local.source is not None
    assert (local.source.commit, hub.seen) == (None, [])
    forced = load_adapter(f"hf://{repo}")
    assert forced.source is not None
    assert forced.source.commit is not None


def test_a_pickle_only_when_allowed(place: Place, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    torch.save(make_tensors(), folder / "adapter_model.bin")
    both = place.upload(folder, "both")
    assert load_adapter(both, allow_pickle=True).source.path.suffix == ".safetensors"
    (folder / "adapter_model.safetensors").unlink()
    repo = place.upload(folder, "pickle")
    refused(repo, "only as a pickle", "--allow-pickle")
    assert load_adapter(repo, allow_pickle=True).source.path.name == "adapter_model.bin"


def test_a_merge_records_commits(place: Place, tmp_path: Path) -> None:
    repos = [place.upload(EXAMPLES / name, name) for name in ("sort", "reverse")]
    merged = merge_adapters([repos[0], f"{repos[1]}@main"], output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "gam_merge.json").read_text())
    for repo, entry in zip(repos, record["inputs"], strict=True):
        assert entry["source"] == f"{repo}@{entry['commit']}"
    assert [source.commit for source in merged.inputs] == [e["commit"] for e in record["inputs"]]
    again = [entry["source"] for entry in record["inputs"]]
    merge_adapters(again, output=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_record_makes_the_merge_again_after_a_repository_has_changed(
    place: Place, tmp_path: Path
) -> None:
    first = make_adapter(tmp_path / "first", seed=1)
    repo = place.upload(first, "a")
    merge_adapters([repo, first], output=tmp_path / "out")
    place.commit(repo, contents(make_adapter(tmp_path / "second", seed=2)))
    merge_adapters(config=tmp_path / "out", output=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    merge_adapters([repo, first], output=tmp_path / "changed")
    assert contents(tmp_path / "changed") != contents(tmp_path / "out")


def test_a_recipe_names_adapters_on_the_hub(place: Place, tmp_path: Path) -> None:
    repo = place.upload(make_adapter(tmp_path / "a"), "a")
    (tmp_path / "recipe.yaml").write_text(f"adapters: {{one: '{repo}@main', two: a}}\n")
    merged = merge_adapters(config=tmp_path / "recipe.yaml")
    assert [source.commit is None for source in merged.inputs] == [False, True]


def test_a_name_in_a_recipe_is_no_path_of_another_folder(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = place.upload(make_adapter(tmp_path / "a", seed=1), "a")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "recipe.yaml").write_text(f"adapters: [{repo}]\n")
    merge_adapters(config=tmp_path / "recipes" / "recipe.yaml", output=tmp_path / "out")
    # Where the recipe is called from does not matter; what is beside it does.
    make_adapter(tmp_path / repo, seed=2)
    monkeypatch.chdir(tmp_path)
    there = merge_adapters(config="recipes/recipe.yaml")
    assert there.inputs[0].commit is not None
    make_adapter(tmp_path / "recipes" / repo, seed=3)
    here = merge_adapters(config="recipes/recipe.yaml")
    assert here.inputs[0].path == tmp_path / "recipes" / repo / "adapter_model.safetensors"
    assert merge_adapters(config="out").inputs[0].commit is not None


def test_the_output_may_be_called_like_the_owner_of_an_input(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = place.upload(EXAMPLES / "sort", "sort")
    monkeypatch.chdir(tmp_path)
    merge_adapters([repo], output=place.user)
    assert (tmp_path / place.user / "adapter_model.safetensors").exists()


def test_gam_inspect_takes_names(place: Place) -> None:
    repo = place.upload(EXAMPLES / "reverse", "reverse")
    result = CliRunner().invoke(inspect_cli.main, [repo, str(EXAMPLES / "sort"), "--json"])
    assert result.exit_code == 0, result.output
    assert repo.partition("/")[2] in result.stdout


# --- no network -----------------------------------------------------------------------


def test_offline_the_cache_serves(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = place.upload(make_adapter(tmp_path / "a"), "a")
    online = load_adapter(repo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (repo, f"{repo}@main", online.source.name):
        offline = load_adapter(name)
        assert offline.source == online.source
    refused(f"{repo}-other", "not in the cache", "HF_HUB_OFFLINE")
    refused(f"{repo}@other", "not in the cache", "HF_HUB_OFFLINE")


def test_a_hub_in_trouble_leaves_the_cache(hub: Hub, place: Place, tmp_path: Path) -> None:
    repo = place.upload(make_adapter(tmp_path / "a"), "a")
    online = load_adapter(repo)
    hub.fail("GET /api/models", 503)
    assert load_adapter(repo).source == online.source
    refused(f"{repo}-other", "status 503", "Try again later")


def test_a_pinned_adapter_in_the_cache_asks_nobody(hub: Hub, place: Place, tmp_path: Path) -> None:
    source = load_adapter(place.upload(make_adapter(tmp_path / "a"), "a")).source
    hub.seen.clear()
    assert load_adapter(source.name).source == source
    assert hub.seen == []


# --- what is refused ------------------------------------------------------------------


def test_missing_things_are_named(place: Place, tmp_path: Path) -> None:
    repo = place.upload(make_adapter(tmp_path / "a"), "a", prefix="x/")
    refused(f"{repo}-other", "no such repository on the Hub", "nor a local path")
    refused(f"{repo}@v9:x", "no such branch, tag or commit")
    refused(repo, "no adapter_config.json in the repository", f"Did you mean '{repo}:x'?")
    refused(f"{repo}:y", "no adapter_config.json in folder 'y'")
    empty = place.upload({"adapter_config.json": b"{}"}, "b")
    refused(empty, "no adapter_model.safetensors in the repository")


def test_a_repository_of_another_kind(place: Place) -> None:
    repo = place.upload({"config.json": b"{}"}, "model")
    refused(repo, "no adapter_config.json", "PEFT's push_to_hub")


def test_an_invalid_name_asks_nobody(server: Hub | None) -> None:
    refused("a--b/c", "not a valid name of a repository")
    assert server is None or server.seen == []


def test_private_for_others(
    hub: Hub, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = place.upload(make_adapter(tmp_path / "a"), "a")
    monkeypatch.delenv("HF_TOKEN")
    refused(repo, "unless it is private", "Run `hf auth login`")
    hub.tokens["hf_somebody"] = ("somebody", "write")
    monkeypatch.setenv("HF_TOKEN", "hf_somebody")
    refused(repo, "unless it is private", "with a token that may see")
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    refused(repo, "the Hub does not accept the login", "HF_TOKEN")


def test_gated(hub: Hub, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = place.upload(make_adapter(tmp_path / "a"), "a")
    hub.repos[repo].gated = True
    refused(repo, "gated", f"Ask for access on its page at {hub.endpoint}")


def test_all_are_checked_before_weights_are_downloaded(
    hub: Hub, place: Place, tmp_path: Path
) -> None:
    good = place.upload(make_adapter(tmp_path / "a"), "a")
    other = make_adapter(tmp_path / "b", base_model_name_or_path="tiny/other")
    dora = make_adapter(tmp_path / "c", use_dora=True)
    for bad, part in (
        (place.upload(other, "b"), "updates of different models"),
        (place.upload(dora, "c"), "use_dora"),
        (place.name(), "no such repository"),
    ):
        hub.seen.clear()
        assert_refused(lambda bad=bad: merge_adapters([good, bad]), AdapterError, part)
        assert not [line for line in hub.seen if "adapter_model" in line]


@pytest.mark.parametrize(
    ("status", "part"),
    [
        (403, "the login may not do this"),
        (429, "status 429"),
        (500, "status 500"),
        (504, "status 504"),
    ],
)
def test_statuses(hub: Hub, waits: list[float], status: int, part: str) -> None:
    hub.fail("GET", status)
    refused("u/n", part)
    assert len(hub.seen) == 1
    assert waits == []


@pytest.mark.parametrize("action", ["drop", "stall"])
def test_no_answer(
    hub: Hub, waits: list[float], action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.fail("GET", action)
    refused("u/n", f"cannot reach {hub.endpoint}", "HF_ENDPOINT")
    assert waits == []


def test_no_server(server: Hub | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("u/n", "cannot reach http://127.0.0.1:9", "Check the connection")


def test_a_server_that_is_no_hub(hub: Hub) -> None:
    hub.fail("GET", lambda handler: handler._send(200, b"<html>Log in to the hotel</html>"))
    refused("u/n", f"{hub.endpoint} answers without sense", "Check HF_ENDPOINT")


@pytest.mark.parametrize("action", ["drop", "halfway", 500])
def test_a_download_that_breaks_is_tried_again(
    hub: Hub, place: Place, waits: list[float], action: object, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a")
    repo = place.upload(folder, "a")
    hub.fail("GET /storage", action, times=1)
    if action == 500:
        refused(repo, "status 500")
    found = load_adapter(repo).state_dict()
    for key, tensor in load_adapter(folder).state_dict().items():
        assert torch.equal(found[key], tensor)


@pytest.mark.parametrize("action", ["drop", "halfway", "stall"])
def test_a_download_that_never_succeeds_ends(
    hub: Hub,
    place: Place,
    waits: list[float],
    action: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    repo = place.upload(make_adapter(tmp_path / "a"), "a")
    hub.fail("GET /storage", action)
    refused(repo, f"cannot reach {hub.endpoint}")
    assert 0 < len([line for line in hub.seen if line.startswith("GET /storage")]) < 20
    # What is there is not taken for the adapter later.
    hub.faults.clear()
    assert load_adapter(repo).modules


def test_the_token_is_in_no_message(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    def echo(handler: object) -> None:
        handler._send(400, {"error": f"bad request: {handler.headers['Authorization']}"})

    hub.fail("GET", echo)
    with caplog.at_level(logging.DEBUG), pytest.raises(AdapterError) as caught:
        load_adapter("u/n")
    assert "<token>" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert TOKEN not in str(caught.value) + caplog.text

"""Merges to the Hub, through the real client: what is there afterwards, also when it fails."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.adapters import assert_refused, make_adapter
from helpers.hub_server import READ_TOKEN, TOKEN, Handler, Hub, Place, contents
from helpers.paths import ROOT
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file

import gam
from gam import OptionError, OutputError, merge_adapters, push_to_hub
from gam.commands import merge as cli
from gam.hub import push

# What the client says to itself when it uploads through LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

EXAMPLES = ROOT / "examples" / "adapters"
CARD = b"---\nlicense: mit\n---\n# A model\n"
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "gam_merge.json"}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a merge; no test changes it."""
    folder = tmp_path_factory.mktemp("push")
    adapters = [make_adapter(folder / name, seed=seed) for seed, name in enumerate("ab")]
    merge_adapters(adapters, output=folder / "merged")
    return folder / "merged"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.main, list(map(str, arguments)), prog_name="gam-merge")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert TOKEN not in result.output
    assert READ_TOKEN not in result.output
    return result


def refused(call: Callable[[], object], *parts: str) -> str:
    """Assert that a push is refused in one line without the token, also in its causes."""
    with pytest.raises(OutputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    assert caught.value.__context__ is None
    for part in parts:
        assert part in text
    return text


# --- what is there afterwards ---------------------------------------------------------


def test_full_circle(place: Place) -> None:
    """Download, merge, push, download again: identical tensors."""
    inputs = [place.upload(EXAMPLES / name, name) for name in ("sort", "reverse")]
    repo = place.name()
    result = invoke(*inputs, "-o", "out", "--push-to-hub", repo, "--private")
    assert result.exit_code == 0, result.output
    head = HfApi().model_info(repo)
    assert head.private
    page = f"{constants.ENDPOINT}/{repo}"
    assert result.stdout.endswith(f"\n\nPushed to {page} (commit {head.sha[:8]})\n")
    assert place.files(repo) == contents(Path("out"))
    assert place.commits(repo)[1:] == ["Merge 2 LoRA adapters by gam"]
    again = gam.load_adapter(repo)
    local = load_file("out/adapter_model.safetensors")
    assert again.state_dict().keys() == local.keys()
    assert all(torch.equal(tensor, local[key]) for key, tensor in again.state_dict().items())


def test_a_folder_from_earlier_and_what_was_there_already(place: Place, merged: Path) -> None:
    repo = place.name()
    before = contents(merged)
    first = invoke("-o", merged, "--push-to-hub", repo, "--private", "--commit-message", "Mine")
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith(f"Pushed to {constants.ENDPOINT}/{repo} (commit ")
    second = invoke("-o", merged, "--push-to-hub", repo, "--json")
    record = json.loads(second.stdout)
    assert record["output"] == str(merged)
    assert record["pushed"]["changed"] is False
    third = invoke("-o", merged, "--push-to-hub", repo)
    assert third.stdout.startswith("Nothing to push: ")
    assert place.commits(repo)[1:] == ["Mine"]
    assert place.files(repo) == before == contents(merged)


def test_a_later_merge_replaces_an_earlier_one(place: Place, merged: Path, tmp_path: Path) -> None:
    repo = place.name()
    push_to_hub(merged, repo, private=True)
    place.commit(repo, {"LICENSE": b"mine", "adapter_model.bin": b"stale"})
    other = merge_adapters([make_adapter(tmp_path / "c", seed=5)], output="other")
    assert other.push_to_hub(repo) == f"{constants.ENDPOINT}/{repo}"
    found = place.files(repo)
    assert found.keys() == FILES | {"LICENSE"}
    assert (
        found["adapter_model.safetensors"] == Path("other/adapter_model.safetensors").read_bytes()
    )
    assert len(place.commits(repo)) == 4


def test_a_merge_in_memory_names_no_paths(place: Place, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "secret" / "a")
    repo = place.name()
    merge_adapters([folder]).push_to_hub(repo, private=True)
    found = place.files(repo)
    assert found.keys() == FILES
    assert json.loads(found["gam_merge.json"])["inputs"][0]["source"] == "a"
    for data in found.values():
        assert b"secret" not in data
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["secret"]


def test_a_branch_and_a_pull_request(place: Place, merged: Path, tmp_path: Path) -> None:
    repo = place.name()
    push_to_hub(merged, repo, private=True)
    main = HfApi().model_info(repo).sha
    merge_adapters([make_adapter(tmp_path / "c", seed=5)], output="other")
    page = push_to_hub("other", repo, revision="next")
    assert page == f"{constants.ENDPOINT}/{repo}/tree/next"
    assert place.files(repo, "next") == contents(Path("other"))
    page = push_to_hub("other", repo, create_pr=True)
    assert page.startswith(f"{constants.ENDPOINT}/{repo}/discussions/")
    number = page.rpartition("/")[2]
    assert place.files(repo, f"refs/pr/{number}") == contents(Path("other"))
    assert HfApi().model_info(repo).sha == main
    assert place.files(repo) == contents(merged)


def test_a_new_repository_may_begin_with_a_branch(place: Place, merged: Path) -> None:
    repo = place.name()
    push_to_hub(merged, repo, private=True, revision="next")
    assert place.files(repo, "next").keys() == FILES
    assert place.files(repo) == {}


def test_a_file_of_the_users_is_not_pushed(place: Place, merged: Path, tmp_path: Path) -> None:
    for name, data in contents(merged).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "notes.txt").write_text("mine")
    repo = place.name()
    push_to_hub(tmp_path, repo, private=True)
    assert place.files(repo).keys() == FILES


def test_settings_of_the_client_are_honoured(hub: Hub, tmp_path: Path) -> None:
    """The settings that users make, in processes of their own; nothing but our text is shown."""
    make_adapter(tmp_path / "a")
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from gam.commands.merge import main; main()", *words]
        environment = {**os.environ, **settings, **more}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert TOKEN not in done.stdout + done.stderr
        return done

    pushed = run("a", "-o", "out", "--quiet", "--push-to-hub", "me/x")
    assert (pushed.returncode, pushed.stdout, pushed.stderr) == (0, "", "")
    merged = run("me/x", "-o", "again")
    assert (merged.returncode, merged.stderr) == (0, "")
    assert (tmp_path / "home" / "hub" / "models--me--x").exists()
    seen = len(hub.seen)
    offline = run("me/x", "-o", "offline", HF_HUB_OFFLINE="1")
    assert (offline.returncode, len(hub.seen)) == (0, seen)
    assert contents(Path("offline")) == contents(Path("again"))
    absent = run("me/y", "-o", "absent", HF_HUB_OFFLINE="1")
    assert absent.returncode == 1
    assert absent.stderr == (
        "Error: adapter 'me/y': not in the cache, and offline mode is on. "
        "Unset HF_HUB_OFFLINE to download it.\n"
    )


def test_a_slow_hub_is_waited_for(hub: Hub, place: Place, merged: Path) -> None:
    hub.fail("", "slow")
    repo = place.name()
    push_to_hub(merged, repo)
    assert gam.load_adapter(repo).modules


def test_the_commands_in_the_readme(place: Place) -> None:
    readme = (EXAMPLES.parents[1] / "README.md").read_text()
    math, code = (place.upload(EXAMPLES / name, name) for name in ("sort", "reverse"))
    HfApi().create_branch(code, branch="v2")
    names = {"user/math-lora": math, "user/code-lora": code, "user/merged": place.name()}
    lines = re.findall(r"^gam-merge .*--push-to-hub.*$", readme, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        for name, repo in names.items():
            line = line.replace(name, repo)
        result = invoke(*shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Nothing to push: ")


# --- what is refused before anything is done ------------------------------------------


def test_a_foreign_repository(place: Place, merged: Path) -> None:
    repo = place.upload({"config.json": b"{}", "README.md": CARD}, "model")
    refused(
        lambda: push_to_hub(merged, repo),
        "holds 'README.md' and no gam_merge.json",
        "--allow-foreign-repo",
    )
    assert place.files(repo).keys() == {"README.md", "config.json"}
    push_to_hub(merged, repo, allow_foreign_repo=True)
    assert place.files(repo) == {"config.json": b"{}", **contents(merged)}


def test_a_public_repository_stays_out_of_private_pushes(
    hub: Hub, place: Place, merged: Path
) -> None:
    repo = place.name()
    push_to_hub(merged, repo)
    assert not hub.repos[repo].private
    refused(lambda: push_to_hub(merged, repo, private=True), "the repository is there and public")


def test_a_pull_request_needs_a_repository(place: Place, merged: Path) -> None:
    repo = place.name()
    refused(lambda: push_to_hub(merged, repo, create_pr=True), "no such repository", "--create-pr")


@pytest.mark.parametrize("repo", ["name", "a/b/c", "a b/c", "a--b/c", "a/b.git", "a/" + "b" * 97])
def test_names_that_no_repository_has(hub: Hub, merged: Path, repo: str) -> None:
    assert_refused(
        lambda: push_to_hub(merged, repo), OptionError, f"got {repo!r}, expected user/name"
    )
    assert invoke("-o", merged, "--push-to-hub", repo).exit_code == 2
    assert hub.seen == []


def test_options_that_do_not_go_together(hub: Hub, merged: Path) -> None:
    for options, part in (
        ({"create_pr": True, "revision": "next"}, "default branch only"),
        ({"commit_message": " "}, "commit_message: got none"),
    ):
        assert_refused(lambda o=options: push_to_hub(merged, "me/x", **o), OptionError, part)
    assert hub.seen == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "-o", "out", "--private"], "--private: this is for pushing"),
        (["a", "-o", "out", "--create-pr"], "--create-pr: this is for pushing"),
        (["--push-to-hub", "me/x"], "Missing option '-o'"),
        (["-o", "out", "--push-to-hub", "me/x", "--scale", "2"], "Missing argument 'ADAPTER...'"),
        (["-o", "out", "--push-to-hub", "me/x", "--overwrite"], "Missing argument 'ADAPTER...'"),
        (["-o", "out", "--push-to-hub", "me/x", "--dry-run"], "Missing argument 'ADAPTER...'"),
    ],
)
def test_wrong_usage(hub: Hub, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert hub.seen == []


def test_only_the_folder_of_a_merge_is_pushed(hub: Hub, merged: Path, tmp_path: Path) -> None:
    trained = make_adapter(tmp_path / "trained")
    refused(lambda: push_to_hub(trained, "me/x"), "no gam_merge.json", "not the result of a merge")
    refused(lambda: push_to_hub("nowhere", "me/x"), "no gam_merge.json")
    refused(lambda: gam.load_adapter(trained).push_to_hub("me/x"), "gam.push_to_hub")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "gam_merge.json").write_bytes((merged / "gam_merge.json").read_bytes())
    refused(lambda: push_to_hub("half", "me/x"), "no adapter_config.json")
    assert hub.seen == []


def test_a_push_that_cannot_succeed_is_refused_before_the_merge(
    hub: Hub, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "a")
    foreign = place.upload({"config.json": b"{}"}, "model")

    def check(repo: str, part: str, code: int = 1) -> None:
        result = invoke(adapter, "-o", "out", "--push-to-hub", repo)
        assert (result.exit_code, result.stdout) == (code, "")
        assert part in result.stderr
        assert not Path("out").exists()

    check("nonsense", "expected user/name", code=2)
    check(foreign, "--allow-foreign-repo")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    check("me/x", "the token may only read")
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    check("me/x", "the Hub does not accept the login")
    monkeypatch.delenv("HF_TOKEN")
    check("me/x", "nobody is logged in")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check("me/x", "offline mode is on. Unset HF_HUB_OFFLINE")
    assert set(hub.repos) == {foreign}


# --- what fails on the way ------------------------------------------------------------

COMMIT = "POST /api/models/.*/commit"
UPLOAD = "PUT /storage"


@pytest.mark.parametrize(
    ("pattern", "action", "part"),
    [
        ("POST /api/repos", 401, "the Hub does not accept the login"),
        ("POST /api/repos", 403, "the login may not do this"),
        ("POST /api/repos", 409, "somebody else is changing the repository"),
        ("POST /api/repos", 500, "status 500"),
        ("POST /api/repos", "drop", "cannot reach"),
        ("POST /api/repos", "stall", "cannot reach"),
        ("POST /api/validate-yaml", 400, "status 400"),
        ("preupload", 403, "the login may not do this"),
        ("preupload", 404, "no such repository"),
        ("preupload", 503, "status 503"),
        ("objects/batch", 403, "the login may not do this"),
        ("objects/batch", 502, "status 502"),
        (UPLOAD, 403, "the login may not do this"),
        (UPLOAD, 500, "status 500"),
        (UPLOAD, "halfway", "cannot reach"),
        (UPLOAD, "drop", "cannot reach"),
        (UPLOAD, "stall", "cannot reach"),
        ("git/verify", 500, "status 500"),
        (COMMIT, 401, "the Hub does not accept the login"),
        (COMMIT, 403, "the login may not do this"),
        (COMMIT, 404, "no such repository"),
        (COMMIT, 409, "somebody else is changing the repository"),
        (COMMIT, 412, "somebody else is changing the repository"),
        (COMMIT, 429, "status 429"),
        (COMMIT, 500, "status 500"),
        (COMMIT, "drop", "cannot reach"),
        (COMMIT, "stall", "cannot reach"),
    ],
)
def test_a_failed_push_loses_nothing_and_resumes(
    hub: Hub,
    place: Place,
    waits: list[float],
    merged: Path,
    pattern: str,
    action: Any,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(push, "_PATIENCE", 0.1)
    repo = place.name()
    before = contents(merged)
    hub.fail(pattern, action)
    text = refused(lambda: push_to_hub(merged, repo, private=True), part)
    assert contents(merged) == before
    # Nothing of the merge is there: no repository, or one without files.
    assert repo not in hub.repos or len(hub.repos[repo].commits) == 1
    # The client tries again, so many times and no more.
    assert len([line for line in hub.seen if line.startswith(("POST", "PUT"))]) < 20
    assert sum(waits) < 60
    # The command in the message is the way on.
    hub.faults.clear()
    command = text.rpartition("to push it again: ")[2]
    assert command == shlex.join(
        ["gam-merge", "-o", str(merged), "--push-to-hub", repo, "--private"]
    )
    result = invoke(*shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert place.files(repo) == before
    assert len(hub.repos[repo].commits) == 2


@pytest.mark.parametrize("action", [500, "drop", "halfway"])
def test_a_fault_that_passes_is_not_seen(
    hub: Hub, place: Place, waits: list[float], merged: Path, action: Any
) -> None:
    repo = place.name()
    hub.fail(UPLOAD, action, times=2)
    push_to_hub(merged, repo)
    assert place.files(repo) == contents(merged)
    assert len(waits) == 2


def test_an_earlier_merge_survives_a_failed_push(
    hub: Hub, place: Place, waits: list[float], merged: Path, tmp_path: Path
) -> None:
    repo = place.name()
    push_to_hub(merged, repo)
    other = make_adapter(tmp_path / "c", seed=5)
    for pattern in (UPLOAD, COMMIT):
        hub.fail(pattern, 500)
        result = invoke(other, "-o", "other", "--overwrite", "--push-to-hub", repo)
        assert result.exit_code == 1
        # The merge itself is told and kept.
        assert result.stdout.startswith("Wrote other: gam, ")
        assert result.stderr.splitlines()[-1].endswith(
            f"'other' is complete; to push it again: gam-merge -o other --push-to-hub {repo}"
        )
        assert contents(Path("other")).keys() == FILES
        hub.faults.clear()
        assert place.files(repo) == contents(merged)


def test_json_says_nothing_where_the_push_fails(
    hub: Hub, place: Place, tmp_path: Path, merged: Path
) -> None:
    adapter = make_adapter(tmp_path / "a")
    hub.fail(COMMIT, 403)
    result = invoke(adapter, "-o", "out", "--json", "--push-to-hub", place.name())
    assert (result.exit_code, result.stdout) == (1, "")
    hub.faults.clear()
    repo = place.name()
    result = invoke(adapter, "-o", "out", "--overwrite", "--json", "--push-to-hub", repo)
    record = json.loads(result.stdout)
    assert record["pushed"] == {
        "url": f"{hub.endpoint}/{repo}",
        "commit": hub.repos[repo].heads["main"],
        "changed": True,
    }


def test_a_merge_in_memory_outlives_a_failed_push(hub: Hub, place: Place, tmp_path: Path) -> None:
    merged = merge_adapters([make_adapter(tmp_path / "a")])
    repo = place.name()
    hub.fail(COMMIT, 409)
    refused(lambda: merged.push_to_hub(repo), "complete in memory; push it again, or save it")
    hub.faults.clear()
    assert merged.push_to_hub(repo) == f"{hub.endpoint}/{repo}"


def test_a_lost_answer_is_found_done(hub: Hub, place: Place, merged: Path) -> None:
    """The commit happens but its answer is lost: pushing again finds it there."""
    repo = place.name()
    push_to_hub(merged, place.name())  # so that the weights are in storage

    def commit_and_hang_up(handler: Handler) -> None:
        handler.commit(handler.body, repo=repo, revision="main")

    hub.fail(COMMIT, commit_and_hang_up, times=1)
    refused(lambda: push_to_hub(merged, repo), "cannot reach", "to push it again")
    assert place.files(repo) == contents(merged)
    assert invoke("-o", merged, "--push-to-hub", repo).stdout.startswith("Nothing to push: ")
    assert len(hub.repos[repo].commits) == 2


def test_somebody_faster_is_not_overwritten(
    hub: Hub, place: Place, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = place.name()
    push_to_hub(merged, repo)
    head = hub.repos[repo]

    def somebody_commits(handler: Handler) -> None:
        head.commit("main", {**head.commits[head.heads["main"]], "README.md": b"new"}, "theirs")
        handler.commit(handler.body, repo=repo, revision="main")()

    place.commit(repo, {"README.md": CARD})
    hub.fail(COMMIT, somebody_commits, times=1)
    refused(lambda: push_to_hub(merged, repo), "somebody else is changing", "Try again")
    assert place.files(repo)["README.md"] == b"new"


def test_the_token_is_in_no_error_and_no_file(
    hub: Hub, place: Place, waits: list[float], merged: Path, tmp_path: Path
) -> None:
    def echo(handler: Handler) -> None:
        handler._send(500, {"error": f"no: {handler.headers['Authorization']}"})

    repo = place.name()
    for pattern in ("POST /api/repos", "preupload", "objects/batch", COMMIT):
        hub.fail(pattern, echo)
        refused(lambda: push_to_hub(merged, repo), "<token>")
        hub.faults.clear()
    hub.fail("whoami", echo)
    result = invoke(make_adapter(tmp_path / "a"), "-o", "out", "--push-to-hub", repo)
    assert (result.exit_code, "<token>" in result.stderr) == (1, True)
    hub.faults.clear()
    push_to_hub(merged, repo)
    for path in [*merged.iterdir(), *tmp_path.rglob("*")]:
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    for files in hub.repos[repo].commits.values():
        assert not any(TOKEN.encode() in data for data in files.values())


# --- the card -------------------------------------------------------------------------


def test_the_card_passes_the_clients_validation(place: Place, merged: Path) -> None:
    card = ModelCard.load(merged / "README.md")
    card.validate()
    repo = place.upload(merged, "carded")
    assert str(ModelCard.load(repo)) == (merged / "README.md").read_text()


def test_the_server_refuses_bad_metadata(hub: Hub) -> None:
    """The check on the card is one that can fail."""
    for line in ("base_model: /home/me/model", "tags: [1, 2]", "base_model_relation: child"):
        with pytest.raises(ValueError, match=r"valid|tags|expected"):
            ModelCard(f"---\n{line}\n---\n# x").validate()

"""Merges to the Hub: one commit with the files of a folder, or none."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gam.errors import OptionError, OutputError
from gam.files import CARD_NAME, REPORT_NAME
from gam.formats.peft import FILES, WEIGHTS_NAME
from gam.formats.peft_config import CONFIG_NAME
from gam.hub.faults import ask
from gam.hub.names import is_repo_name
from gam.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OWN_FILES = FILES | {REPORT_NAME, CARD_NAME}
"""What a merge's folder may hold."""

_PATIENCE = 60.0  # seconds without a byte from the Hub; the client itself has no limit


@dataclass(frozen=True)
class Target:
    """Where a merge goes on the Hub, and how.

    Attributes:
        repo: ``user/name``; made if it is not there.
        private: Make it private. A public one that is there is refused.
        revision: Branch, made from the default branch if it is not there; None for the
            default branch.
        create_pr: Open a pull request in place of changing the branch.
        commit_message: None for one that names the method.
        allow_foreign_repo: Also push to a repository that holds anything but a merge.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    allow_foreign_repo: bool = False


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Attributes:
        url: The page of the repository, branch or pull request.
        commit: The commit that holds the files.
        changed: False where it was there before.
    """

    url: str
    commit: str
    changed: bool


@dataclass(frozen=True)
class _Repo:
    """A repository that is there: the commit to build on, its files, and a branch to make."""

    head: str
    files: frozenset[str]
    new_branch: bool


def check_target(target: Target) -> None:
    """Check that a merge may be pushed, as far as that can be known; changes nothing.

    Raises:
        OptionError: The name is no name of a repository, or options do not go together.
        OutputError: Nobody is logged in, the repository must not be changed, or the Hub
            cannot be reached.
    """
    _check_options(target)

    def work() -> None:
        from huggingface_hub import HfApi

        _check_login(target)
        with _time_limit():
            role = HfApi().whoami().get("auth", {}).get("accessToken", {}).get("role")
            if role == "read":
                raise OutputError(
                    f"{_what(target)}: the token may only read. "
                    "Run `hf auth login` with one that may write, or change HF_TOKEN."
                )
            _look(HfApi(), target)

    ask(_what(target), work, OutputError)


def push_to_hub(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    allow_foreign_repo: bool = False,
) -> str:
    """Push the folder of an earlier merge to the Hub.

    Args:
        folder: What `Adapter.save` or ``gam-merge -o`` wrote; it stays as it is.
        repo: ``user/name``; made if it is not there.
        private: Make a new repository private.
        revision: Branch, made if it is not there; None for the default branch.
        create_pr: Open a pull request in place of changing the branch.
        commit_message: None for one that names the method.
        allow_foreign_repo: Also push to a repository that holds anything but a merge.

    Returns:
        The page of the repository, its branch, or the pull request.

    Raises:
        OptionError: The name is no name of a repository, or options do not go together.
        OutputError: The folder holds no merge, or the push was refused or failed; the
            message says how to push again.

    Example:
        >>> push_to_hub("merged", "user/merged", private=True)  # doctest: +SKIP
    """
    target = Target(repo, private, revision, create_pr, commit_message, allow_foreign_repo)
    return push_folder(folder, target).url


def push_folder(folder: str | os.PathLike[str], target: Target, way_on: str = "") -> Pushed:
    """Push the folder of a merge in one commit; it stays as it is.

    The commit holds the files that gam-merge wrote into the folder, and removes those of an
    earlier merge that are not there any more; other files of the repository stay. Pushing
    again is safe: what is there already is not sent again.

    Args:
        folder: What `Adapter.save` or ``gam-merge -o`` wrote.
        target: Where to.
        way_on: What a message says at its end, for a folder that is soon gone; by default it
            has the command that pushes the folder again.

    Returns:
        Where it is now.

    Raises:
        OptionError: As in `check_target`.
        OutputError: The folder holds no merge, or the push was refused or failed; the
            message says how to push again.
    """
    _check_options(target)
    files = _files(folder)
    if not way_on:
        words = ["gam-merge", "-o", os.fspath(folder), *_flags(target)]
        way_on = f"{os.fspath(folder)!r} is complete; to push it again: {shlex.join(words)}"
    return ask(_what(target), partial(_push, files, target), OutputError, way_on)


def _push(files: Mapping[str, Path], target: Target) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    _check_login(target)
    api = HfApi(library_name="gam-merge", library_version=__version__)
    with _time_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on the card, and the client's on itself
        repo = _look(api, target)
        if repo is None:
            api.create_repo(target.repo, private=target.private)
        if target.revision and (repo is None or repo.new_branch):
            api.create_branch(target.repo, branch=target.revision)
        stale = (OWN_FILES & repo.files) - files.keys() if repo else set()
        added = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        done = api.create_commit(
            target.repo,
            [*added, *(CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=target.commit_message or _message(files[REPORT_NAME]),
            revision=target.revision,
            create_pr=target.create_pr,
            parent_commit=repo.head if repo else None,  # refused if somebody was faster
        )
    page = f"{constants.ENDPOINT}/{target.repo}"
    page += f"/tree/{target.revision}" if target.revision else ""
    return Pushed(done.pr_url or page, done.oid, repo is None or done.oid != repo.head)


def _look(api: HfApi, target: Target) -> _Repo | None:
    """Return the repository, None if it is not there; refuse one that must not be changed."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    new_branch = False
    info = None
    with contextlib.suppress(RepositoryNotFoundError):
        try:
            info = api.model_info(target.repo, revision=target.revision)
        except RevisionNotFoundError:
            info = api.model_info(target.repo)
            new_branch = True
    if info is None:
        if target.create_pr:
            raise OutputError(
                f"{_what(target)}: no such repository, so there is nothing to open a pull "
                "request on. Leave --create-pr out to make it, or check the name."
            )
        return None
    files = frozenset(sibling.rfilename for sibling in info.siblings or ())
    if target.private and not info.private:
        raise OutputError(
            f"{_what(target)}: the repository is there and public. Leave --private out, make the "
            "repository private on its page, or choose another name."
        )
    foreign = sorted(files - {".gitattributes"})
    if foreign and REPORT_NAME not in files and not target.allow_foreign_repo:
        raise OutputError(
            f"{_what(target)}: the repository holds {foreign[0]!r} and no {REPORT_NAME}, so it is "
            "not the result of a merge. Choose another name, or pass --allow-foreign-repo."
        )
    assert info.sha is not None
    return _Repo(info.sha, files, new_branch)


def _what(target: Target) -> str:
    return f"push to {target.repo!r}"


def _check_options(target: Target) -> None:
    if not is_repo_name(target.repo):
        raise OptionError(f"push_to_hub: got {target.repo!r}, expected user/name.")
    if target.create_pr and target.revision:
        raise OptionError(
            "create_pr: the Hub opens pull requests on the default branch only. Leave revision out."
        )
    if target.commit_message is not None and not target.commit_message.strip():
        raise OptionError(
            "commit_message: got none, expected text. Leave it out for one that names the method."
        )


def _check_login(target: Target) -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"{_what(target)}: offline mode is on. Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise OutputError(
            f"{_what(target)}: nobody is logged in. Run `hf auth login` with a token that may "
            "write, or set HF_TOKEN."
        )


def _files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the files that gam-merge wrote into a folder, by name."""
    files = {name: Path(folder) / name for name in sorted(OWN_FILES)}
    files = {name: path for name, path in files.items() if path.is_file()}
    for name in (REPORT_NAME, CONFIG_NAME, WEIGHTS_NAME):
        if name not in files:
            raise OutputError(
                f"push of {os.fspath(folder)!r}: no {name} there, so it is not the result of a "
                "merge. Give the folder that gam-merge wrote."
            )
    return files


def _flags(target: Target) -> list[str]:
    words = ["--push-to-hub", target.repo]
    words += ["--private"] if target.private else []
    words += ["--revision", target.revision] if target.revision else []
    words += ["--create-pr"] if target.create_pr else []
    words += ["--commit-message", target.commit_message] if target.commit_message else []
    return words + (["--allow-foreign-repo"] if target.allow_foreign_repo else [])


def _message(record: Path) -> str:
    report = json.loads(record.read_bytes())
    return f"Merge {len(report['inputs'])} LoRA adapters by {report['method']}"


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Let no request wait for ever, where the user's own client has no limit."""
    from huggingface_hub import get_session

    client = get_session()
    limit = getattr(client, "timeout", None)  # clients before 1.0 have none to set
    if limit is None or limit.read is not None:
        yield
        return
    client.timeout = _PATIENCE
    try:
        yield
    finally:
        client.timeout = limit

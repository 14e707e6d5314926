"""What adapters on the Hub are called; needs no client and no network."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import PurePosixPath
from typing import TypeAlias

from gam.errors import AdapterError

_PART = r"\w(?:[\w.-]*\w)?"
_REPO = rf"(?P<repo>{_PART}/{_PART})"
_NAME = re.compile(rf"{_REPO}(?:@(?P<revision>[^:]+))?(?::(?P<folder>.*))?", re.ASCII)
# The client's own form, where a slash begins the folder.
_URI = re.compile(
    rf"hf://(?:models/)?(?!(?:datasets|spaces|kernels|buckets)/){_REPO}(?:@(?P<revision>refs/(?:pr|convert)/[^/:]+|[^/:]+))?"
    r"(?:[/:](?P<folder>.*))?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubName:
    """The name of an adapter on the Hub.

    Attributes:
        repo: ``user/name``.
        revision: Branch, tag or commit; None for the default branch.
        folder: Where in the repository; "" for its root.
    """

    repo: str
    revision: str | None = None
    folder: str = ""

    @property
    def label(self) -> str:
        """The last part of the folder or of the repository's name."""
        return PurePosixPath(self.folder or self.repo).name

    def file(self, name: str) -> str:
        """Return the path of a file in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    def __str__(self) -> str:
        """Return ``user/name[@revision][:folder]``."""
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f":{self.folder}" if self.folder else "")


Place: TypeAlias = str | PathLike[str] | HubName
"""Where an adapter is: text is a path or a name on the Hub."""


def hub_name(adapter: object, path: str | PathLike[str] | None = None) -> HubName | None:
    """Return the name on the Hub that a string is; None for what is or can only be a path.

    A local path wins over a name on the Hub; ``hf://`` before it forces the Hub. A
    `pathlib.Path` is always a path, a `HubName` always a name. Asks the disk, never the network.

    Args:
        adapter: What a user may give as an adapter.
        path: The path that a string stands for; None for the string itself.

    Returns:
        The name, or None.

    Raises:
        AdapterError: A string that begins with ``hf://`` is no such name.

    Example:
        >>> hub_name("user/code-lora@v2:last")
        HubName(repo='user/code-lora', revision='v2', folder='last')
    """
    if not isinstance(adapter, str):
        return adapter if isinstance(adapter, HubName) else None
    name = parse_name(adapter)
    if name is None or adapter.startswith("hf://"):
        return name
    return None if _is_there(adapter if path is None else path) else name


def parse_name(text: str) -> HubName | None:
    """Return the name on the Hub that a text can be, whatever is on the disk.

    Raises:
        AdapterError: As for `hub_name`.
    """
    forced = text.startswith("hf://")
    found = (_URI if forced else _NAME).fullmatch(text)
    if found is None and forced:
        raise AdapterError(
            f"adapter {text!r}: expected hf://user/name[@revision][:folder] of a model."
        )
    if found is None:
        return None
    folder = str(PurePosixPath((found["folder"] or "").strip("/")))
    return HubName(found["repo"], found["revision"], "" if folder == "." else folder)


def is_repo_name(text: str) -> bool:
    """Tell whether the Hub allows a repository of this name, ``user/name``."""
    found = re.fullmatch(_REPO, text, re.ASCII)
    return found is not None and not re.search(r"--|\.\.|\.git$|/.{97}", text)


def _is_there(path: str | PathLike[str]) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:  # a folder on the way may not be read: reading the path says so
        return True
    return True

"""The libraries of the loop: whether they are installed, and which versions."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from gam.errors import OptionError

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that can change an answer or an adapter."""
    from gam.version import __version__

    versions = {"gam-merge": __version__}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def need(*modules: str, extra: str = "pda") -> None:
    """Raise an `OptionError` that says what to install where a module is missing."""
    missing = [name for name in dict.fromkeys(modules) if importlib.util.find_spec(name) is None]
    if missing:
        listed = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        raise OptionError(
            f"{listed} {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Run: pip install 'gam-merge[{extra}]'."
        )

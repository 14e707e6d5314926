"""What models, questions and folders must be, looked at before any work begins."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gam.errors import OutputError
from gam.pda.files import DataError
from gam.pda.libraries import need
from gam.pda.models import is_server
from gam.pda.models.local import LIBRARIES, find_config
from gam.pda.prompts import Prompt, truths_of


def check_models(models: Mapping[str, str]) -> None:
    """Check that models are there, as far as that can be told without loading them.

    Args:
        models: What a model is for, for the message, to its name.

    Raises:
        DataError: A folder holds no model, or a name is none on the Hub.
    """
    known: set[str] = set()
    for role, source in models.items():
        if source in known or is_server(source):
            continue
        known.add(source)
        need(*LIBRARIES)
        if Path(source).is_dir():
            if not (Path(source) / "config.json").is_file():
                raise DataError(f"{role}: the folder {source!r} holds no model: no config.json.")
        elif Path(source).exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(@.+)?", source):
            raise DataError(f"{role}: got {source!r}, expected the folder of a model, or its name.")
        else:
            find_config(source, role)


def check_questions(questions: list[Prompt], source: str) -> list[Prompt]:
    """Return questions that all have an answer.

    Raises:
        DataError: One has none.
    """
    for question in questions:
        try:
            truths_of(question)
        except DataError as error:
            raise DataError(f"{source!r}: {error}") from None
    return questions


def check_chats(asked: Iterable[Sequence[Prompt]]) -> None:
    """Check that what chats need is installed, where there are any."""
    if any(not isinstance(prompt.text, str) for prompts in asked for prompt in prompts):
        need("jinja2")


def check_folder(folder: Path) -> None:
    """Make a folder, and check that it can be written.

    Raises:
        OutputError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write in the folder {str(folder)!r}: {reason}.") from None

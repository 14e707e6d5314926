"""Prompts: what the models are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from gam.errors import OptionError
from gam.pda.files import DataError, Row, read_rows
from gam.pda.libraries import need
from gam.pda.provenance import digest
from gam.pda.settings import check_settings, setting

Text = str | tuple[dict[str, str], ...]
"""Plain text, or the messages of a chat."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and the name it goes by in every file.

    Attributes:
        id: The row's own ``id``, or a hash of the text; no two prompts of a set share it.
        text: Plain text, or messages of a chat, each with ``role`` and ``content``.
        row: The row that it came from.
    """

    id: str
    text: Text
    row: Row

    def __hash__(self) -> int:
        """Return a hash of the name."""
        return hash(self.id)


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are made of the rows of a file."""

    column: str = setting("prompt", "Field of the prompt: text, or messages of a chat.")
    chat: bool = setting(False, "Make a user's message of a text.")
    system: str = setting("", "A system message for chats.")
    limit: int = setting(0, "Only the first so many; 0 for all.", least=0)

    def __post_init__(self) -> None:
        """Check the values."""
        check_settings(self)


def load_prompts(
    source: str, *, column: str = "prompt", chat: bool = False, system: str = "", limit: int = 0
) -> list[Prompt]:
    """Return the prompts of a JSON-lines file or of a data set of the Hub.

    Args:
        source: A file, or a name that `datasets` loads: ``NAME[:CONFIG]:SPLIT``.
        column: Field that holds the prompt: text, or a list of messages.
        chat: Make a user's message of a plain text, so that the chat template is applied.
        system: Text of a system message to put first; needs messages.
        limit: Take only the first so many; 0 for all.

    Raises:
        DataError: A row has no prompt, or two rows have one name.
        OptionError: `datasets` is needed and missing, or ``system`` without messages.
    """
    rows = read_rows(source) if source.endswith((".jsonl", ".json")) else _from_hub(source)
    prompts: dict[str, Prompt] = {}
    for index, row in enumerate(rows[: limit or None]):
        where = f"{source!r}, row {index}"
        text = _text(row.get(column), where, column)
        if chat and isinstance(text, str):
            text = ({"role": "user", "content": text},)
        if system:
            if isinstance(text, str):
                raise OptionError(
                    f"{where}: got plain text, expected messages beside the system message. "
                    "Pass --chat, or set chat: true in a recipe."
                )
            text = ({"role": "system", "content": system}, *text)
        name = str(row["id"]) if "id" in row else digest(text)[:16]
        if name in prompts:
            if "id" not in row:
                continue  # the same question again
            raise DataError(f"{where}: the id {name!r} is that of an earlier row.")
        prompts[name] = Prompt(name, text, row)
    if not prompts:
        raise DataError(f"{source!r} holds no prompts.")
    return list(prompts.values())


def truths_of(question: Prompt) -> list[str]:
    """Return the right answers of a question; a `DataError` where there is none."""
    truth = question.row.get("answer")
    truths = [truth] if isinstance(truth, str | int | float) else truth
    if not isinstance(truths, list) or not truths:
        raise DataError(
            f"question {question.id!r}: 'answer': got {truth!r}, expected "
            "a text or a list of texts."
        )
    return [str(text) for text in truths]


class PromptFiles:
    """Prompts by their file, each file read once.

    Args:
        settings: Of all the prompts.
    """

    def __init__(self, settings: PromptSettings) -> None:
        """Read nothing yet."""
        self.settings = settings
        self._known: dict[str, list[Prompt]] = {}

    def load(self, source: str) -> list[Prompt]:
        """Return the prompts of a file or data set; see `load_prompts`."""
        if source not in self._known:
            self._known[source] = load_prompts(source, **asdict(self.settings))
        return self._known[source]


def _text(value: object, where: str, column: str) -> Text:
    if isinstance(value, str) and value:
        return value
    if (
        isinstance(value, Sequence)
        and value
        and all(
            isinstance(m, dict) and {*m} >= {"role", "content"} and isinstance(m["content"], str)
            for m in value
        )
    ):
        return tuple({"role": m["role"], "content": m["content"]} for m in value)
    raise DataError(f"{where}: {column!r} is {value!r}, expected text or a list of messages.")


def _from_hub(source: str) -> list[Row]:
    need("datasets")
    import datasets

    name, *rest = source.split(":")
    if len(rest) not in (1, 2):
        raise OptionError(
            f"prompts {source!r}: expected a .jsonl file, or NAME:SPLIT or NAME:CONFIG:SPLIT."
        )
    *config, split = rest
    try:
        return list(datasets.load_dataset(name, *config, split=split))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"cannot load the data set {source!r}: {reason}.") from error

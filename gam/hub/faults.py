"""What can go wrong between the client and the Hub, in one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from gam.errors import AdapterError, GamError, one_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_T = TypeVar("_T")


def ask(
    what: str,
    work: Callable[[], _T],
    error_type: type[GamError] = AdapterError,
    hint: str = "",
) -> _T:
    """Run code on the client, its errors as one line of ours.

    Args:
        what: What the line begins with.
        work: The code; errors of ours pass as they are.
        error_type: What to raise.
        hint: What the line ends with.

    Returns:
        What the code returns.

    Raises:
        GamError: The client has raised; the token is not in it, nor in its causes.
    """
    from huggingface_hub import constants

    try:
        _ = urlsplit(constants.ENDPOINT).port  # ValueError; the client's own is not public
        return work()
    except GamError:
        raise
    except faults() as caught:
        fault = _describe(caught)
    # Raised here and not above: the client's error holds the request, and that the token.
    raise error_type(f"{what}: {fault} {hint}".strip())


def faults() -> tuple[type[Exception], ...]:
    """Return what the client raises when a request or its answer goes wrong."""
    from huggingface_hub.errors import HfHubHTTPError

    # The bases are those of the HTTP library's errors, whichever one this version uses.
    # RuntimeError is around errors of uploads; the last two are raised by an answer of which
    # the client can make nothing.
    return (*HfHubHTTPError.__bases__, OSError, RuntimeError, ValueError, LookupError)


def is_unreachable(error: Exception) -> bool:
    """Tell whether a fault is of the network or of the Hub, not of the request."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return not isinstance(error, HFValidationError)


def _describe(error: Exception) -> str:
    """Return what went wrong and what to do, on one line and without the token."""
    from huggingface_hub import constants, errors, get_token

    answers, missing = errors.HfHubHTTPError, errors.LocalEntryNotFoundError
    # Before version 1.0 what is missing in the cache was also an answer of the Hub.
    while isinstance(error.__cause__, faults()) and (
        isinstance(error, missing) or not isinstance(error, answers)
    ):
        error = error.__cause__
    said, token = one_line(error).rstrip("."), get_token()
    if isinstance(error, (errors.OfflineModeIsEnabled, missing)):
        text = "not in the cache, and offline mode is on. Unset HF_HUB_OFFLINE to download it."
    elif isinstance(error, answers):
        text = _describe_status(error, token is not None)
    elif isinstance(error, errors.HFValidationError):
        text = "no such file or folder, and not a valid name of a repository (user/name)."
    elif isinstance(error, OSError) and error.strerror and error.errno:
        place = error.filename or constants.HF_HUB_CACHE
        text = f"cannot write {place!r}: {error.strerror}. Free space there, or set HF_HOME."
    elif isinstance(error, answers.__bases__):
        text = (
            f"cannot reach {constants.ENDPOINT} ({type(error).__name__}: {said}). "
            "Check the connection, the proxy and HF_ENDPOINT, and try again."
        )
    else:
        text = f"{constants.ENDPOINT} does not answer as a Hub does ({said}). Check HF_ENDPOINT."
    return text.replace(token, "<token>") if token else text


def _describe_status(error: HfHubHTTPError, logged_in: bool) -> str:
    from huggingface_hub import constants, errors

    status, said = error.response.status_code, " ".join((error.server_message or "").split())[:200]
    said = f": {said}" if said else ""
    login = f"Run `hf auth login`{' with a token that may' if logged_in else ' to'}"
    if isinstance(error, errors.GatedRepoError):
        page = f"its page at {constants.ENDPOINT}"
        return f"the repository is gated. Ask for access on {page}. {login} read it."
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such branch, tag or commit. Check what follows the @."
    if isinstance(error, errors.EntryNotFoundError):
        return f"a file is missing in the repository{said}. Try again."
    if status == 401 and logged_in and not isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub does not accept the login{said}. Run `hf auth login`, or correct HF_TOKEN."
    if status in (401, 404):
        return (
            "no such repository on the Hub, unless it is private, nor a local path of that name. "
            f"Check the name. {login} see a private one."
        )
    if status == 403:
        return f"the login may not do this{said}. {login} do this."
    if status in (409, 412):
        return f"somebody else is changing the repository{said}. Try again."
    if status == 429 or status >= 500:
        return f"the Hub has trouble (status {status}{said}). Try again later."
    return f"the Hub refuses (status {status}{said})."

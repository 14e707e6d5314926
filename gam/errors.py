"""What can go wrong, as the user sees it.

Every text is one line: ``what, where: got X, expected Y. What to do.`` A command to copy may
stand at its end, without a period.
"""


class GamError(Exception):
    """Base of every error that gam raises on purpose; its text is one line."""


class AdapterError(GamError, ValueError):
    """An adapter cannot be read, or holds something that cannot be merged."""


class OptionError(GamError, ValueError):
    """An option is unknown, malformed, or does not fit the adapters.

    Attributes:
        path: Where it stands among the options, such as ("modules", "*.mlp.*", "rank").
    """

    def __init__(self, text: str, *path: str) -> None:
        """Make the error of the option at ``path``."""
        super().__init__(text)
        self.path = path


class OutputError(GamError, OSError):
    """The result cannot be written."""


class PluginError(GamError, ImportError):
    """A method that another package brings cannot be used."""


def one_line(error: BaseException) -> str:
    """Return the text of any error without line breaks."""
    return " ".join(str(error).split())

"""YAML or JSON text as plain values, with the line where each one stands."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from gam.errors import OptionError
from gam.files import one_line

if TYPE_CHECKING:
    from yaml import Node, ScalarNode

KeyPath: TypeAlias = tuple[str, ...]
"""The keys on the way to a value."""

# The scalars of YAML 1.2, which are those of JSON: "no" is text and 1e-3 is a number, unlike
# in the YAML 1.1 that PyYAML implements.
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_WHOLE = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_STANDARD = "tag:yaml.org,2002:"


def parse(text: str, where: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the value of a document, and the lines of what is in its mappings.

    Args:
        text: YAML 1.2 without tags; JSON is part of that.
        where: What to call the document in messages.

    Returns:
        Mappings, lists, text, numbers, True, False and None; and, for the path of each key,
        its line from 1.

    Raises:
        OptionError: The text is no such document, or a key is given twice.
    """
    import yaml

    try:
        # Not the loader in C, which deep nesting can crash.
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[KeyPath, int] = {}
        return (None if node is None else _Reader(where, lines).read(node, ())), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise OptionError(f"{where}{line}: not YAML: {error.problem or error.context}.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise OptionError(f"{where}: not YAML: {one_line(error)}.") from None


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """Return the line of a key, or of what it is in where an alias stands for that."""
    return next(lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines)


class _Reader:
    """Turns nodes into values. A node that has several aliases is read once."""

    def __init__(self, where: str, lines: dict[KeyPath, int]) -> None:
        self._where = where
        self._lines = lines
        self._known: dict[int, Any] = {}
        self._open: set[int] = set()

    def read(self, node: Node, path: KeyPath) -> Any:
        import yaml

        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self._open:
            raise self._error(node, "an alias inside of what it stands for")
        if id(node) not in self._known:
            self._open.add(id(node))
            if isinstance(node, yaml.MappingNode):
                self._known[id(node)] = self._mapping(node, path)
            else:
                self._check_tag(node, "seq")
                self._known[id(node)] = [self.read(item, path) for item in node.value]
            self._open.remove(id(node))
        return self._known[id(node)]

    def _mapping(self, node: Node, path: KeyPath) -> dict[str, Any]:
        self._check_tag(node, "map")
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node.value, str):
                raise self._error(key_node, "a key that is not text")
            key = _joined(key_node.value)
            if key in values:
                raise self._error(key_node, f"{key!r} is given twice")
            place = (*path, key)
            self._lines[place] = key_node.start_mark.line + 1
            values[key] = self.read(value_node, place)
        return values

    def _scalar(self, node: ScalarNode) -> Any:
        text: str = node.value
        if not node.tag.startswith(_STANDARD):
            raise self._error(node, f"tag {node.tag!r} is not supported")
        if node.style is not None:
            return _joined(text)
        if text in _WORDS:
            return _WORDS[text]
        if text in _SPECIAL:
            return _SPECIAL[text]
        if _WHOLE.fullmatch(text) and len(text) < 400:
            return int(text)
        return float(text) if _NUMBER.fullmatch(text) else text

    def _check_tag(self, node: Node, kind: str) -> None:
        if node.tag != _STANDARD + kind:
            raise self._error(node, f"tag {node.tag!r} is not supported")

    def _error(self, node: Node, what: str) -> OptionError:
        return OptionError(f"{self._where}, line {node.start_mark.line + 1}: {what}.")


def _joined(text: str) -> str:
    """Join the halves of characters that JSON writes as two escapes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

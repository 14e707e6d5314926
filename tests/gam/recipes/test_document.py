"""YAML and JSON as plain values with lines."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gam.errors import OptionError
from gam.recipes.document import parse

# YAML has no control characters, and breaks lines at the separators.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Zl", "Zp"]), max_size=6)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_json_means_what_it_means_to_json(value: object) -> None:
    for options in ({}, {"indent": 2}, {"ensure_ascii": False}):
        found, _ = parse(json.dumps(value, **options), "x")
        assert repr(found) == repr(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-1E5", -1e5),
        (".5", 0.5),
        ("3.", 3.0),
        ("+7", 7),
        ("007", 7),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        (".inf", math.inf),
        ("no", "no"),
        ("off", "off"),
        ("True", "True"),
        ("'true'", "true"),
        ('"1"', "1"),
        ("~", None),
        ("", None),
        ("9" * 5000, "9" * 5000),
        ("|\n  a\n  b\n", "a\nb\n"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    if value == "9" * 5000:
        assert parse(text, "x")[0] == math.inf  # refused by whoever wants a number
    else:
        assert parse(text, "x")[0] == value


def test_lines() -> None:
    text = "# a comment\na: 1\n\nb:\n  c: [1, 2]\n  'd e':\n    f: x\n"
    value, lines = parse(text, "x")
    assert value == {"a": 1, "b": {"c": [1, 2], "d e": {"f": "x"}}}
    assert lines == {("a",): 2, ("b",): 4, ("b", "c"): 5, ("b", "d e"): 6, ("b", "d e", "f"): 7}


def test_lines_of_json() -> None:
    value, lines = parse('{\n "a": {"b": 1},\n\n "c": [\n{"d": 2}]}', "x")
    assert value == {"a": {"b": 1}, "c": [{"d": 2}]}
    assert lines == {("a",): 2, ("a", "b"): 2, ("c",): 4, ("c", "d"): 5}


def test_an_anchor_stands_for_the_same_value() -> None:
    value, _ = parse("a: &x {b: 1}\nc: *x\nd: [*x, *x]\n", "x")
    assert value == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}, {"b": 1}]}


def test_aliases_of_aliases_do_not_multiply() -> None:
    rows = ["a0: &a0 [x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 60)]
    assert set(parse("\n".join(rows), "x")[0]) == {f"a{n}" for n in range(60)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "r.yaml, line 2: 'a' is given twice"),
        ("m:\n  '*': {}\n  \"*\": {}\n", "r.yaml, line 3: '*' is given twice"),
        ("a: 1\n[x]: 2\n", "r.yaml, line 2: a key that is not text"),
        ("a: 1\nb: !!python/object:os.system {}\n", "r.yaml, line 2: tag 'tag:yaml.org,2002:pyth"),
        ("a: !secret b", "r.yaml, line 1: tag '!secret' is not supported"),
        ("a: &x\n  b: *x\n", "r.yaml, line 1: an alias inside of what it stands for"),
        ("a: [1\nb: 2\n", "r.yaml, line 2: not YAML: "),
        ("a: *x\n", "r.yaml, line 1: not YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "r.yaml, line 2: not YAML: but found another document"),
        ("a:\n\t- b\n", "r.yaml, line 2: not YAML: found character"),
        ("a: \x00", "r.yaml: not YAML: "),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(text, "r.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(OptionError, match=r"r\.yaml: not YAML"):
        parse("[" * 100_000, "r.yaml")

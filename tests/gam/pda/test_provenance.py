"""Hashes of contents, and folders that are claimed by what their work is made from."""

import json
from pathlib import Path

from helpers.adapters import assert_refused

from gam.errors import OptionError
from gam.pda.files import write_rows
from gam.pda.provenance import claim, content_digest, digest


def test_digests_see_contents_and_not_order(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": [2]}) == digest(json.loads('{"b": [2], "a": 1}'))
    assert digest({"a": 1}) != digest({"a": 1.5})
    for name, text in (("x", "1"), ("y", "1")):
        write_rows(tmp_path / name / "rows.jsonl", [{"text": text}])
        (tmp_path / name / "README.md").write_text(name)
    assert content_digest(tmp_path / "x") == content_digest(tmp_path / "y")
    write_rows(tmp_path / "y" / "rows.jsonl", [{"text": "2"}])
    assert content_digest(tmp_path / "x") != content_digest(tmp_path / "y")
    assert content_digest("user/name") == "user/name"


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    claim(tmp_path, {"seed": 1, "shape": (2, 3)})
    claim(tmp_path, {"seed": 1, "shape": (2, 3)})
    assert_refused(
        lambda: claim(tmp_path, {"seed": 2, "shape": (2, 3)}), OptionError, "seed", "other inputs"
    )

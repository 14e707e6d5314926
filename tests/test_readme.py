"""What the README shows is what happens."""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.adapters import quiet_peft
from helpers.paths import ROOT

from gam.commands import inspect as inspect_cli
from gam.commands.merge import main

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def block(language: str, holding: str) -> str:
    (text,) = [text for kind, text in BLOCKS if kind == language and holding in text]
    return text


def test_the_first_command_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = block("bash", "&& .venv/bin/gam-merge ").partition("&& .venv/bin/gam-merge ")[2]
    words = shlex.split(command.partition("&&")[0])
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0
    assert result.stdout == block("text", "Wrote merged")
    assert result.stderr == block("text", "Warning: ")


def test_the_inspection_prints_what_is_shown() -> None:
    words = shlex.split(block("bash", "gam-inspect"))[1:]
    result = CliRunner().invoke(inspect_cli.main, [str(ROOT / word) for word in words])
    assert (result.exit_code, result.stderr) == (0, "")
    assert block("text", "updates ") in result.stdout
    assert result.stdout.endswith(block("text", "try first"))


def test_the_python_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block("python", "merge_adapters"), names)
    assert (tmp_path / "merged-again" / "README.md").exists()
    assert "'reverse': " in capsys.readouterr().out
    assert isinstance(names["merged"], type(names["adapter"]))
    (tmp_path / "merged-again").rename(tmp_path / "merged")
    with quiet_peft():
        exec(block("python", "PeftModel"), names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"


def test_the_recipe_is_followed_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "recipe.yaml").write_text(block("yaml", "adapters:"))
    monkeypatch.chdir(tmp_path)
    for command in (block("bash", "recipe.yaml"), block("bash", "gam_merge.json")):
        result = CliRunner().invoke(main, shlex.split(command)[1:])
        assert result.exit_code == 0, result.stderr
    first, second = tmp_path / "merged-by-recipe", tmp_path / "merged-once-more"
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    modules = json.loads((first / "gam_merge.json").read_text())["modules"]
    assert {module["settings"].get("method") for module in modules} == {None, "ties"}


def test_links_point_to_files() -> None:
    targets = re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text())
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target

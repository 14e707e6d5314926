"""Every command and snippet of every README does what it shows, in a copy of what a clone has."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from helpers.method_table import BEGIN, END, table
from helpers.paths import PACKAGES, ROOT

FOLDERS = ("benchmarks", "examples", "gam", "kernels", "tests")
PAGES = [
    Path("README.md"),
    *sorted(
        page.relative_to(ROOT) for folder in FOLDERS for page in (ROOT / folder).rglob("README.md")
    ),
]
SCRIPTS = dict(
    re.findall(r'^(gam-\w+) = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
)
NEEDED = {  # commands that are not run here, and why; their options are checked all the same
    r"python3 -m venv |(.venv/bin/)?pip install ": "fetches packages from the network",
    r".venv/bin/pytest": "runs these tests",
    r"gam-merge .*--push-to-hub ": "talks to the Hub",
    r".*/make_world.py .*": "trains models for ten minutes",
    r"(.venv/bin/)?gam-pda (run|pairs|train|evaluate|harness) .*": "needs models and minutes",
    r".*/run.py .*--model qwen3-8b|.*/run.py .*--peft": "takes minutes to hours",
    r".*/ops.py .*--model qwen3-8b": "takes minutes",
    r".*/ops.py .*--device cuda|.*/run.py .*--device cuda": "needs a GPU",
}
LANGUAGES = {"bash", "python", "text", "toml", "yaml"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the language and the text of every block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S)


def commands(block: str) -> list[str]:
    """Return the single commands of a block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def is_left_out(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in NEEDED)


class Clone:
    """A copy of what a clone holds and a README uses, with the commands as an environment has."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.printed = folder, ""
        for name in ("benchmarks", "examples", "README.md"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, folder / name)
        (folder / "world-0").mkdir()  # of a step that is left out
        (folder / "world-0" / "run.yaml").touch()
        binaries = folder / ".venv" / "bin"
        binaries.mkdir(parents=True)
        calls = {"python": "exec {python} "}
        for name, place in SCRIPTS.items():
            module, _, function = place.partition(":")
            code = f"import sys, {module}; sys.argv[0] = '{name}'; {module}.{function}()"
            calls[name] = f"exec {{python}} -c {shlex.quote(code)} "
        for name, call in calls.items():
            text = call.format(python=shlex.quote(sys.executable))
            (binaries / name).write_text(f'#!/bin/sh\n{text}"$@"\n')
            (binaries / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(binaries), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(PACKAGES),
            "HF_HUB_OFFLINE": "1",
        }
        # With it, a script cannot import the module beside it.
        self.environment.pop("PYTHONSAFEPATH", None)

    def run(self, *words: str) -> None:
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            encoding="utf-8",
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{words[-1]}\n{done.stdout}\n{done.stderr}"
        self.printed += done.stdout


def assert_options_exist(command: str, clone: Clone) -> None:
    """Assert that a command that is not run would understand its options."""
    program, *words = shlex.split(command.replace(".venv/bin/", ""))
    if program in SCRIPTS:
        module, _, function = SCRIPTS[program].partition(":")
        found = getattr(importlib.import_module(module), function.partition(".")[0])
        if isinstance(found, click.Group):
            found = found.commands[words.pop(0)]
        found.make_context(program, words)
    elif program == "python":
        clone.printed = ""
        clone.run("python", words[0], "--help")
        for word in words[1:]:
            assert not word.startswith("--") or word in clone.printed


def assert_is_printed(shown: str, printed: str) -> None:
    """Assert that lines were printed in this order; scores (±) may differ by half a point."""
    if shown in printed:
        return
    assert "±" in shown, f"shown:\n{shown}\nprinted:\n{printed}"
    wanted = [line.split() for line in shown.splitlines()]
    found = [line.split() for line in printed.splitlines()]
    starts = range(len(found) - len(wanted) + 1)
    assert any(
        all(map(is_alike, wanted, found[start : start + len(wanted)])) for start in starts
    ), f"shown:\n{shown}\nprinted:\n{printed}"


def is_alike(wanted: list[str], found: list[str]) -> bool:
    def close(one: str, other: str) -> bool:
        try:
            return abs(float(one) - float(other)) <= 0.5
        except ValueError:
            return one == other

    return len(wanted) == len(found) and all(map(close, wanted, found))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_what_a_page_shows_happens(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clone = Clone(tmp_path)
    for language, text in blocks(page):
        assert language in LANGUAGES, text
        if language == "bash":
            wanted = [command for command in commands(text) if not is_left_out(command)]
            for command in commands(text):
                if is_left_out(command):
                    assert_options_exist(command, clone)
            clone.printed = "" if wanted else clone.printed
            if wanted:
                clone.run("bash", "-euo", "pipefail", "-c", "\n".join(wanted))
        elif language == "python":
            clone.run("python", "-c", text)
        elif language == "text":
            assert_is_printed(text, clone.printed)


def test_the_recipe_is_the_file() -> None:
    (recipe,) = [text for language, text in blocks(Path("README.md")) if language == "yaml"]
    assert recipe == (ROOT / "examples" / "recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_settings_are_well_formed(page: Path) -> None:
    points = (ROOT / "tests/example_plugin/gam_halves-1.0.dist-info/entry_points.txt").read_text()
    for language, text in blocks(page):
        if language == "yaml":
            assert isinstance(yaml.safe_load(text), dict)
        elif language == "toml":  # the entry point of the example, as pyproject.toml spells it
            head, *entries = text.splitlines()
            assert head == '[project.entry-points."gam.strategies"]'
            assert all(entry.replace('"', "") in points for entry in entries if entry)


def test_the_methods_are_those_of_the_catalogue() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table()


def test_the_first_page_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 11_000


def test_what_is_left_out_is_in_a_readme() -> None:
    found = [
        c for page in PAGES for lang, text in blocks(page) if lang == "bash" for c in commands(text)
    ]
    unused = [p for p in NEEDED if not any(re.match(p, command) for command in found)]
    assert unused == []

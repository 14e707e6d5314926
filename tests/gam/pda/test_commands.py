"""The command line of the loop: what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.pda import read_lines, sums, write_lines, write_model

from gam.pda.commands import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    for seed, name in enumerate(("student", "weak", "weaker")):
        write_model(folder / name, seed)
    write_lines(folder / "prompts.jsonl", sums(24))
    return folder


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr."""
    found = CliRunner().invoke(main, [*words])
    return found.exit_code, found.stdout, found.stderr


def test_pairs_then_train(folder: Path) -> None:
    models = ["--weak", str(folder / "weak"), "--weaker", str(folder / "weaker")]
    words = ["pairs", str(folder / "prompts.jsonl"), *models, "-o", str(folder / "pairs")]
    code, out, err = run(folder, *words, "--max-new-tokens", "3", "--temperature", "1")
    assert code == 0, err
    count = len(read_lines(folder / "pairs" / "pairs.jsonl"))
    lines = out.splitlines()
    assert lines[0].endswith(f"pairs.jsonl: {count} pairs of 24 prompts")
    assert lines[2] == f"identical answers, dropped   {24 - count}"
    assert lines[-3].split()[:2] == ["answers", "mean"]

    words = ["train", str(folder / "student"), str(folder / "pairs" / "pairs.jsonl")]
    words += ["-o", str(folder / "adapter"), "--rank", "2", "--batch-size", "8"]
    code, out, err = run(folder, *words, "--max-length", "16", "--dropout", "0")
    assert code == 0, err
    steps = count // 8
    assert out.startswith(f"Wrote {folder / 'adapter'}: dpo, {steps} steps on {8 * steps} pairs")

    words = ["evaluate", str(folder / "student"), str(folder / "prompts.jsonl")]
    words += ["--adapter", str(folder / "adapter"), "--max-new-tokens", "3"]
    code, out, err = run(folder, *words)
    assert code == 0, err
    first, second, third, _, *explained = out.splitlines()
    assert explained[0].startswith("±: standard error over the 24 questions.")
    assert first.split("  ")[0] == ""
    assert second.startswith(str(folder / "student"))
    assert third.startswith(str(folder / "adapter"))


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["train", "s", "no.jsonl", "-o", "o"], 2, "'no.jsonl' does not exist"),
        (["pairs", "no.jsonl", "--weak", "a", "--weaker", "b", "-o", "o"], 1, "cannot read"),
        (["pairs", "p", "--weak", "a", "--weaker", "b"], 2, "Missing option '-o'"),
        (["evaluate", "m", "q.jsonl", "--chat-template", "[1]"], 2, "is not a JSON object"),
        (["evaluate", "m", "q.jsonl", "--top-p", "0"], 2, "top_p"),
        (["run", "no.yaml"], 2, "'no.yaml' does not exist"),
    ],
)
def test_refusals(
    words: list[str], code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    found, out, err = run(tmp_path, *words)
    assert (found, out) == (code, "")
    assert text in err
    assert "Traceback" not in err


def test_json_is_one_object(folder: Path) -> None:
    words = ["evaluate", str(folder / "student"), str(folder / "prompts.jsonl"), "--json"]
    code, out, err = run(folder, *words, "--max-new-tokens", "2", "--limit", "5")
    assert code == 0, err
    (row,) = json.loads(out)
    assert row["questions"] == 5


@pytest.mark.parametrize("command", ["", "pairs", "train", "evaluate", "harness", "run"])
def test_both_flags_of_the_help(command: str, folder: Path) -> None:
    short, long = (run(folder, *command.split(), flag) for flag in ("-h", "--help"))
    assert short == long
    assert short[0] == 0
    assert "-h, --help" in short[1]

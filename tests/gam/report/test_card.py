"""The model card: what the Hub reads, what a person reads, and the command in it."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.paths import ROOT
from huggingface_hub import ModelCard

from gam import Adapter, merge_adapters
from gam.commands.merge import main
from gam.report import card

ADAPTERS = ROOT / "examples" / "adapters"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATHS = [ADAPTERS / name for name in ("reverse", "sort", "rotate")]


def front_matter(text: str) -> dict[str, Any]:
    head, opening, body = text.split("---\n", 2)
    assert head == ""
    assert body.startswith("\n# ")
    return yaml.safe_load(opening)


def from_hub(merged: Adapter, base: str | None, repos: Sequence[str]) -> Adapter:
    """Return a merge as if its first adapters had come from the Hub."""
    hub = [{"source": f"{repo}@{COMMIT}:x y", "commit": COMMIT} for repo in repos]
    kept = [{} for _ in merged.report.inputs[len(repos) :]]
    inputs = [
        dataclasses.replace(entry, **new)
        for entry, new in zip(merged.report.inputs, [*hub, *kept], strict=True)
    ]
    report = dataclasses.replace(merged.report, inputs=inputs)
    return dataclasses.replace(merged, config={"base_model_name_or_path": base}, report=report)


def command(text: str) -> list[str]:
    block = text.split("```bash\n")[1].split("\n```")[0]
    return shlex.split(block)


def test_front_matter() -> None:
    text = card.model_card(merge_adapters(PATHS))
    assert front_matter(text) == {
        "base_model": "gam-merge/tiny-llama",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "peft", "merge", "gam-merge", "gam"],
    }


@pytest.mark.parametrize("base", ["/home/me/model", "a/b/c", "C:\\x", "a b", "x\ny: 1", None, ""])
def test_a_base_that_is_no_repository_stays_out_of_the_front_matter(base: str | None) -> None:
    merged = merge_adapters(PATHS[:1])
    merged = dataclasses.replace(merged, config={"base_model_name_or_path": base})
    assert "base_model" not in front_matter(card.model_card(merged))


@pytest.mark.parametrize("base", ["true", "1.5", "null", "org/na-me_2.5"])
def test_a_base_stays_text_in_yaml(base: str) -> None:
    merged = dataclasses.replace(
        merge_adapters(PATHS[:1]), config={"base_model_name_or_path": base}
    )
    assert front_matter(card.model_card(merged))["base_model"] == base


def test_the_front_matter_is_what_the_client_would_write() -> None:
    merged = merge_adapters(PATHS)
    for base in ("gam-merge/tiny-llama", "01-ai/Yi-6B", "gpt2", None):
        for repos in ([], ["me/a"], ["me/a", "me/b", "me/a"]):
            text = card.model_card(from_hub(merged, base, repos))
            assert str(ModelCard(text)) == text


def test_adapters_on_the_hub_are_linked() -> None:
    text = card.model_card(from_hub(merge_adapters(PATHS), "org/base", ["me/a", "me/b", "me/a"]))
    assert front_matter(text)["base_model"] == ["org/base", "me/a", "me/b"]
    assert "[`org/base`](https://huggingface.co/org/base)" in text
    link = f"[`me/a:x y`](https://huggingface.co/me/a/tree/{COMMIT}/x%20y) at `{COMMIT[:12]}`"
    assert text.count(link) == 2
    assert f"'me/a@{COMMIT}:x y' 'me/b@{COMMIT}:x y'" in text


def test_the_table_has_every_module() -> None:
    merged = merge_adapters(PATHS)
    text = card.model_card(merged)
    table = text.split("| Modules | Count |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]
    assert sum(int(row[1]) for row in cells) == len(merged.modules)
    kinds = {name.rpartition(".")[2] for name in merged.modules}
    assert [row[0] for row in cells] == [f"`{kind}`" for kind in sorted(kinds)]


def test_text_has_no_paths_and_is_the_same_each_time() -> None:
    text = card.model_card(merge_adapters(PATHS))
    assert text == card.model_card(merge_adapters(PATHS))
    assert str(ADAPTERS) not in text
    row = "| `reverse` | 0.3333 | 14 | 8 | SHA-256 `"
    assert row in text
    assert "arXiv 2606.00357" in text
    assert "AutoModelForCausalLM" in text
    assert "--max-lora-rank 16" in text
    assert "## Warnings" in text


def test_no_warnings_no_heading() -> None:
    assert "## Warnings" not in card.model_card(merge_adapters(PATHS[:1]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "linear", "weights": [0.1, 0, -0.7], "normalize": False, "scale": 1.5},
        {"method": "ties", "density": 0.3, "rank": "sum", "uniform_rank": True},
        {"reference": "sort", "size": "mean", "missing": "renormalize", "dtype": "bfloat16"},
    ],
    ids=["default", "linear", "ties", "gam"],
)
def test_the_command_gives_the_same_tensors(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_adapters(PATHS, output=tmp_path / "first", **options)
    words = command((tmp_path / "first" / "README.md").read_text())
    words = [str(tmp_path / "second") if word == "OUT" else word for word in words]
    monkeypatch.chdir(ADAPTERS)  # so that labels are paths
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, result.stderr
    first, second = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")
    )
    assert first == second


def test_the_command_for_options_of_modules_gives_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"*.mlp.*": {"rank": 3}, "*.q_proj": {"method": "ties"}}
    merge_adapters(PATHS, output=tmp_path / "first", modules=modules)
    text = (tmp_path / "first" / "README.md").read_text()
    assert "Single modules were merged by `ties` (Yadav et al. 2023, " in text
    words = command(text)
    monkeypatch.chdir(tmp_path / "first")
    words = ["../second" if word == "OUT" else word for word in words]
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, result.stderr
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


@pytest.mark.parametrize("name", ["a|b", "a`b", "a\nb", "\udcff", "\x1b[31m"])
def test_odd_names_break_neither_the_table_nor_the_encoding(name: str) -> None:
    merged = merge_adapters(PATHS[:1])
    inputs = [dataclasses.replace(merged.report.inputs[0], name=name)]
    report = dataclasses.replace(merged.report, inputs=inputs)
    text = card.model_card(dataclasses.replace(merged, report=report))
    text.encode()
    (row,) = [line for line in text.splitlines() if " | 1 | 14 | 8 | " in line]
    assert row.replace("\\|", "").count("|") == 7
    assert "\x1b" not in text


def test_a_zero_merge_has_a_card() -> None:
    adapter = merge_adapters(PATHS[:1])
    zero = {
        name: dataclasses.replace(module, lora_b=module.lora_b * 0)
        for name, module in adapter.modules.items()
    }
    merged = merge_adapters([dataclasses.replace(adapter, modules=zero, report=None)])
    assert "undefined" in card.model_card(merged)

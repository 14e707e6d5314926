"""`gam-inspect` as a user meets it: what it prints, writes and refuses."""

import json
import math
import re
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from helpers.adapters import MODULES, make_adapter
from helpers.paths import ROOT

import gam
from gam import inspect_adapters
from gam.commands.inspect import main

ADAPTERS = [str(ROOT / "examples" / "adapters" / name) for name in ("reverse", "sort", "rotate")]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_help_has_headings_and_a_sentence_for_every_option() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert invoke("-h").stdout == result.stdout
    headings = re.findall(r"^(\w.*):$", result.stdout, re.MULTILINE)
    assert headings == ["Output", "What to accept", "What to show"]
    for param in main.params:
        if isinstance(param, click.Option):
            assert param.opts[0] in result.stdout
            assert param.help
            assert param.help.endswith(".")
    assert invoke("--version").stdout == f"gam-inspect {gam.__version__}\n"


def test_json_is_the_report_and_nothing_else() -> None:
    result = invoke(*ADAPTERS, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == inspect_adapters(ADAPTERS).as_dict()


def test_one_adapter_is_described(tmp_path: Path) -> None:
    make_adapter(tmp_path / "one", {"q": (6, 5, 2)}, alpha=2)
    lora = inspect_adapters([tmp_path / "one"])
    norm, effective = lora.adapters[0].norm, lora.adapters[0].effective_rank
    result = invoke(str(tmp_path / "one"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "adapter  modules  rank  effective rank   norm\n"
        f"one            1     2             {effective:.1f}  {norm:.4g}\n"
        "  effective rank: how many directions carry an update, mean over the modules.\n"
        "  norm: size of all its updates together; in an average the largest adapter counts most.\n"
    )


def test_many_layers_are_shown_in_bands(tmp_path: Path) -> None:
    modules = {f"model.layers.{layer}.q_proj": (6, 5, 2) for layer in range(20)}
    for seed in range(2):
        make_adapter(tmp_path / str(seed), modules, seed=seed)
    printed = invoke(str(tmp_path / "0"), str(tmp_path / "1")).stdout
    rows = printed.partition("\nlayers ")[2].partition("\n  Means")[0].partition("\n  above")[0]
    rows = rows.splitlines()[1:]
    assert [row.split()[0] for row in rows] == [
        "0-2",
        "3-5",
        "6-8",
        "9-11",
        "12-14",
        "15-17",
        "18-19",
    ]
    assert [row.split()[1] for row in rows] == ["3"] * 6 + ["2"]


def test_the_advice_is_last() -> None:
    advice = inspect_adapters(ADAPTERS).advice
    printed = invoke(*ADAPTERS).stdout.partition("What this means for a merge:\n")[2]
    words = [" ".join(line.split()) for line in ("\n" + printed).split("\n- ")[1:]]
    assert words == [" ".join(line.split()) for line in advice]


def test_progress_goes_by_modules_up_to_the_last(tmp_path: Path) -> None:
    modules = {f"model.layers.{layer}.q_proj": (6, 5, 2) for layer in range(50)}
    make_adapter(tmp_path / "one", modules)
    calls: list[tuple[int, int]] = []
    inspect_adapters([tmp_path / "one"], progress=lambda *call: calls.append(call))
    assert calls == [(16, 50), (32, 50), (48, 50), (50, 50)]


def test_sampled_signs_are_said_to_be_sampled(tmp_path: Path) -> None:
    for seed in range(2):
        make_adapter(tmp_path / str(seed), {"q": (400, 300, 2)}, seed=seed)
    folders = [str(tmp_path / str(seed)) for seed in range(2)]
    error = inspect_adapters(folders).pairs[0].sign_conflict_error
    assert error > 0
    assert f"(sampled, standard error {error:.1g} or less)" in invoke(*folders).stdout


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("png", b"\x89PNG\r\n"), ("pdf", b"%PDF-"), ("svg", b"<?xml")],
)
def test_a_picture_is_written(suffix: str, start: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"geometry.{suffix}"
    result = invoke(*ADAPTERS, "--plot", str(file))
    assert result.exit_code == 0
    assert result.stdout.endswith(f"\n\nWrote {file}\n")
    assert file.read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_picture_of_odd_adapters(tmp_path: Path) -> None:
    """One adapter; a name with a dollar sign; nothing in common; zeros; many pairs."""
    zero = {f"base_model.model.{name}.lora_B.weight": torch.zeros(8, 2) for name in ("q", "z.1.q")}
    small = {"q": (8, 6, 2), "z.1.q": (8, 6, 2)}
    folders = [make_adapter(tmp_path / f"a${seed}$", small, seed=seed) for seed in range(5)]
    folders.append(make_adapter(tmp_path / "other", {"k": (8, 6, 1)}))
    folders.append(make_adapter(tmp_path / "nothing", small, tensors=zero))
    for count, chosen in enumerate((folders, folders[:1], folders[4:6], folders[6:])):
        report = inspect_adapters(chosen)
        assert report.plot(tmp_path / f"{count}.png").stat().st_size > 1000


def test_a_picture_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_text("mine")
    result = invoke(ADAPTERS[0], "--plot", str(file))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"Error: plot '{file}': it is there already. Pass --overwrite, or choose another name.\n"
    )
    assert file.read_text() == "mine"
    assert invoke(ADAPTERS[0], "--plot", str(file), "--overwrite").exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (
            "a.gif",
            2,
            "Error: plot: got 'a.gif', expected a file name that ends in .png, .pdf or .svg. "
            "Choose another name.",
        ),
        (
            "no/a.png",
            1,
            "Error: plot 'no/a.png': the folder 'no' does not exist. Create it first.",
        ),
    ],
)
def test_a_place_that_will_not_do_is_refused_at_once(
    name: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("missing-adapter", "--plot", name)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.splitlines()[-1] == message


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke(ADAPTERS[0], "--plot", str(tmp_path / "a.png"))
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: plot: matplotlib is not installed. Run `pip install 'gam-merge[plot]'`, or leave "
        "--plot out.\n"
    )
    assert invoke(ADAPTERS[0]).exit_code == 0


def test_adapters_are_refused_as_in_a_merge(tmp_path: Path) -> None:
    broken = {next(iter(MODULES)): (6, 5, 2)}
    name = f"base_model.model.{next(iter(MODULES))}.lora_A.weight"
    make_adapter(tmp_path / "bad", broken, tensors={name: torch.full((2, 5), math.nan)})
    result = invoke(str(tmp_path / "bad"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "lora_A holds NaN or infinity" in result.stderr
    assert result.stderr.count("\n") == 1
    assert invoke().exit_code == 2

"""The command line: exact text, exit codes, and what is left on disk."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from helpers.paths import ROOT
from safetensors.torch import load_file

import gam
from gam import api
from gam.commands import merge as cli
from gam.merging.options import DEFAULTS, OPTIONS
from gam.strategies import STRATEGIES

ADAPTERS = ROOT / "examples" / "adapters"
REVERSE, SORT, ROTATE = (str(ADAPTERS / name) for name in ("reverse", "sort", "rotate"))
USAGE = "Usage: gam-merge [OPTIONS] ADAPTER...\nTry 'gam-merge --help' for help.\n\n"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Result:
    """Run `gam-merge` and fail on anything that would show as a traceback."""
    result = CliRunner().invoke(cli.main, arguments, prog_name="gam-merge", terminal_width=100)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_failed(result: Result, code: int, stderr: str) -> None:
    """Assert an exit code, the exact text on stderr, nothing on stdout and nothing on disk."""
    assert (result.exit_code, result.stderr, result.stdout) == (code, stderr, "")
    assert list(Path().iterdir()) == []


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


# --- help -----------------------------------------------------------------------------


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"gam-merge {gam.__version__}\n")


def test_help_has_headings_and_a_sentence_for_every_option() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    headings = re.findall(r"^(\w.*):$", result.stdout, re.MULTILINE)
    assert headings == [
        "Output",
        "How to merge",
        "Size and precision of the result",
        "What to accept",
        "The Hub",
        "What to show",
    ]
    assert "Examples:\n    gam-merge math-lora code-lora -o merged\n" in result.stdout
    for param in cli.main.params:
        if isinstance(param, click.Option):
            assert param.opts[0] in result.stdout
            assert param.help
            assert re.search(r"\.(  \[default: .*\])?$", param.help)


def test_flags_are_those_of_the_contract() -> None:
    flags = {flag for param in cli.main.params for flag in param.opts + param.secondary_opts}
    assert flags - {"adapters"} == {
        *("-o", "--output", "--overwrite", "--dry-run", "--method", "--weights", "--normalize"),
        *(
            "--no-normalize",
            "--scale",
            "--size",
            "--missing",
            "--calibrate",
            "--reference",
            "--density",
            "-p",
            "--rank",
        ),
        *("--uniform-rank", "--dtype", "--device", "--alpha"),
        *("--allow-base-mismatch", "--allow-pickle"),
        *("--config", "--allow-changes", "--seed"),
        *("--push-to-hub", "--private", "--revision", "--create-pr", "--commit-message"),
        *("--allow-foreign-repo", "--json", "--quiet", "--list-methods", "--version"),
    }


def test_defaults_are_those_of_the_python_function() -> None:
    wanted = {name: DEFAULTS[name] for name, option in OPTIONS.items() if option.flag}
    # What the command passes on; click has its own mark for "no default" before callbacks.
    context = cli.main.make_context("gam-merge", [SORT])
    assert {name: context.params[name] for name in wanted} == wanted


def test_list_methods() -> None:
    result = invoke("--list-methods")
    assert result.exit_code == 0
    for strategy in STRATEGIES.values():
        assert f"{strategy.name}:\n  {strategy.summary}\n" in result.stdout
        assert "".join(strategy.paper.split()) in "".join(result.stdout.split())
    assert "--reference NAME|INDEX|consensus" in result.stdout
    assert "-p retract=true|false" in result.stdout
    assert "Unless you say otherwise: --rank sum --size mean" in result.stdout
    assert "--density FLOAT from 0 to 1" in result.stdout
    shown = " ".join(invoke("--help").stdout.split())
    assert f"Merging method: {', '.join(STRATEGIES)}, or" in shown


# --- wrong usage ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'ADAPTER...'."),
        ([SORT], "Missing option '-o' / '--output' (or --dry-run)."),
        (
            [SORT, "-o", "out", "--weights", "1;2"],
            "Invalid value for '--weights': '1;2' is not a list of numbers such as 0.5,0.3,0.2.",
        ),
        (
            [SORT, "-o", "out", "--weights", "1,2"],
            "weights: got 2 for 1 adapters; give one number for each.",
        ),
        (
            [SORT, "-o", "out", "-p", "x"],
            "Invalid value for '-p': 'x' is not of the form NAME=VALUE.",
        ),
        (
            [SORT, "-o", "out", "-p", "uniform-rank=1"],
            "-p uniform_rank: this is an option. Give --uniform-rank.",
        ),
        (
            [SORT, "-o", "out", "-p", "retract=true", "-p", "retract=true"],
            "-p retract: the parameter is given twice.",
        ),
        (
            [SORT, "-o", "out", "--density", "0.5"],
            "method 'gam' has no parameter 'density'; its parameters: reference, retract.",
        ),
        (
            [SORT, "-o", "out", "--method", "ties", "--reference", "sort"],
            "method 'ties' has no parameter 'reference'; its parameters: density.",
        ),
        (
            [SORT, "-o", "out", "--method", "tie"],
            f"unknown method 'tie'; choose one of: {', '.join(STRATEGIES)}. Did you mean 'ties'?",
        ),
        (
            [SORT, ROTATE, "-o", "out", "--reference", "2"],
            "reference of method 'gam': got '2', expected an index from 0 to 1 or one of: "
            "sort, rotate, consensus.",
        ),
        (
            [SORT, "-o", "out", "--rank", "big"],
            "rank: got 'big', expected a whole number above 0, 'max', 'sum' or 'energy=X' with X "
            "above 0 and at most 1, such as energy=0.99.",
        ),
    ],
    ids=lambda value: " ".join(value[1:])[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_exits_2(arguments: list[str], message: str) -> None:
    assert_failed(invoke(*arguments), 2, f"{USAGE}Error: {message}\n")


# --- refused or failed ----------------------------------------------------------------


def test_a_missing_adapter_exits_1() -> None:
    assert_failed(
        invoke("nowhere", "-o", "out"),
        1,
        "Error: adapter 'nowhere': no such folder or file. Give the path of a PEFT adapter "
        "folder or a .safetensors file, or the name of an adapter on the Hub: "
        "user/name[@revision][:folder].\n",
    )


def test_an_existing_output_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke(SORT, "-o", "out", "--quiet").exit_code == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(api, "execute", raiser(AssertionError("read")))
        result = invoke(SORT, "-o", "out")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: output 'out': the folder exists. Pass --overwrite, or choose another one.\n"
    )
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    assert invoke(SORT, "-o", "out", "--overwrite", "--quiet").exit_code == 0


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
    ids=["python", "torch"],
)
def test_no_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "execute", raiser(error))
    assert_failed(
        invoke(SORT, "-o", "out"),
        1,
        "Error: not enough memory. Free some, or do less at a time.\n",
    )


def test_another_runtime_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "execute", raiser(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        invoke(SORT, "-o", "out")


def test_an_interrupt_leaves_one_line_and_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "execute", raiser(KeyboardInterrupt()))
    result = invoke(SORT, "-o", "out")
    assert (result.exit_code, result.stderr.strip(), result.stdout) == (1, "Aborted!", "")
    assert list(Path().iterdir()) == []


# --- a merge --------------------------------------------------------------------------


def test_merging_one_adapter_returns_it() -> None:
    result = invoke(SORT, "-o", "out", "--dtype", "float32")
    assert result.exit_code == 0
    assert result.stderr == ""
    size = Path("out/adapter_model.safetensors").stat().st_size / 1000
    assert result.stdout == (
        f"Wrote out: gam, 8 modules, rank 16, float32, {size:.3g} kB\n"
        "\n"
        "adapter  weight  modules  rank  cosine with result\n"
        "sort      1.000        8    16               1.000\n"
        "(cosine: how much of an adapter's direction is in the result: 1 all, 0 nothing, "
        "-1 the opposite)\n"
        "\n"
        "size           1.000 of the mean size of the adapters\n"
        "energy kept    100 % of the exact merge, at this rank\n"
        "rounding       below 0.001 % change from writing float32\n"
        "\n"
        "Next: score it on your own tasks beside each adapter; out/README.md shows how to "
        "load it.\n"
    )


def test_merging_three_adapters() -> None:
    result = invoke(REVERSE, SORT, ROTATE, "-o", "out", "--weights", "0.5,0.3,-0.2")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Wrote out: gam, 14 modules, rank 8-16, float32, ")
    assert [line.split()[:4] for line in lines[3:6]] == [
        ["reverse", "0.500", "14", "8"],
        ["sort", "0.300", "8", "16"],
        ["rotate", "-0.200", "12", "4-12"],
    ]
    assert all(line.startswith("Warning: ") for line in result.stderr.splitlines())
    assert "6 of 14 modules are held by only some of the adapters" in result.stderr
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "gam_merge.json",
    ]
    assert [path.name for path in Path().iterdir()] == ["out"]


def test_quiet_keeps_only_warnings() -> None:
    result = invoke(SORT, ROTATE, "-o", "out", "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("Warning: ")


def test_json_is_what_was_recorded_and_what_was_written() -> None:
    result = invoke(REVERSE, SORT, ROTATE, "-o", "out", "--json", "--method", "linear")
    assert result.exit_code == 0
    record = json.loads(result.stdout, parse_constant=raiser(AssertionError("not JSON")))
    assert record.pop("output") == str(Path("out").resolve())
    assert record == json.loads(Path("out/gam_merge.json").read_text())
    assert [entry["name"] for entry in record["inputs"]] == ["reverse", "sort", "rotate"]
    tensors = load_file("out/adapter_model.safetensors")
    for module in record["modules"]:
        lora_a, lora_b = (
            tensors[f"base_model.model.{module['name']}.lora_{side}.weight"].double()
            for side in "AB"
        )
        torch.testing.assert_close(
            (lora_b @ lora_a).norm().item(), module["norm"], rtol=1e-6, atol=0
        )


def test_options_reach_the_merge() -> None:
    arguments = [REVERSE, SORT, "-o", "out", "--json", "--weights", "2,-1", "--no-normalize"]
    arguments += ["--scale", "0.5", "--missing", "renormalize", "--rank", "4", "--uniform-rank"]
    arguments += ["--dtype", "bfloat16", "--reference", "1", "-p", "retract=true"]
    arguments += ["--size", "mean"]
    record = json.loads(invoke(*arguments).stdout)
    assert record["options"] == {
        "method": "gam",
        "weights": [2.0, -1.0],
        "normalize": False,
        "scale": 0.5,
        "size": "mean",
        "rank": "4",
        "uniform_rank": True,
        "missing": "renormalize",
        "calibrate": "none",
        "dtype": "bfloat16",
        "device": "auto",
        "alpha": None,
        "allow_pickle": False,
        "allow_base_mismatch": False,
        "reference": "sort",
        "retract": True,
    }
    assert {module["rank"] for module in record["modules"]} == {4}


# --- a dry run ------------------------------------------------------------------------


def test_dry_run() -> None:
    result = invoke(SORT, ROTATE, "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert list(Path().iterdir()) == []
    assert result.stdout == (
        "Plan: gam, 12 modules, bfloat16, about 46.6 kB; nothing written\n"
        "\n"
        "adapter  weight  modules  rank\n"
        "sort      0.500        8    16\n"
        "rotate    0.500       12  4-12\n"
        "\n"
        "modules                             shape  sort  rotate  result  count\n"
        "model.layers.*.mlp.down_proj     64 x 128     -      12      12      1\n"
        "model.layers.*.mlp.down_proj     64 x 128     -       8       8      1\n"
        "model.layers.*.mlp.up_proj       128 x 64     -       8       8      2\n"
        "model.layers.*.self_attn.k_proj   64 x 64    16       8      16      2\n"
        "model.layers.*.self_attn.o_proj   64 x 64    16       8      16      2\n"
        "model.layers.*.self_attn.q_proj   64 x 64    16       8      16      2\n"
        "model.layers.*.self_attn.v_proj   64 x 64    16       4      16      2\n"
        "(the ranks of each adapter and of the result; * stands for every layer)\n"
    )


def test_dry_run_with_the_rank_left_to_the_energy() -> None:
    result = invoke(SORT, "--dry-run", "--rank", "energy=0.9")
    assert result.stdout.startswith("Plan: gam, 8 modules, bfloat16, size decided by the energy;")
    assert result.stdout.splitlines()[-2].split()[-2:] == ["energy", "2"]


def test_dry_run_as_json() -> None:
    record = json.loads(invoke(SORT, ROTATE, "--dry-run", "--json", "-o", "out").stdout)
    assert list(Path().iterdir()) == []
    assert record["output"] == str(Path("out").resolve())
    assert record["method"] == "gam"
    assert record["dtype"] == "bfloat16"
    assert len(record["modules"]) == 12
    total = sum(m["rank"] * sum(m["shape"]) for m in record["modules"]) * 2
    assert record["output_bytes"] == total
    assert [entry["ranks"] for entry in record["inputs"]] == [[16], [4, 8, 12]]
    assert all(len(entry["sha256"]) == 64 for entry in record["inputs"])


def test_dry_run_checks_the_output_and_the_adapters() -> None:
    Path("out").write_text("")
    assert invoke(SORT, "--dry-run", "-o", "out").exit_code == 1
    assert invoke("nowhere", "--dry-run").exit_code == 1


def test_p_adapters_is_no_parameter() -> None:
    result = invoke(SORT, "--dry-run", "-p", "adapters=x")
    assert result.exit_code == 2
    assert "-p adapters" in result.stderr


def test_a_closed_stderr_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from gam.commands.merge import main; main()"]
    out = tmp_path / "out"
    script = f"{shlex.join([*command, SORT, '-o', str(out)])} 2>&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("Wrote")


# Only Linux has a device that is always full; elsewhere nothing can stand in for it.
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_stdout_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from gam.commands.merge import main; main()"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, SORT, "-o", str(tmp_path / "out")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: cannot print the result")
    assert "Traceback" not in done.stderr


def test_the_card_reruns_adapters_of_one_name(tmp_path: Path) -> None:
    merged = gam.merge_adapters([SORT, SORT, ROTATE], weights=[1, 2, 3])
    merged.save(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "gam-merge sort sort rotate -o OUT" in card


# --- recipes --------------------------------------------------------------------------


def test_a_recipe_and_flags_that_win() -> None:
    recipe = Path("recipe.yaml")
    recipe.write_text(
        f"adapters: {{s: {SORT!r}, r: {ROTATE!r}}}\n"
        "weights: {s: [1, 3], r: 1}\n"
        "rank: 8\n"
        "density: 0.5\n"
        "modules:\n"
        "  '*.mlp.*': {method: ties, rank: 4}\n"
        "  '*.k_proj': {skip: true}\n"
    )
    result = invoke("--config", "recipe.yaml", "--dry-run", "--rank", "16")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "Plan: gam, 10 modules, bfloat16, about 30.7 kB; nothing written\n"
        "\n"
        "adapter  weight  modules  rank\n"
        "s        varies        8    16\n"
        "r        varies       12  4-12\n"
        "\n"
        "modules                             shape   s   r  result             "
        "      settings  count\n"
        "model.layers.*.mlp.down_proj     64 x 128   -  12       4  ties, weigh"
        "ts 3/1, rank 4      1\n"
        "model.layers.*.mlp.down_proj     64 x 128   -   8       4  ties, weigh"
        "ts 1/1, rank 4      1\n"
        "model.layers.*.mlp.up_proj       128 x 64   -   8       4  ties, weigh"
        "ts 1/1, rank 4      1\n"
        "model.layers.*.mlp.up_proj       128 x 64   -   8       4  ties, weigh"
        "ts 3/1, rank 4      1\n"
        "model.layers.*.self_attn.o_proj   64 x 64  16   8      16             "
        "   weights 1/1      1\n"
        "model.layers.*.self_attn.o_proj   64 x 64  16   8      16             "
        "   weights 3/1      1\n"
        "model.layers.*.self_attn.q_proj   64 x 64  16   8      16             "
        "   weights 1/1      1\n"
        "model.layers.*.self_attn.q_proj   64 x 64  16   8      16             "
        "   weights 3/1      1\n"
        "model.layers.*.self_attn.v_proj   64 x 64  16   4      16             "
        "   weights 1/1      1\n"
        "model.layers.*.self_attn.v_proj   64 x 64  16   4      16             "
        "   weights 3/1      1\n"
        "(the ranks of each adapter and of the result; * stands for every layer)\n"
        "\n"
        "skipped: 2 modules (model.layers.*.self_attn.k_proj)\n"
    )


def test_a_rerun_and_a_changed_input() -> None:
    shutil.copytree(ADAPTERS, "in")
    arguments = ["in/reverse", "in/sort", "-o", "out", "--weights", "2,1", "-p", "retract=true"]
    assert invoke(*arguments, "--quiet").exit_code == 0
    assert invoke("--config", "out/gam_merge.json", "-o", "again", "--quiet").exit_code == 0
    for file in Path("out").iterdir():
        assert file.read_bytes() == Path("again", file.name).read_bytes()
    config = Path("in/sort/adapter_config.json")
    had, has = (hashlib.sha256(config.read_bytes() + end).hexdigest()[:12] for end in (b"", b" "))
    config.write_bytes(config.read_bytes() + b" ")
    result = invoke("--config", "out/gam_merge.json", "-o", "third")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: changed since the recorded merge: 'sort' (adapter_config.json has SHA-256 "
        f"{has}, recorded {had}). Restore what was merged, or pass --allow-changes to merge what "
        "is there now.\n"
    )
    assert not Path("third").exists()
    again = invoke("--config", "out", "-o", "third", "--allow-changes", "--quiet")
    assert again.exit_code == 0
    name = "adapter_model.safetensors"
    assert Path("third", name).read_bytes() == Path("out", name).read_bytes()


def test_a_wrong_recipe_exits_2_with_its_line() -> None:
    Path("recipe.yaml").write_text("method: ties\ndensty: 0.5\n")
    result = invoke(SORT, "--config", "recipe.yaml", "-o", "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"{USAGE}Error: recipe.yaml, line 2: unknown option 'densty'; did you mean 'density'?\n"
    )


def test_an_input_of_the_recipe_is_not_overwritten() -> None:
    shutil.copytree(ADAPTERS, "in")
    Path("recipe.yaml").write_text("adapters: [in/sort, in/rotate]\n")
    result = invoke("--config", "recipe.yaml", "-o", "in/sort", "--overwrite")
    assert result.exit_code == 1
    assert "this folder holds the input 'in/sort'" in result.stderr


# --- completion -----------------------------------------------------------------------


def test_methods_are_completed() -> None:
    completion = ShellComplete(cli.main, {}, "gam-merge", "_GAM_MERGE_COMPLETE")
    found = completion.get_completions([SORT, "--method"], "knots")
    assert [item.value for item in found] == ["knots_ties", "knots_dare_ties", "knots_dare"]
    assert found[0].help == STRATEGIES["knots_ties"].summary
    assert {item.value for item in completion.get_completions([], "--si")} == {"--size"}


def test_h_is_help() -> None:
    assert invoke("-h").stdout == invoke("--help").stdout


# What a terminal shows needs one; only POSIX has those that a program can be given.
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_the_bar_has_a_line_of_its_own(tmp_path: Path) -> None:
    import pty

    main_end, terminal = pty.openpty()
    command = [sys.executable, "-c", "from gam.commands.merge import main; main()"]
    done = subprocess.run(
        [*command, REVERSE, SORT, "-o", str(tmp_path / "out")],
        stdout=terminal,
        stderr=terminal,
        check=False,
    )
    os.close(terminal)
    printed = os.read(main_end, 65536).decode()
    os.close(main_end)
    assert done.returncode == 0, printed
    bar, _, rest = printed.partition("\r\n")
    assert "Merging" in bar
    assert "100%" in bar
    assert rest.startswith("Wrote ")
    assert "\x1b[1madapter  weight" in rest

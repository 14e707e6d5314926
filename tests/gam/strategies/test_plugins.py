"""The catalogue of methods, and the methods that other packages bring."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.adapters import (
    MODULES,
    assert_refused,
    assert_same_update,
    make_adapter,
    memory_adapter,
)
from helpers.paths import ROOT

import gam
from gam import OptionError, PluginError, merge_adapters, strategies
from gam.commands.merge import main
from gam.merging.options import DEFAULTS, OPTIONS
from gam.strategies import STRATEGIES, Param, Strategy

EXAMPLE = ROOT / "tests" / "example_plugin"


# --- what is declared -----------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_function_takes_what_its_entry_declares(strategy):
    assert isinstance(strategy.function, str)
    function = strategy.load()
    assert function.__doc__
    taken = inspect.signature(function).parameters.values()
    assert [param.name for param in taken][:2] == ["updates", "weights"]
    keywords = {param.name: param for param in taken if param.kind is param.KEYWORD_ONLY}
    assert len({param.name for param in strategy.params}) == len(strategy.params)
    for param in strategy.params:
        default = keywords[param.name].default
        assert default in (inspect.Parameter.empty, param.default)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_an_entry_is_whole(strategy):
    assert strategy.summary.endswith(".")
    for param in strategy.params:
        assert param.help.endswith(".")
        assert param.name not in OPTIONS
        if param.default is not None:
            assert strategy.check({param.name: param.default}, [])[param.name] == param.default


def test_parameters_of_one_name_mean_one_thing():
    """A flag has one help text, whatever the number of methods that know it."""
    found = [param for param, _ in strategies.parameters()]
    assert len({param.name for param in found}) == len({(p.name, p.kind) for p in found})


def test_help_of_the_python_function_names_every_option():
    signature = inspect.signature(merge_adapters)
    for name, option in OPTIONS.items():
        assert signature.parameters[name].default == DEFAULTS[name]
        assert f"{name}: {option.help}" in merge_adapters.__doc__
    for param, owners in strategies.parameters():
        assert signature.parameters[param.name].default is None
        assert f"{param.name} ({', '.join(owners)}): {param.help}" in merge_adapters.__doc__


VALUES = {
    "true|false": Param("x", "bool", False, ""),
    "INT": Param("x", "int", 1, ""),
    "INT from 1": Param("x", "int", 1, "", minimum=1),
    "FLOAT from 0 to 0.5": Param("x", "float", 0, "", minimum=0, maximum=0.5),
    "FLOAT to 0.5": Param("x", "float", 0, "", maximum=0.5),
    "NAME|INDEX|all": Param("x", "adapter", None, "", choices=("all",)),
    "a|b": Param("x", "choice", "a", "", choices=("a", "b")),
}


@pytest.mark.parametrize(("text", "param"), VALUES.items(), ids=VALUES)
def test_values_are_shown(text, param):
    assert param.values == text


@pytest.mark.parametrize("value", ["c", "A", 1, True, math.nan])
def test_a_choice_takes_its_words_only(value):
    strategy = Strategy("m", print, "", "", (VALUES["a|b"],))
    assert strategy.check({"x": "b"}, []) == {"x": "b"}
    assert_refused(
        lambda: strategy.check({"x": value}, []), OptionError, "x of method 'm'", "one of: a, b"
    )


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("INT from 1", 0, "got 0, expected a whole number, 1 or more"),
        ("FLOAT from 0 to 0.5", 2, "got 2, expected a number from 0 to 0.5"),
        ("FLOAT to 0.5", 2, "got 2, expected a number, 0.5 or less"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_bounds_it_has(kind, value, text):
    strategy = Strategy("m", print, "", "", (VALUES[kind],))
    with pytest.raises(OptionError) as caught:
        strategy.check({"x": value}, [])
    assert str(caught.value) == f"x of method 'm': {text}."


@pytest.mark.parametrize(
    ("value", "number"),
    [(2**53 + 1, 2**53 + 1), (str(2**53 + 1), 2**53 + 1), ("1e3", 1000), (7.0, 7), ("7.0", 7)],
)
def test_a_whole_number_of_any_size_is_exact(value, number):
    found = Strategy("m", print, "", "", (VALUES["INT"],)).check({"x": value}, [])["x"]
    assert (found, type(found)) == (number, int)


# --- methods of other packages --------------------------------------------------------


@pytest.fixture
def _example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    yield
    sys.modules.pop("gam_halves", None)


def install(folder, monkeypatch, code, point, name="broken", package="pkg"):
    """Put a package on the path: one module of some code, and one entry point."""
    module = f"{package}_module"
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{package}-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(f"[gam.strategies]\n{name} = {module}:{point}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.usefixtures("_example")
def test_a_plugin_merges_like_a_method_of_our_own(tmp_path):
    pair = [memory_adapter(seed=seed, name=f"a{seed}") for seed in range(2)]
    merged = merge_adapters(pair, method="halves", share="0.25", rank="sum")
    linear = merge_adapters(pair, method="linear", scale=0.25, rank="sum")
    for name in MODULES:
        assert_same_update(merged.modules[name].delta(), linear.modules[name].delta())
    merged = merge_adapters(pair, method="halves", only=1, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "gam_merge.json").read_text())
    assert record["package"] == "gam-halves 1.0"
    assert record["paper"] == "Nobody 2026, Half of It"
    assert (record["options"]["share"], record["options"]["only"]) == (0.5, "a1")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Method: `halves` of the package `gam-halves 1.0` (Nobody 2026, Half of It)." in card
    assert "--method=halves" in card
    assert "-p share=0.5 -p only=a1" in card
    assert_refused(
        lambda: merge_adapters(pair, method="halves", share=2),
        OptionError,
        "share of method 'halves': got 2, expected a number from 0 to 1",
    )


def test_a_plugin_on_the_command_line(tmp_path):
    paths = [str(make_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    packages = [EXAMPLE, Path(gam.__file__).parents[1], *map(Path, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages))}

    def command(*arguments):
        program = "from gam.commands.merge import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=tmp_path,
            env=env,
            text=True,
            capture_output=True,
        )

    listed = command("--list-methods").stdout
    assert "halves:\n  Half of the weighted sum.\n  From gam-halves 1.0\n" in listed
    assert "-p share=FLOAT from 0 to 1" in listed
    done = command(*paths, "-o", "out", "--method", "halves", "-p", "share=1", "--json")
    assert json.loads(done.stdout)["method"] == "halves"
    wrong = command(*paths, "--dry-run", "--method", "halve")
    assert wrong.returncode == 2
    assert "Did you mean 'halves'?" in wrong.stderr


GOOD = """
from gam.strategies import Param, Strategy
def function(updates, weights, *, x=1): return x
P = Strategy("broken", function, "s", "p", (Param("x", "int", 1, "An x."),))
"""
BROKEN = {
    "no-module": ("raise OSError('no\\ndisk')", "P", "cannot be imported: OSError: no disk"),
    "syntax": ("def", "P", "cannot be imported: SyntaxError"),
    "no-name": ("x = 1", "P", "cannot be imported: AttributeError"),
    "not-a-strategy": ("P = print", "P", "got a builtin_function_or_method, expected a gam"),
    "other-name": (GOOD.replace('"broken"', '"b"'), "P", "the strategy calls itself 'b'"),
    "no-function": (GOOD.replace(", function,", ', "pkg_module:nothing",'), "P", "'nothing'"),
    "signature": (GOOD.replace("x=1)", "y=1)"), "P", "does not take (updates, weights, x)"),
    "not-callable": (GOOD.replace(", function,", ", 3,"), "P", "does not take"),
}


@pytest.mark.parametrize(("code", "point", "part"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_named_and_in_nobodys_way(code, point, part, tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, code, point)
    assert_refused(
        lambda: strategies.get("broken"),
        PluginError,
        "method 'broken' of package 'pkg 0.3' (pkg_module:P)",
        part,
        "tell its author, or uninstall the package.",
    )
    assert strategies.get("gam") is STRATEGIES["gam"]
    assert strategies.names() == [*STRATEGIES, "broken"]


def test_a_broken_plugin_is_listed_with_its_fault(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, "import nowhere", "P")
    result = CliRunner().invoke(main, ["--list-methods"], terminal_width=500)
    assert result.exit_code == 0
    assert "broken:\n  Broken: method 'broken' of package 'pkg 0.3'" in result.stdout
    assert "ties:\n" in result.stdout


def test_a_wrong_result_is_named(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, GOOD, "P")
    pair = [memory_adapter(seed=seed, name=f"a{seed}") for seed in range(2)]
    assert_refused(
        lambda: merge_adapters(pair, method="broken"),
        PluginError,
        "method 'broken' of package 'pkg 0.3': returned a int, expected a Product or Rows",
    )


MAKES = """
import torch
from gam.algebra.updates import Product, block_diagonal
from gam.strategies import Strategy
SEEN = []
def function(updates, weights):
    SEEN.append((updates[0].left.side.dtype, updates[0].right.side.dtype))
    core = block_diagonal([w * u.core for u, w in zip(updates, weights)])
    return Product(None, CORE, None, DIAGNOSTICS)
P = Strategy("broken", function, "s", "p"GUARD)
"""


def makes(core="core", diagnostics="{}", guard=""):
    code = MAKES.replace("CORE", core).replace("DIAGNOSTICS", diagnostics)
    return code.replace("GUARD", guard)


@pytest.mark.parametrize(
    ("guard", "dtype"), [("", torch.float64), (", float32_is_enough=True", torch.float32)]
)
def test_only_a_method_that_guards_itself_gets_float32(guard, dtype, tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, makes(guard=guard), "P")
    pair = [memory_adapter(dtype=torch.bfloat16, seed=seed, name=f"a{seed}") for seed in range(2)]
    merge_adapters(pair, method="broken")
    seen = sys.modules["pkg_module"].SEEN
    assert seen[0] == (dtype, dtype)  # what float32 does not determine comes in float64 later
    assert guard or set(seen) == {(torch.float64, torch.float64)}


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (makes("core.float()"), "a core [1, 8, 8] float32, expected [1, p, q] float64"),
        (makes("core[0]"), "a core [8, 8] float64, expected [1, p, q] float64"),
        (makes("core * torch.nan"), "a core with NaN or infinity"),
        (makes(diagnostics="{'x': [1, 2]}"), "diagnostics of another length than its 1 modules"),
    ],
    ids=["dtype", "batch", "nan", "diagnostics"],
)
def test_a_wrong_product_is_named(code, text, tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, code, "P")
    pair = [memory_adapter(seed=seed, name=f"a{seed}") for seed in range(2)]
    assert_refused(
        lambda: merge_adapters(pair, method="broken"),
        PluginError,
        f"method 'broken' of package 'pkg 0.3': returned {text}",
        "Tell its author.",
    )


def test_two_methods_of_one_name_are_refused(tmp_path, monkeypatch):
    for package in ("first", "second"):
        install(tmp_path / package, monkeypatch, GOOD, "P", package=package)
    assert_refused(
        lambda: strategies.get("broken"),
        PluginError,
        "method 'broken': 'first 0.3' and 'second 0.3' bring a method of this name",
        "uninstall all but one",
    )


def test_nobody_takes_the_name_of_a_method_of_our_own(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, GOOD, "P", name="ties")
    assert strategies.names() == list(STRATEGIES)
    assert_refused(
        lambda: strategies.get("ties"),
        PluginError,
        "method 'ties': gam-merge itself and 'pkg 0.3' bring a method of this name",
    )
    assert strategies.get("gam") is STRATEGIES["gam"]

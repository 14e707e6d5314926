"""Which layer imports what, each in a fresh process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

import gam
import gam_kernels

PACKAGES = [str(Path(package.__file__).parents[1]) for package in (gam, gam_kernels)]


def imported_by(code: str, folder: Path) -> set[str]:
    """Return the modules that are loaded after some code has run, started from `folder`."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PACKAGES)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def layers(modules: set[str], *packages: str) -> set[str]:
    """Return those of the modules that lie in one of the packages."""
    return {m for m in modules if any(m == p or m.startswith(f"{p}.") for p in packages)}


def test_gam_alone_imports_only_the_standard_library(tmp_path: Path) -> None:
    before = imported_by("", tmp_path)
    added = imported_by("import gam", tmp_path) - before
    assert layers(added, "gam") == {"gam", "gam.errors", "gam.version"}
    assert {name.partition(".")[0] for name in added} <= {*sys.stdlib_module_names, "gam"}


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("merge", ["--help"]),
        ("merge", ["--version"]),
        ("merge", ["a", "--weights", "x"]),
        ("inspect", ["--help"]),
        ("inspect", ["a", "--alpha", "x"]),
    ],
)
def test_help_and_version_import_no_torch(
    command: str, arguments: list[str], tmp_path: Path
) -> None:
    code = f"""
from gam.commands.{command} import main
try:
    main({arguments!r})
except SystemExit:
    pass"""
    modules = imported_by(code, tmp_path)
    assert "click" in modules
    assert not layers(modules, "torch", "numpy", "safetensors", "gam_kernels")
    catalogue = {f"gam.strategies{m}" for m in ("", ".base", ".catalogue", ".plugins")}
    catalogue |= {f"gam.merging{m}" for m in ("", ".options", ".values")}
    own = catalogue | ({"gam.commands.merge_text", "gam.figures"} if command == "merge" else set())
    shared = ("", ".flags", ".terminal", ".process", ".text")
    commands = {f"gam.commands{m}" for m in (*shared, f".{command}")}
    assert layers(modules, "gam") == {"gam", "gam.errors", "gam.version", *commands, *own}


@pytest.mark.parametrize("command", ["", "pairs", "train", "evaluate", "run"])
def test_help_of_the_loop_imports_no_torch(command: str, tmp_path: Path) -> None:
    code = f"""
from gam.pda.commands import main
try:
    main({[*command.split(), "--help"]!r})
except SystemExit:
    pass"""
    modules = imported_by(code, tmp_path)
    assert "gam.pda.commands" in modules
    assert not layers(modules, "torch", "numpy", "yaml", "transformers", "peft", "trl", "datasets")


def test_kernels_never_import_gam(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, gam_kernels
for module in pkgutil.walk_packages(gam_kernels.__path__, "gam_kernels."):
    if not module.name.endswith((".kernel", "._triton")):
        importlib.import_module(module.name)"""
    modules = imported_by(code, tmp_path)
    assert "torch" in modules
    assert not layers(modules, "gam", "click", "safetensors", "transformers", "peft", "triton")


# The order of gam's own modules is in test_imports.py. This is what they bring along from others.
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("gam.files", ("torch",)),
        ("gam.adapter", ("safetensors", "gam_kernels")),
        ("gam.strategies", ("torch", "safetensors", "gam_kernels")),
        ("gam.strategies.entries", ("safetensors",)),
        ("gam.algebra.calibrate", ("safetensors",)),
        ("gam.formats", ("gam_kernels",)),
        ("gam.hub.names", ("huggingface_hub", "torch")),
        ("gam.hub.download", ("huggingface_hub", "gam_kernels")),
        ("gam.hub.push", ("huggingface_hub", "gam_kernels")),
        ("gam.load", ("huggingface_hub", "gam_kernels")),
        ("gam.merging.devices", ("safetensors", "gam_kernels")),
        ("gam.merging.rules", ("torch", "safetensors")),
        ("gam.merging.execute", ("yaml", "huggingface_hub")),
        ("gam.report.types", ("safetensors", "gam_kernels")),
        ("gam.report.card", ("torch", "safetensors", "gam_kernels")),
        ("gam.save", ("safetensors", "gam_kernels")),
        ("gam.recipes.document", ("safetensors", "yaml")),
        ("gam.recipes.recipe", ("yaml",)),
        ("gam.api", ("yaml", "huggingface_hub")),
        ("gam.inspection.geometry", ("safetensors",)),
        ("gam.inspection.types", ("torch", "matplotlib")),
        ("gam.inspection.groups", ("torch", "matplotlib")),
        ("gam.inspection.tables", ("torch", "matplotlib")),
        ("gam.inspection.advice", ("torch", "matplotlib")),
        ("gam.inspection.measure", ("matplotlib",)),
        ("gam.inspection.plot", ("torch", "matplotlib")),
        ("gam.pda.files", ("torch",)),
        ("gam.pda.models.local", ("torch",)),
        ("gam.pda.train", ("torch", "trl", "datasets")),
        ("gam.pda.evaluate", ("torch",)),
        ("gam.pda.report", ("torch", "matplotlib")),
    ],
)
def test_modules_bring_along_no_more_than_they_need(
    module: str, absent: tuple[str, ...], tmp_path: Path
) -> None:
    modules = imported_by(f"import {module}", tmp_path)
    assert module in modules
    assert not layers(modules, *absent, "click", "transformers", "peft")


def test_a_merge_needs_neither_transformers_nor_peft(tmp_path: Path) -> None:
    adapters = [str(ROOT / "examples" / "adapters" / name) for name in ("sort", "rotate")]
    words = [*adapters, "-o", "out"]
    code = f"from gam.commands.merge import main\nmain({words!r}, standalone_mode=False)"
    modules = imported_by(code, tmp_path)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "gam.merging.execute" in modules
    assert not layers(modules, "gam.pda", "transformers", "peft", "huggingface_hub", "scipy")


def test_one_package_talks_to_the_hub() -> None:
    package = Path(gam.__file__).parent
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    users = [p for p, text in texts.items() if re.search("(import|from) huggingface_hub", text)]
    assert {path.parent for path in users} == {package / "hub"}


def test_an_inspection_needs_nothing_that_only_its_picture_does(tmp_path: Path) -> None:
    adapters = [str(ROOT / "examples" / "adapters" / name) for name in ("sort", "rotate")]
    code = f"from gam.commands.inspect import main\nmain({adapters!r}, standalone_mode=False)"
    modules = imported_by(code + "\nprint()", tmp_path)
    assert "gam.inspection.measure" in modules
    others = ("transformers", "peft", "huggingface_hub", "scipy", "matplotlib")
    assert not layers(modules, "gam.pda", "gam.merging.execute", "gam.inspection.plot", *others)


def test_public_names_are_there() -> None:
    assert set(gam.__all__) <= set(dir(gam))
    for name in gam.__all__:
        assert getattr(gam, name) is not None
    assert issubclass(gam.OptionError, gam.GamError)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gam.nothing  # noqa: B018


def test_no_import_package_called_kernels() -> None:
    # It would shadow the Hugging Face package of that name, which transformers probes for.
    assert not (ROOT / "kernels" / "__init__.py").exists()

"""The order of the house: every module imports only what stands before it."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gam
import gam_kernels

# From the ground up. Imports go to what stands earlier, wherever in a file they are written.
ORDER = """
    errors version figures files adapter

    algebra.updates algebra.factors algebra.entrywise algebra.core_space algebra.factorize
    algebra.calibrate algebra.products algebra

    strategies.base strategies.plugins strategies.catalogue strategies
    strategies.linear strategies.gam strategies.coverage strategies.tsv strategies.iso
    strategies.entries strategies.knots strategies.core_ties strategies.ctm strategies.spherical
    strategies.frechet

    formats.base formats.foreign formats.safetensors formats.checks formats.pickles
    formats.peft_config formats.peft_output formats.scaling formats.peft_scaling formats.peft
    formats

    hub.names hub.faults hub.download hub.push hub
    load

    merging.values merging.options
    report.types report.html report.tally report.findings report.markdown report.rerun report.card
    report.record report
    save
    merging.rules merging.settings merging.devices merging.threads merging.plan merging.batches
    merging.approximate merging.execute merging

    recipes.document recipes.mergekit recipes.names recipes.recipe recipes
    api

    inspection.types inspection.groups inspection.geometry inspection.tables inspection.advice
    inspection.plot inspection.measure inspection

    commands.process commands.terminal commands.text commands.flags commands.merge_text
    commands.merge commands.inspect commands

    pda.files pda.libraries pda.provenance pda.settings pda.prompts pda.models.base
    pda.models.local pda.models.server pda.models pda.checks pda.scores pda.evaluate pda.harness
    pda.journal pda.pairs pda.train pda.recipe pda.preflight pda.stages pda.loop pda.picture
    pda.report pda.commands pda pda.__main__
""".split()

# The public facades: what a user calls on an object is done further up.
FACADES = {
    ("adapter", "formats"): "Adapter.state_dict",
    ("adapter", "save"): "Adapter.save and .push_to_hub",
    ("adapter", "hub.push"): "Adapter.push_to_hub",
    ("adapter", "report.html"): "the tables that a notebook shows",
    ("adapter", "report.types"): "the type of Adapter.report",
    ("report.types", "report.html"): "the tables that a notebook shows",
    ("inspection.types", "inspection.plot"): "Inspection.plot",
    ("inspection.types", "inspection.tables"): "the tables that a notebook shows",
}

# What a room knows nothing of, besides what stands after it.
UNKNOWN = {
    "algebra": ("click", "safetensors", "huggingface_hub", "yaml", "os", "pathlib", "gam.files"),
    "strategies": ("click", "safetensors", "huggingface_hub", "yaml", "os", "pathlib"),
    "formats": ("click", "huggingface_hub", "gam.strategies", "gam.algebra", "gam.hub"),
    "commands": ("torch", "safetensors", "huggingface_hub", "gam_kernels", "gam.algebra"),
}

# Who alone imports a package.
OWNERS = {
    "huggingface_hub": ("gam.hub.", "gam.pda."),
    "safetensors": ("gam.formats.", "gam.pda.preflight"),
    "yaml": ("gam.recipes.",),
    "click": ("gam.commands.", "gam.pda.commands"),
    "matplotlib": ("gam.inspection.plot", "gam.pda.picture"),
    "tqdm": ("gam.api",),
    "transformers": ("gam.pda.",),
    "peft": ("gam.pda.",),
    "trl": ("gam.pda.",),
}

ROOT = Path(gam.__file__).parent


def modules() -> dict[str, Path]:
    """Return every module of gam, by its name without that of the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    # The front doors themselves, which name what others do.
    del found["__init__"], found["__main__"]
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Yield what a file imports, wherever in it, by the names of modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [name for name in whole if name.removeprefix("gam.") in MODULES]
            yield from inner or [str(node.module)]


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_downwards(module: str) -> None:
    place = ORDER.index(module)
    for name in imports(MODULES[module]):
        if name == "gam":  # its public names
            assert place > ORDER.index("api"), f"{module} imports what users call"
        if not name.startswith("gam."):
            continue
        inner = name.removeprefix("gam.")
        if ORDER.index(inner) >= place:
            assert (module, inner) in FACADES, f"{module} imports {inner}, which stands above it"


def test_facades_are_all_in_use() -> None:
    used = {
        (module, name.removeprefix("gam."))
        for module, path in MODULES.items()
        for name in imports(path)
    }
    assert set(FACADES) <= used


@pytest.mark.parametrize("module", ORDER)
def test_rooms_know_only_what_they_may(module: str) -> None:
    found = set(imports(MODULES[module]))
    room = module.partition(".")[0]
    for unknown in UNKNOWN.get(room, ()):
        assert not {n for n in found if n == unknown or n.startswith(f"{unknown}.")}, unknown
    for package, owners in OWNERS.items():
        if any(name.partition(".")[0] == package for name in found):
            assert f"gam.{module}".startswith(owners), f"{module} imports {package}"


def test_only_peft_is_told_what_peft_calls_things() -> None:
    words = ("base_model.model.", "lora_alpha", "rank_pattern", "fan_in_fan_out")
    for module, path in MODULES.items():
        if module.startswith(("formats.peft", "pda.")):
            continue
        strings = [
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        docs = {ast.get_docstring(node, clean=False) for node in _documented(path)}
        for text in strings:
            assert text in docs or not any(word in text for word in words), (module, text)


def _documented(path: Path) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield node


def test_names_in_documentation_are_there() -> None:
    texts = {path: path.read_text() for path in ROOT.rglob("*.py")}
    texts |= {path: path.read_text() for path in Path(gam_kernels.__file__).parent.rglob("*.py")}
    for path, text in texts.items():
        for name in re.findall(r"`((?:gam|gam_kernels)(?:\.\w+)+)`", text):
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError):
                pytest.fail(f"{path.name} names {name}, which is not there")


def test_kernels_are_below_the_house() -> None:
    for path in Path(gam_kernels.__file__).parent.rglob("*.py"):
        assert not {name for name in imports(path) if name.partition(".")[0] == "gam"}


@pytest.mark.parametrize("package", [gam, gam_kernels], ids=lambda package: package.__name__)
def test_no_function_is_too_long_to_read(package: object) -> None:
    """At most 60 lines, but for what declares the options of a command."""
    for path in Path(str(package.__file__)).parent.rglob("*.py"):  # type: ignore[attr-defined]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"

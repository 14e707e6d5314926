"""What the kernels import, by their text."""

import ast
import sys
from pathlib import Path

import pytest

import gam_kernels

PACKAGE = Path(gam_kernels.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
OUTSIDE = {"numpy", "threadpoolctl", "torch", "triton"}


def imports(file, *, lazy=True):
    """The modules that a file imports; without ``lazy`` those at its import only."""
    found = set()
    nodes = [*ast.parse((PACKAGE / file).read_text()).body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
        elif lazy or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found


def packages(modules):
    return {module.partition(".")[0] for module in modules}


def is_kernel(file):
    return file.endswith("/kernel.py") or file == "_triton.py"


@pytest.mark.parametrize("file", FILES)
def test_nothing_of_gam_and_little_else(file):
    assert packages(imports(file)) <= {*sys.stdlib_module_names, *OUTSIDE, "gam_kernels"}


@pytest.mark.parametrize("file", [file for file in FILES if not is_kernel(file)])
def test_triton_is_for_kernels(file):
    assert "triton" not in packages(imports(file, lazy=False))
    if file != "_backend.py":  # asks Triton whether it interprets
        assert "triton" not in packages(imports(file))
    kernels = {m for m in imports(file, lazy=False) if {"kernel", "_triton"} & {*m.split(".")}}
    assert not kernels, "kernels are imported where they are called"


def test_every_kernel_has_a_definition():
    for file in FILES:
        if file.endswith("/kernel.py"):
            assert file.replace("kernel.py", "reference.py") in FILES
            assert file.replace("kernel.py", "op.py") in FILES

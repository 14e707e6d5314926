"""Settings of every test: a seed, and algorithms that give the same bits each time."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read where a kernel is defined, so it must be there before the first import of one.
    os.environ["TRITON_INTERPRET"] = "1"

# Also fills `torch.empty` with NaN, so that reading unwritten memory shows.
torch.use_deterministic_algorithms(True)
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores out; threads of theirs would wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

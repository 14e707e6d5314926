"""Settings of every test: a seed, and algorithms that give the same bits each time."""

import pytest
import torch

# Also fills `torch.empty` with NaN, so that reading unwritten memory shows.
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

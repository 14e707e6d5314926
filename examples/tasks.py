"""The string tasks of the tiny model: sampling questions and scoring answers."""

from __future__ import annotations

from collections.abc import Callable

import torch

LETTERS = 16
LENGTH = 8
MARK = LETTERS  # the token after the question; the tokens after it name the task
TASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "copy": lambda text: text,
    "reverse": lambda text: text.flip(1),
    "sort": lambda text: text.sort(dim=1).values,
    "rotate": lambda text: text.roll(-3, dims=1),
}


def sample(task: str, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random questions [count, 10] (task, letters, mark) and their answers [count, 8]."""
    text = torch.randint(LETTERS, (count, LENGTH), generator=generator)
    name = torch.full((count, 1), MARK + 1 + list(TASKS).index(task))
    mark = torch.full((count, 1), MARK)
    return torch.cat([name, text, mark], dim=1), TASKS[task](text)


@torch.no_grad()
def accuracy(model: torch.nn.Module, task: str, count: int = 512) -> float:
    """Return the share of answers that a model gets wholly right, decoding greedily."""
    tokens, answer = sample(task, count, torch.Generator().manual_seed(123))
    for _ in range(LENGTH):
        best = model(input_ids=tokens).logits[:, -1].argmax(dim=1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
    return (tokens[:, -LENGTH:] == answer).all(dim=1).float().mean().item()

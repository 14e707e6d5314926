"""The device that a merge runs on, and the way of the factors there and back."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from gam.adapter import Adapter, LowRank
from gam.errors import OptionError

_CPU = torch.device("cpu")
_streams = threading.local()


def choose_device(name: str) -> torch.device | None:
    """Return the device that the option ``device`` names; None for "auto".

    Raises:
        OptionError: There is no such device.
    """
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise OptionError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N.", "device")
    if name in ("auto", "cpu"):
        return _CPU if name == "cpu" else None
    count = torch.cuda.device_count()
    if not count:
        raise OptionError(
            f"device: got {name!r}, but torch {torch.__version__} finds no CUDA device here. "
            "Pass --device cpu, or install a torch that is made for your GPU.",
            "device",
        )
    index = int(name.partition(":")[2] or torch.cuda.current_device())
    if index >= count:
        listed = ", ".join(f"cuda:{i}" for i in range(count))
        raise OptionError(f"device: got {name!r}, expected one of {listed}.", "device")
    return torch.device("cuda", index)


def natural_device(adapters: Sequence[Adapter]) -> torch.device:
    """Return the CUDA device that all factors are on already, else the CPU."""
    modules = (module for adapter in adapters for module in adapter.modules.values())
    found = {tensor.device for module in modules for tensor in (module.lora_a, module.lora_b)}
    device = next(iter(found), _CPU)
    return device if len(found) == 1 and device.type == "cuda" else _CPU


def moved(module: LowRank, device: torch.device) -> LowRank:
    """Return an update with its factors on a device; itself if they are there.

    To a CUDA device they go through page-locked memory, without waiting for the copy.
    """
    if module.lora_a.device == module.lora_b.device == device:
        return module
    a, b = (_moved(tensor, device) for tensor in (module.lora_a, module.lora_b))
    return replace(module, lora_a=a, lora_b=b)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def wait(device: torch.device) -> None:
    """Wait for what this thread has under way on a device; factors may come from there."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextlib.contextmanager
def working_on(device: torch.device) -> Iterator[None]:
    """Run what is done inside on a device, and wait for its end.

    On a CUDA device each thread has a stream of its own, so that while one thread's kernels
    run another's files are read and copied.
    """
    if device.type != "cuda":
        yield
        return
    if getattr(_streams, "device", None) != device:
        _streams.device = device
        _streams.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.stream(_streams.stream):
        yield
    _streams.stream.synchronize()

"""Merge LoRA adapters into one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gam.errors import AdapterError, GamError, OptionError, OutputError, PluginError
from gam.version import __version__

if TYPE_CHECKING:
    from gam.adapter import Adapter, LowRank
    from gam.api import merge_adapters
    from gam.hub.push import push_to_hub
    from gam.inspection.measure import inspect_adapters
    from gam.inspection.types import Inspection
    from gam.load import load_adapter

__all__ = [
    "Adapter",
    "AdapterError",
    "GamError",
    "Inspection",
    "LowRank",
    "OptionError",
    "OutputError",
    "PluginError",
    "__version__",
    "inspect_adapters",
    "load_adapter",
    "merge_adapters",
    "push_to_hub",
]

# Imported when first asked for, so that `import gam` and `gam-merge --help` need no torch.
_LAZY = {
    "Adapter": ("gam.adapter", "Adapter"),
    "LowRank": ("gam.adapter", "LowRank"),
    "Inspection": ("gam.inspection.types", "Inspection"),
    "inspect_adapters": ("gam.inspection.measure", "inspect_adapters"),
    "load_adapter": ("gam.load", "load_adapter"),
    "merge_adapters": ("gam.api", "merge_adapters"),
    "push_to_hub": ("gam.hub.push", "push_to_hub"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

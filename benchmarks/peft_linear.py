"""How far PEFT's `linear` is from the average of two adapters.

`add_weighted_adapter(..., combination_type="linear")` averages the factors A and B apart. Their
product then holds cross terms, one adapter's B times the other's A, that are in neither of them.
Prints `|merged - average| / |average|` in Frobenius norm, PEFT's and that of gam-merge, for two
random adapters of one matrix and for two trained ones of `examples/pda_miniature`. Takes seconds:
`python benchmarks/peft_linear.py`.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from gam import load_adapter, merge_adapters

WORLD = Path(__file__).resolve().parents[1] / "examples" / "pda_miniature" / "record" / "world-0"


def random_pair(folder: Path) -> tuple[torch.nn.Module, list[Path]]:
    """Return a base of one 1024 x 1024 matrix, and the folders of two rank-8 adapters of it."""
    base = torch.nn.ModuleDict({"layer": torch.nn.Linear(1024, 1024, bias=False)})
    settings = peft.LoraConfig(r=8, target_modules=["layer"], init_lora_weights=False)
    adapted = peft.PeftModel(base, settings, adapter_name="first")
    adapted.add_adapter("second", settings)
    adapted.save_pretrained(folder)
    return adapted.unload(), [folder / "first", folder / "second"]


def trained_pair() -> tuple[torch.nn.Module, list[Path]]:
    """Return the student of the miniature and two of its deltas."""
    student = AutoModelForCausalLM.from_pretrained(WORLD / "student", dtype=torch.float32)
    return student, [WORLD / "A-own", WORLD / "B-own"]


def errors(base: torch.nn.Module, folders: list[Path]) -> tuple[float, float]:
    """Return the relative error of PEFT's `linear` and of gam-merge's, over all modules."""
    pair = [load_adapter(folder).modules for folder in folders]
    exact = {name: (pair[0][name].delta() + pair[1][name].delta()) / 2 for name in pair[0]}
    adapted = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="first")
    adapted.load_adapter(folders[1], adapter_name="second")
    adapted.base_model.add_weighted_adapter(
        ["first", "second"], [0.5, 0.5], "merged", combination_type="linear"
    )
    theirs = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("merged")
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }
    merged = merge_adapters(folders, method="linear", rank="sum", dtype="float32").modules
    ours = {name: update.delta() for name, update in merged.items()}
    return distance(theirs, exact), distance(ours, exact)


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Return the relative error in Frobenius norm, all modules taken as one vector."""
    assert found.keys() == exact.keys()
    error = sum((found[name] - exact[name]).square().sum().item() for name in exact)
    return (error / sum(update.square().sum().item() for update in exact.values())) ** 0.5


def main() -> None:
    """Print both errors for both pairs."""
    warnings.simplefilter("ignore")  # those of the libraries
    disable_progress_bar()
    torch.manual_seed(0)
    print(f"{'off by this share of the average':36}{'PEFT linear':>12}{'gam-merge linear':>18}")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        pairs = {
            "two random adapters, rank 8": random_pair(Path(folder)),
            "two trained deltas, rank 16": trained_pair(),
        }
        for title, (base, folders) in pairs.items():
            theirs, ours = errors(base, folders)
            print(f"{title:36}{theirs:12.2f}{ours:18.0e}")


if __name__ == "__main__":
    main()

"""What a run needs, looked at before its first stage: it would cost hours otherwise."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gam.errors import GamError, OptionError
from gam.pda.checks import check_chats, check_folder, check_models, check_questions
from gam.pda.files import write_json
from gam.pda.libraries import need
from gam.pda.models import is_server
from gam.pda.prompts import PromptFiles
from gam.pda.recipe import RunRecipe, merge_choices
from gam.pda.train import LIBRARIES, check_training

_WIDTH = 16  # of a stand-in
_WIDEST = 1024  # some methods form its matrices
_RESERVED = ("output", "overwrite")


def check_run(recipe: RunRecipe, prompts: PromptFiles, folder: Path) -> None:
    """Check all that the stages of a run need: quick things first, so that errors come at once.

    Args:
        recipe: Its values have been checked by themselves.
        prompts: Keeps what is read.
        folder: Of the run; made where it is missing.

    Raises:
        OptionError: A library is missing, or an option does not fit.
        DataError: A model or a file is missing or does not hold what it should.
        OutputError: The folder cannot be written.
    """
    need(*LIBRARIES, "matplotlib")
    check_models(
        {
            "student": recipe.student,
            **{
                f"family {family!r}: {role}": entry[role]
                for family, entry in recipe.families.items()
                for role in ("weak", "weaker")
            },
        }
    )
    if is_server(recipe.student):
        raise OptionError(f"student: got the server {recipe.student!r}, expected local weights.")
    asked = [prompts.load(entry["prompts"]) for entry in recipe.families.values()]
    for questions in (recipe.evaluated.validation, recipe.evaluated.test):
        asked.append(check_questions(prompts.load(questions), questions))
    check_chats(asked)
    check_folder(folder)
    objectives = {recipe.trained.objective, *({"sft"} & {*recipe.controls})}
    for objective in sorted(objectives):
        check_training(replace(recipe.trained, objective=objective))
    for name, options in recipe.merges.items():
        check_merge(name, options, len(recipe.families))


def check_merge(name: str, options: Mapping[str, Any], families: int) -> None:
    """Try a merge of a recipe with each number of deltas, on stand-ins for them.

    So every name and value is refused here that `gam.merge_adapters` would refuse after hours
    of training. What depends on the deltas themselves stays unknown: which modules they have,
    and whether a rank is more than these can use.

    Args:
        name: Of the merge.
        options: As the recipe has them.
        families: Greatest number of deltas.

    Raises:
        OptionError: The merge is refused.
    """
    from gam import merge_adapters

    fixed, choices = merge_choices(name, options)
    for choice in (fixed, *choices):
        for reserved in _RESERVED:
            if reserved in choice:
                raise OptionError(f"merges: {name!r}: {reserved}: a run has its own places.")
    counts = [(count, choices[0]) for count in range(1, families)]
    counts += [(families, choice) for choice in choices]
    with tempfile.TemporaryDirectory() as folder:
        for count, choice in counts:
            given, width = _narrowed({**fixed, **choice})
            stand_ins = [Path(folder) / str(index) / "adapter" for index in range(count)]
            for seed, path in enumerate(stand_ins):
                _write_stand_in(path, seed, width, given.get("modules"))
            try:
                merge_adapters([*map(str, stand_ins)], **given)
            except GamError as error:
                text = f"merges: {name!r} of {count} deltas: {error}"
                raise OptionError(text.rstrip(".") + ".") from None


def _narrowed(options: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return options whose rank a stand-in can have, and the width of that stand-in."""
    rank = options.get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool):
        return dict(options), _WIDTH
    return {**options, "rank": min(rank, _WIDEST)}, max(_WIDTH, min(rank, _WIDEST))


def _write_stand_in(folder: Path, seed: int, width: int, patterns: Any) -> None:
    """Write a random adapter of rank 2 with modules that the patterns of a recipe match."""
    import torch
    from safetensors.torch import save_file

    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    for pattern in patterns if isinstance(patterns, Mapping) else ():
        # A module in a layer, for gradients over the layers.
        name = re.sub(r"\[!?(.).*?\]", r"\1", str(pattern)).replace("*", "0.").replace("?", "0")
        if name not in names and fnmatchcase(name, str(pattern)):
            names.append(name)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        for side, shape in (("A", (2, width)), ("B", (width, 2))):
            key = f"base_model.model.{name}.lora_{side}.weight"
            tensors[key] = torch.randn(shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "target_modules": names}
    write_json(folder / "adapter_config.json", config)

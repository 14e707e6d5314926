"""The recipe of a run: read from YAML, with every name and value checked that needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gam.errors import OptionError
from gam.pda.files import Row, read_text
from gam.pda.models.base import DTYPES, Generation
from gam.pda.prompts import PromptSettings
from gam.pda.scores import SCORES, compiled, extractor_pattern
from gam.pda.settings import settings_from
from gam.pda.train import Training
from gam.recipes.document import parse

CONTROLS = ("joint", "sequential", "sft", "swapped")
POLICIES = ("shared", "own")

_MAPPINGS = ("families", "evaluation", "generation", "training", "merges", "prompts")
_LISTS: Mapping[str, Sequence[str]] = {"controls": CONTROLS, "lora_seeds": POLICIES}


@dataclass(frozen=True)
class Evaluation:
    """What is asked in an evaluation, and how it is scored.

    Attributes:
        validation: File of the questions that choose.
        test: File of the questions that are reported.
        extractor: See `gam.pda.scores.extract`.
        score: "exact" or "f1".
        answers: Settings of the answers.
    """

    validation: str
    test: str
    extractor: str
    score: str
    answers: Generation

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Evaluation:
        """Return what the names and values of a recipe say.

        Raises:
            OptionError: A name is unknown or missing, or a value is refused.
        """
        rest = {"extractor": "text", "score": SCORES[0], **values}
        for name in ("validation", "test"):
            if name not in rest:
                raise OptionError(f"evaluation: {name!r} is missing.")
        own = {name: rest.pop(name) for name in ("validation", "test", "extractor", "score")}
        for name, value in own.items():
            if not isinstance(value, str):
                raise OptionError(f"evaluation: {name}: got {value!r}, expected text.")
        if own["score"] not in SCORES:
            listed = ", ".join(SCORES)
            raise OptionError(
                f"evaluation: score: got {own['score']!r}, expected one of: {listed}."
            )
        try:
            extractor_pattern(own["extractor"])
        except OptionError as error:
            raise OptionError(f"evaluation: {error}") from None
        return cls(**own, answers=settings_from(Generation, rest, "evaluation"))


@dataclass(frozen=True)
class RunRecipe:
    """What a run does; the names are those of the YAML file.

    Attributes:
        student: Model to improve.
        families: Name to ``weak``, ``weaker`` and ``prompts``, and optionally ``keep``.
        evaluation: ``validation`` and ``test`` files, ``extractor``, ``score`` ("exact" or
            "f1"), and settings of the answers.
        generation: Settings of the answers for pairs.
        training: Settings of the adapters, over the defaults of `Training`.
        merges: Name to the options of `gam.merge_adapters`, and optionally ``tune``: an option
            and a list of values, of which the best on the validation questions is used.
        lora_seeds: "shared": all adapters start from the same LoRA weights; "own": each from
            its own.
        controls: Which of the controls to train.
        prompts: ``column``, ``chat``, ``system`` and ``limit`` of all prompts.
        dtype: Of the models that answer.
        seed: Of the run.
        threads: Of the CPU; None for the library's choice. Tiny models are fastest with one.
    """

    student: str
    families: Mapping[str, Mapping[str, str]]
    evaluation: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    merges: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {"gam": {"method": "gam"}}
    )
    lora_seeds: Sequence[str] = ("shared",)
    controls: Sequence[str] = ()
    prompts: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    seed: int = 0
    threads: int | None = None

    @cached_property
    def trained(self) -> Training:
        """The settings of the adapters."""
        return settings_from(Training, self.training, "training")

    @cached_property
    def generated(self) -> Generation:
        """The settings of the answers for pairs."""
        return settings_from(Generation, self.generation, "generation")

    @cached_property
    def evaluated(self) -> Evaluation:
        """What the evaluation asks."""
        return Evaluation.parse(self.evaluation)

    def check(self) -> None:
        """Check every value that needs no file, library or model.

        Raises:
            OptionError: A value is refused.
        """
        _check_types(self)
        _check_families(self.families)
        for name, options in self.merges.items():
            merge_choices(name, options)
        settings_from(PromptSettings, self.prompts, "prompts")
        _ = self.trained, self.generated, self.evaluated


def read_run_recipe(path: Path) -> RunRecipe:
    """Return the recipe in a YAML file, checked; paths in it are relative to the file.

    Raises:
        DataError: The file cannot be read.
        OptionError: A name is unknown or missing, or a value is none that it may have.
    """
    where = f"recipe {str(path)!r}"
    values, lines = parse(read_text(path), where)
    if not isinstance(values, dict):
        raise OptionError(f"{where}: got {values!r}, expected names and values.")
    known = RunRecipe.__dataclass_fields__
    for name in values:
        if name not in known:
            place = f"{where}, line {lines[name,]}"
            raise OptionError(f"{place}: unknown {name!r}; expected {', '.join(known)}.")
    for name in ("student", "families", "evaluation"):
        if name not in values:
            raise OptionError(f"{where}: {name!r} is missing.")
    recipe = RunRecipe(**values)
    try:
        recipe.check()
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None
    return _placed(recipe, path.parent)


def merge_choices(
    name: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the options of a merge without ``tune``, and the options to choose from.

    Raises:
        OptionError: ``tune`` is not one option and a list.
    """
    if not isinstance(options, Mapping):
        raise OptionError(f"merges: {name!r}: got {options!r}, expected options and values.")
    fixed = dict(options)
    tune = fixed.pop("tune", {})
    wrong = not isinstance(tune, Mapping) or len(tune) > 1
    if wrong or not all(isinstance(values, list) and values for values in tune.values()):
        raise OptionError(f"merges: {name!r}: tune: got {tune!r}, expected one option and a list.")
    choices = [{key: value} for key, values in tune.items() for value in values]
    return fixed, choices or [{}]


def _check_types(recipe: RunRecipe) -> None:
    for name in _MAPPINGS:
        value = getattr(recipe, name)
        if not isinstance(value, Mapping):
            raise OptionError(f"{name}: got {value!r}, expected names and values.")
    for name, choices in _LISTS.items():
        value = getattr(recipe, name)
        if not isinstance(value, (list, tuple)) or (name == "lora_seeds" and not value):
            raise OptionError(f"{name}: got {value!r}, expected a list of {', '.join(choices)}.")
        for item in value:
            if item not in choices:
                raise OptionError(f"{name}: got {item!r}, expected one of: {', '.join(choices)}.")
    if recipe.dtype not in DTYPES:
        raise OptionError(f"dtype: got {recipe.dtype!r}, expected one of: {', '.join(DTYPES)}.")
    if not isinstance(recipe.student, str) or not recipe.student:
        raise OptionError(f"student: got {recipe.student!r}, expected a folder or a name.")
    if not _is_whole(recipe.seed):
        raise OptionError(f"seed: got {recipe.seed!r}, expected a whole number.")
    if recipe.threads is not None and not (_is_whole(recipe.threads) and recipe.threads > 0):
        raise OptionError(f"threads: got {recipe.threads!r}, expected a whole number above 0.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_families(families: Mapping[str, Any]) -> None:
    if not families:
        raise OptionError("families: got none, expected at least one.")
    wanted = {"weak", "weaker", "prompts"}
    for family, entry in families.items():
        names = {*entry} if isinstance(entry, Mapping) else set()
        if not wanted <= names <= {*wanted, "keep"}:
            raise OptionError(
                f"family {family!r} needs weak, weaker and prompts, and may have keep; got "
                f"{', '.join(sorted(names)) or repr(entry)}."
            )
        for name, value in entry.items():
            if not isinstance(value, str):
                raise OptionError(f"family {family!r}: {name}: got {value!r}, expected text.")
        try:
            compiled(entry.get("keep"), "keep")
        except OptionError as error:
            raise OptionError(f"family {family!r}: {error}") from None


def _placed(recipe: RunRecipe, folder: Path) -> RunRecipe:
    """Return the recipe with the paths that are there seen from the folder of its file."""

    def beside(source: str) -> str:
        return str(folder / source) if (folder / source).exists() else source

    families: Row = {
        family: {k: v if k == "keep" else beside(v) for k, v in entry.items()}
        for family, entry in recipe.families.items()
    }
    evaluation = {
        k: beside(v) if k in ("validation", "test") else v for k, v in recipe.evaluation.items()
    }
    return replace(recipe, student=beside(recipe.student), families=families, evaluation=evaluation)

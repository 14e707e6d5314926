"""The whole loop from one recipe: pairs, deltas, merges, controls, scores, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gam.errors import OptionError
from gam.pda.evaluate import adapted, difference, estimate, score_answers
from gam.pda.generate import Generation, Local
from gam.pda.pairs import make_pairs
from gam.pda.prompts import Prompt, load_prompts
from gam.pda.records import (
    Row,
    content_digest,
    digest,
    library_versions,
    read_json,
    read_rows,
    read_text,
    settings_from,
    write_json,
    write_rows,
)
from gam.pda.train import RECORD_NAME, Training, train_adapter
from gam.recipes.document import parse

CONTROLS = ("joint", "sequential", "sft", "swapped")
POLICIES = ("shared", "own")


@dataclass(frozen=True)
class Recipe:
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


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a YAML file; paths in it are relative to the file.

    Raises:
        OptionError: A name is unknown or missing, or a value is none that it may have.
    """
    where = f"recipe {str(path)!r}"
    values, lines = parse(read_text(path), where)
    if not isinstance(values, dict):
        raise OptionError(f"{where}: expected names and values.")
    known = Recipe.__dataclass_fields__
    for name in values:
        if name not in known:
            place = f"{where}, line {lines[name,]}"
            raise OptionError(f"{place}: unknown {name!r}; expected {', '.join(known)}.")
    for name in ("student", "families", "evaluation"):
        if name not in values:
            raise OptionError(f"{where}: {name!r} is missing.")
    recipe = Recipe(**values)
    for name in ("validation", "test"):
        if name not in recipe.evaluation:
            raise OptionError(f"{where}: evaluation: {name!r} is missing.")
    for family, entry in recipe.families.items():
        if not {"weak", "weaker", "prompts"} <= {*entry} <= {"weak", "weaker", "prompts", "keep"}:
            raise OptionError(
                f"{where}: family {family!r} needs weak, weaker and prompts, and may have keep; "
                f"got {', '.join(entry)}."
            )
    for name, choices in (("controls", CONTROLS), ("lora_seeds", POLICIES)):
        for value in getattr(recipe, name):
            if value not in choices:
                raise OptionError(f"{where}: {name}: got {value!r}, expected {', '.join(choices)}.")

    def beside(source: str) -> str:
        return str(path.parent / source) if (path.parent / source).exists() else source

    return replace(
        recipe,
        student=beside(recipe.student),
        families={
            family: {k: v if k == "keep" else beside(v) for k, v in entry.items()}
            for family, entry in recipe.families.items()
        },
        evaluation={
            k: beside(v) if k in ("validation", "test") else v for k, v in recipe.evaluation.items()
        },
    )


class Run:
    """A run of a recipe in a folder.

    Each stage has a folder of its own, named after the contents of what goes into it, so that a
    stage is done once however often the run is started, and again if anything in it changed.

    Args:
        recipe: What to do.
        folder: Where the stages lie.
        say: Called with a line for each stage that is not there yet.
    """

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        """Check the settings; nothing is read or written yet."""
        self.recipe = recipe
        self.folder = folder
        self.say = say
        self.training = settings_from(Training, recipe.training, "training")
        self.generation = settings_from(Generation, recipe.generation, "generation")
        evaluation = {**recipe.evaluation}
        self.questions = {name: str(evaluation.pop(name)) for name in ("validation", "test")}
        self.extractor = str(evaluation.pop("extractor", "text"))
        self.score = str(evaluation.pop("score", "exact"))
        self.answers = settings_from(Generation, evaluation, "evaluation")
        self.rows: list[Row] = []
        self.used: set[Path] = set()
        self.cpu_seconds = 0.0

    def results(self) -> Row:
        """Do what is not done yet, and return the results: see `gam.pda.report`."""
        recipe = self.recipe
        if recipe.threads is not None:
            import torch

            torch.set_num_threads(recipe.threads)
        student = self.scored("student", None)
        self.add("student", "student", student)
        pairs = {family: self.pairs(family) for family in recipe.families}
        for family, entry in recipe.families.items():
            for role in ("weak", "weaker"):
                name = f"{role} {family}"
                self.add(name, role, self.scored(name, None, model=entry[role]))
        orders = {policy: self.policy(policy, pairs, student) for policy in recipe.lora_seeds}
        self.controls(pairs, orders[recipe.lora_seeds[0]], student)
        return {
            "rows": self.rows,
            "score": self.score,
            "order": orders,
            "pairs": {f: read_json(p / "pairs.json")["summary"] for f, p in pairs.items()},
            "recipe": asdict(recipe),
            "versions": library_versions(),
            "cpu_seconds": round(self.cpu_seconds, 1),
        }

    def policy(self, policy: str, pairs: Mapping[str, Path], student: Path) -> list[str]:
        """Train the deltas of one seed policy, merge them, score all; return their order."""
        deltas = {
            family: self.delta(f"{family}-{policy}", pairs[family], self.seed(policy, index))
            for index, family in enumerate(pairs)
        }
        validation = {
            f: self.mean(self.scored(f"{f}-{policy}", d, "validation")) for f, d in deltas.items()
        }
        order = sorted(deltas, key=lambda family: -validation[family])
        scores = {f: self.scored(f"{f}-{policy}", deltas[f]) for f in order}
        best = scores[order[0]]
        add = partial(self.add, policy=policy, student=student)
        for family in order:
            add(f"delta {family}", "delta", scores[family], adapter=deltas[family])
        for name, options in self.recipe.merges.items():
            for count in range(1, len(order) + 1):
                stage = f"{name}-{count}-{policy}"
                adapter, more = self.merged(stage, [deltas[f] for f in order[:count]], options)
                score = self.scored(stage, adapter)
                add(name, "merge", score, adapter=adapter, best=best, n=count, **more)
        return order

    def controls(self, pairs: Mapping[str, Path], order: Sequence[str], student: Path) -> None:
        """Train and score the controls, with the first seed policy and its order of families."""

        def add(name: str, count: int, stage: str, adapter: Path) -> None:
            score = self.scored(stage, adapter)
            self.add(name, "control", score, adapter=adapter, student=student, n=count)

        wanted, seed = self.recipe.controls, self.seed(self.recipe.lora_seeds[0], 0)
        first = pairs[order[0]]
        if "joint" in wanted:
            joint = self.delta("joint", self.union([pairs[f] for f in order]), seed)
            add("joint", len(order), "joint", joint)
        if "sequential" in wanted:
            adapter = None
            for count, family in enumerate(order, 1):
                adapter = self.delta(f"sequential-{count}", pairs[family], seed, start=adapter)
                if count > 1:
                    add("sequential", count, f"sequential-{count}", adapter)
        if "sft" in wanted:
            sft = self.delta("sft", first, seed, objective="sft")
            add(f"sft on {order[0]}", 1, "sft", sft)
        if "swapped" in wanted:
            swapped = self.delta("swapped", first, seed, swap=True)
            add(f"swapped {order[0]}", 1, "swapped", swapped)

    def seed(self, policy: str, index: int) -> int:
        """Return the seed of the LoRA weights of a family's adapter."""
        return self.recipe.seed + (index if policy == "own" else 0)

    def pairs(self, family: str) -> Path:
        """Return the folder with the pairs of a family."""
        entry = self.recipe.families[family]
        prompts = load_prompts(entry["prompts"], **self.recipe.prompts)

        def build(folder: Path) -> None:
            make_pairs(
                prompts,
                entry["weak"],
                entry["weaker"],
                folder,
                self.generation,
                keep=entry.get("keep"),
                dtype=self.recipe.dtype,
            )

        inputs = {
            "weak": content_digest(entry["weak"]),
            "weaker": content_digest(entry["weaker"]),
            "prompts": digest([[p.id, p.text] for p in prompts]),
            "keep": entry.get("keep"),
            "generation": self.generation.record(),
            "dtype": self.recipe.dtype,
        }
        return self.stage("pairs", family, inputs, build)

    def union(self, folders: Sequence[Path]) -> Path:
        """Return a folder with the pairs of several, in turn."""

        def build(folder: Path) -> None:
            sets = [read_rows(source / "pairs.jsonl") for source in folders]
            longest = max(map(len, sets))
            write_rows(
                folder / "pairs.jsonl", [s[i] for i in range(longest) for s in sets if i < len(s)]
            )

        inputs = {"pairs": [content_digest(f / "pairs.jsonl") for f in folders]}
        return self.stage("pairs", "joint", inputs, build)

    def delta(
        self,
        name: str,
        pairs: Path,
        lora_seed: int,
        *,
        objective: str | None = None,
        start: Path | None = None,
        swap: bool = False,
    ) -> Path:
        """Return the folder of an adapter trained on pairs."""
        settings = replace(
            self.training,
            objective=objective or self.training.objective,
            lora_seed=lora_seed,
            data_seed=self.recipe.seed,
        )

        def build(folder: Path) -> None:
            if (folder / "adapter" / RECORD_NAME).exists():
                return  # stopped just before the stage was done
            train_adapter(
                self.recipe.student,
                pairs / "pairs.jsonl",
                folder / "adapter",
                settings,
                start=start,
                swap=swap,
            )

        inputs = {
            "student": content_digest(self.recipe.student),
            "pairs": content_digest(pairs / "pairs.jsonl"),
            "settings": asdict(settings),
            "start": None if start is None else _adapter_digest(start),
            "swap": swap,
        }
        return self.stage("deltas", name, inputs, build) / "adapter"

    def merged(
        self, name: str, adapters: Sequence[Path], options: Mapping[str, Any]
    ) -> tuple[Path, Row]:
        """Return a merged adapter, and the size and the value chosen on validation."""
        from gam import merge_adapters

        options = dict(options)
        tune = options.pop("tune", {})
        if not isinstance(tune, dict) or len(tune) > 1 or not all(tune.values()):
            raise OptionError(f"merge {name!r}: tune needs one option and a list, got {tune!r}.")
        choices = [{key: value} for key, values in tune.items() for value in values] or [{}]
        found = []
        for chosen in choices:

            def build(folder: Path, chosen: Row = chosen) -> None:
                merged = merge_adapters([*map(str, adapters)], **options, **chosen)
                assert merged.report is not None
                merged.save(folder / "adapter", overwrite=True)
                write_json(folder / "norm.json", merged.report.norm_ratio)

            inputs = {"adapters": [*map(_adapter_digest, adapters)], **options, **chosen}
            folder = self.stage("merges", name, inputs, build)
            score = 0.0
            if len(choices) > 1:
                score = self.mean(self.scored(name, folder / "adapter", "validation"))
            found.append((score, folder, {**chosen, "norm": read_json(folder / "norm.json")}))
        _, best, more = max(found, key=lambda entry: entry[0])
        return best / "adapter", more

    def scored(
        self, name: str, adapter: Path | None, part: str = "test", *, model: str | None = None
    ) -> Path:
        """Return the scores of an adapter, of the student, or of another model."""
        source = model or self.recipe.student
        questions = self.loaded(part)

        def build(folder: Path) -> None:
            base = self.base if model is None else Local.load(model, self.recipe.dtype)
            with adapted(base, adapter) as answering:
                rows = score_answers(answering, questions, self.answers, self.extractor)
            write_rows(folder / "scores.jsonl", rows)

        inputs = {
            "model": content_digest(source),
            "adapter": None if adapter is None else _adapter_digest(adapter),
            "questions": content_digest(self.questions[part]),
            "prompts": dict(self.recipe.prompts),
            "answers": self.answers.record(),
            "extractor": self.extractor,
            "dtype": self.recipe.dtype,
        }
        return self.stage("scores", f"{name}-{part}", inputs, build) / "scores.jsonl"

    @cached_property
    def base(self) -> Local:
        """The student, loaded when first asked for."""
        return Local.load(self.recipe.student, self.recipe.dtype)

    def loaded(self, part: str) -> list[Prompt]:
        """Return the questions of a part."""
        return load_prompts(self.questions[part], **self.recipe.prompts)

    def mean(self, scores: Path) -> float:
        """Return the mean score."""
        return estimate([row[self.score] for row in read_rows(scores)]).mean

    def add(
        self,
        name: str,
        kind: str,
        scores: Path,
        policy: str = "",
        *,
        adapter: Path | None = None,
        student: Path | None = None,
        best: Path | None = None,
        **more: Any,
    ) -> None:
        """Add a row to the results: estimates, and differences to the student and best delta."""
        rows = read_rows(scores)
        entry: Row = {"name": name, "kind": kind, "policy": policy, **more}
        if adapter is not None:
            entry["adapter"] = str(adapter.relative_to(self.folder))
        for score in ("exact", "f1"):
            entry[score] = asdict(estimate([row[score] for row in rows]))
        for key, other in (("over_student", student), ("over_best", best)):
            if other is not None:
                entry[key] = asdict(difference(rows, read_rows(other), self.score))
        entry["questions"] = len(rows)
        self.rows.append(entry)

    def stage(
        self, kind: str, name: str, inputs: Mapping[str, Any], build: Callable[[Path], None]
    ) -> Path:
        """Return the folder of a stage; build it unless it is done."""
        key = digest([kind, inputs])[:12]
        folder = self.folder / kind / key
        record = folder / "done.json"
        if not record.exists():
            self.say(f"{kind}: {name}")
            folder.mkdir(parents=True, exist_ok=True)
            started = time.process_time()
            build(folder)
            write_json(
                record,
                {
                    "name": name,
                    "inputs": inputs,
                    "cpu_seconds": round(time.process_time() - started, 2),
                    "versions": library_versions(),
                },
            )
        if folder not in self.used:
            self.used.add(folder)
            self.cpu_seconds += read_json(record)["cpu_seconds"]
        return folder


def _adapter_digest(folder: Path) -> str:
    names = ("adapter_model.safetensors", "adapter_config.json")
    return digest([content_digest(folder / name) for name in names])

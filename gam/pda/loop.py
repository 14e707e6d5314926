"""A run of a recipe: pairs, deltas, merges, controls and scores, each stage done once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gam.pda.evaluate import score_answers
from gam.pda.files import Row, read_json, read_rows, write_json, write_rows
from gam.pda.libraries import library_versions
from gam.pda.models import open_model
from gam.pda.models.local import Local, adapted
from gam.pda.pairs import make_pairs
from gam.pda.preflight import check_run
from gam.pda.prompts import PromptFiles, PromptSettings
from gam.pda.provenance import content_digest, digest
from gam.pda.recipe import RunRecipe, merge_choices
from gam.pda.scores import difference, estimate
from gam.pda.stages import Stages
from gam.pda.train import RECORD_NAME, train_adapter
from gam.version import NUMERICS


class Run:
    """A run of a recipe in a folder; see `gam.pda.stages`.

    Args:
        recipe: What to do.
        folder: Where the stages lie.
        say: Called with a line for each stage that is not there yet.
    """

    def __init__(self, recipe: RunRecipe, folder: Path, say: Callable[[str], None]) -> None:
        """Check the recipe's values; nothing is read or written yet."""
        recipe.check()
        self.recipe = recipe
        self.evaluation = recipe.evaluated
        self.prompts = PromptFiles(PromptSettings(**recipe.prompts))
        self.stages = Stages(folder, say)
        self.rows: list[Row] = []

    def results(self) -> Row:
        """Do what is not done yet, and return the results: see `gam.pda.report`.

        Raises:
            GamError: Something is missing that a stage would need; then nothing is begun.
        """
        recipe = self.recipe
        check_run(recipe, self.prompts, self.stages.folder)
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
            "score": self.evaluation.score,
            "order": orders,
            "pairs": {f: read_json(p / "pairs.json")["summary"] for f, p in pairs.items()},
            "recipe": asdict(recipe),
            "versions": library_versions(),
            "cpu_seconds": round(self.stages.cpu_seconds, 1),
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
        prompts = self.prompts.load(entry["prompts"])

        def build(folder: Path) -> None:
            make_pairs(
                prompts,
                entry["weak"],
                entry["weaker"],
                folder,
                self.recipe.generated,
                keep=entry.get("keep"),
                dtype=self.recipe.dtype,
            )

        inputs = {
            "weak": content_digest(entry["weak"]),
            "weaker": content_digest(entry["weaker"]),
            "prompts": digest([[p.id, p.text] for p in prompts]),
            "keep": entry.get("keep"),
            "generation": self.recipe.generated.record(),
            "dtype": self.recipe.dtype,
        }
        return self.stages.get("pairs", family, inputs, build)

    def union(self, folders: Sequence[Path]) -> Path:
        """Return a folder with the pairs of several, in turn."""

        def build(folder: Path) -> None:
            sets = [read_rows(source / "pairs.jsonl") for source in folders]
            longest = max(map(len, sets))
            write_rows(
                folder / "pairs.jsonl", [s[i] for i in range(longest) for s in sets if i < len(s)]
            )

        inputs = {"pairs": [content_digest(f / "pairs.jsonl") for f in folders]}
        return self.stages.get("pairs", "joint", inputs, build)

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
            self.recipe.trained,
            objective=objective or self.recipe.trained.objective,
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
        return self.stages.get("deltas", name, inputs, build) / "adapter"

    def merged(
        self, name: str, adapters: Sequence[Path], options: Mapping[str, Any]
    ) -> tuple[Path, Row]:
        """Return a merged adapter, and the size and the value chosen on validation."""
        from gam import merge_adapters

        fixed, choices = merge_choices(name, options)
        found = []
        for chosen in choices:

            def build(folder: Path, chosen: Row = chosen) -> None:
                merged = merge_adapters([*map(str, adapters)], **fixed, **chosen)
                assert merged.report is not None
                merged.save(folder / "adapter", overwrite=True)
                write_json(folder / "norm.json", merged.report.norm_ratio)

            inputs = {
                "adapters": [*map(_adapter_digest, adapters)],
                **fixed,
                **chosen,
                "numerics": NUMERICS,
            }
            folder = self.stages.get("merges", name, inputs, build)
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
        asked = getattr(self.evaluation, part)
        questions = self.prompts.load(asked)

        def build(folder: Path) -> None:
            answers, extractor = self.evaluation.answers, self.evaluation.extractor
            if model is not None:
                other = open_model(model, self.recipe.dtype)
                rows = score_answers(other, questions, answers, extractor)
            else:
                with adapted(self.base, adapter) as answering:
                    rows = score_answers(answering, questions, answers, extractor)
            write_rows(folder / "scores.jsonl", rows)

        inputs = {
            "model": content_digest(source),
            "adapter": None if adapter is None else _adapter_digest(adapter),
            "questions": content_digest(asked),
            "prompts": dict(self.recipe.prompts),
            "answers": self.evaluation.answers.record(),
            "extractor": self.evaluation.extractor,
            "dtype": self.recipe.dtype,
        }
        return self.stages.get("scores", f"{name}-{part}", inputs, build) / "scores.jsonl"

    @cached_property
    def base(self) -> Local:
        """The student, loaded when first asked for."""
        return Local.load(self.recipe.student, self.recipe.dtype)

    def mean(self, scores: Path) -> float:
        """Return the mean score."""
        return estimate([row[self.evaluation.score] for row in read_rows(scores)]).mean

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
            entry["adapter"] = str(adapter.relative_to(self.stages.folder))
        for score in ("exact", "f1"):
            entry[score] = asdict(estimate([row[score] for row in rows]))
        for key, other in (("over_student", student), ("over_best", best)):
            if other is not None:
                entry[key] = asdict(difference(rows, read_rows(other), self.evaluation.score))
        entry["questions"] = len(rows)
        self.rows.append(entry)


def _adapter_digest(folder: Path) -> str:
    names = ("adapter_model.safetensors", "adapter_config.json")
    return digest([content_digest(folder / name) for name in names])

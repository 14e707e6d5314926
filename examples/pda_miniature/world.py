"""A small world with a known truth, in which preference deltas carry a signal by construction.

Six skills on digits each have a right answer and a misconception that never equals it. A corpus
teaches every (skill, context) cell its own mixture of the two, so a model trained on it is right
where the misconception is the rarer answer. The students of families differ in these mixtures;
no label anywhere says which answer is right.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Skill:
    """A skill: length of its problem in digits, the right answer and the misconception."""

    name: str
    digits: int
    right: Callable[[str], str]
    wrong: Callable[[str], str]


def _pairs(text: str) -> list[str]:
    return [text[i : i + 2] for i in range(0, len(text), 2)]


def _shift(text: str, by: int) -> str:
    return "".join(str((int(c) + by) % 10) for c in text)


def _flip(text: str, total: int) -> str:
    return "".join(str((total - int(c)) % 10) for c in text)


def _parted(text: str, first: str) -> str:
    return "".join(sorted(text, key=lambda c: c not in first))


def _middle(text: str, down: bool) -> str:
    return text[0] + "".join(sorted(text[1:-1], reverse=down)) + text[-1]


SKILLS: Mapping[str, Skill] = {
    "r": Skill("reverse", 5, lambda t: t[::-1], lambda t: t),
    "s": Skill("sort", 5, lambda t: "".join(sorted(t)), lambda t: "".join(sorted(t)[::-1])),
    "e": Skill("swap ends", 5, lambda t: t[-1] + t[1:-1] + t[0], lambda t: t[1] + t[0] + t[2:]),
    "t": Skill("rotate", 5, lambda t: t[2:] + t[:2], lambda t: t[-2:] + t[:-2]),
    "x": Skill("maximum", 6, lambda t: max(_pairs(t)), lambda t: _pairs(t)[0]),
    "n": Skill("minimum", 6, lambda t: min(_pairs(t)), lambda t: _pairs(t)[-1]),
    "i": Skill("increase", 5, lambda t: _shift(t, 1), lambda t: _shift(t, 9)),
    "c": Skill("complement", 5, lambda t: _flip(t, 9), lambda t: _flip(t, 10)),
    "l": Skill("last three", 6, lambda t: t[3:], lambda t: t[:3]),
    "o": Skill("odd first", 5, lambda t: _parted(t, "13579"), lambda t: _parted(t, "02468")),
    "m": Skill("sort middle", 5, lambda t: _middle(t, False), lambda t: _middle(t, True)),
    "d": Skill("every other", 6, lambda t: t[::2], lambda t: t[1::2]),
}


@dataclass(frozen=True)
class Size:
    """A model: width, layers, and steps of training."""

    width: int
    layers: int
    steps: int


@dataclass(frozen=True)
class Preset:
    """The size of a world.

    Attributes:
        skills: Letters of its skills.
        contexts: Letters of its contexts.
        families: Family to the two skills at which its weaker model is clearly worse.
        sizes: Role to its model.
    """

    skills: str
    contexts: str
    families: Mapping[str, str]
    sizes: Mapping[str, Size]

    @property
    def characters(self) -> str:
        """Every character of prompts and answers."""
        return "0123456789=" + self.skills + self.contexts


PRESETS = {
    "cpu": Preset(
        "rsetxn",
        "ABCDEFGHIJKLMNOP",
        {"A": "rs", "B": "et", "C": "xn"},
        {"student": Size(96, 3, 1000), "weak": Size(64, 2, 1000), "weaker": Size(48, 2, 800)},
    ),
    "gpu": Preset(
        "rsetxniclomd",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        {"A": "rs", "B": "et", "C": "xn", "D": "ic", "E": "lo"},
        {"student": Size(384, 6, 4000), "weak": Size(192, 4, 4000), "weaker": Size(128, 3, 3000)},
    ),
}

Rates = Mapping[tuple[str, str], float]


def split_of(problem: str) -> str:
    """Return "train", "prompts", "validation" or "test" for a problem, whatever its context."""
    share = hashlib.sha256(problem.encode()).digest()[0] / 256
    return (
        "train"
        if share < 0.6
        else "prompts"
        if share < 0.8
        else "validation"
        if share < 0.9
        else "test"
    )


def corpus_rates(preset: Preset, seed: int, role: str, family: str = "") -> Rates:
    """Return the misconception rate of every (skill, context) cell of a corpus.

    Args:
        preset: Of the world.
        seed: Of the world; the part that all corpora share is drawn from it alone.
        role: "student", or "weak" or "weaker" of a family.
        family: Its name.
    """
    shared, own = random.Random(f"{seed} shared"), random.Random(f"{seed} {name_of(role, family)}")
    general, special = {"student": (-0.2, -0.2), "weak": (0.4, 0.0), "weaker": (0.5, 1.0)}[role]
    theirs = preset.families.get(family, "")
    return {
        (skill, context): 1
        / (1 + math.exp(-(1.5 * shared.gauss(0, 1) + 0.5 * own.gauss(0, 1) + shift)))
        for skill in preset.skills
        for shift in [special if skill in theirs else general]
        for context in preset.contexts
    }


def name_of(role: str, family: str) -> str:
    """Return the name of a model and of its corpus."""
    return f"{role}-{family}" if family else role


def problems(stream: random.Random, skill: str, split: str) -> Iterator[str]:
    """Yield random problems of one split whose right answer is not the misconception."""
    kind = SKILLS[skill]
    while True:
        text = "".join(stream.choices("0123456789", k=kind.digits))
        if split_of(text) == split and kind.right(text) != kind.wrong(text):
            yield text


def examples(preset: Preset, stream: random.Random, rates: Rates) -> Iterator[tuple[str, str]]:
    """Yield (prompt, answer) of a corpus, skills and contexts in equal shares."""
    sources = {skill: problems(stream, skill, "train") for skill in preset.skills}
    while True:
        skill, context = stream.choice(preset.skills), stream.choice(preset.contexts)
        problem = next(sources[skill])
        kind = SKILLS[skill]
        wrong = stream.random() < rates[skill, context]
        yield f"{skill}{context}{problem}=", (kind.wrong if wrong else kind.right)(problem)


def questions(preset: Preset, seed: str, split: str, per_skill: int) -> list[dict[str, Any]]:
    """Return prompts of a split with their right answers, none twice."""
    rows = []
    for skill in preset.skills:
        kind = SKILLS[skill]
        stream, seen = random.Random(f"{seed} {split} {skill}"), set()
        for problem in problems(stream, skill, split):
            prompt = f"{skill}{stream.choice(preset.contexts)}{problem}="
            if prompt not in seen:
                seen.add(prompt)
                rows.append({"prompt": prompt, "answer": kind.right(problem), "skill": kind.name})
            if len(seen) == per_skill:
                break
    random.Random(f"{seed} {split} order").shuffle(rows)
    return rows

"""What stage 1 learns from this world beside pictures (envs/base.py, `Grounding`): names, sentences, places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vla_nodes.envs.base import Sentence
from vla_nodes.envs.tabletop import held_out, instructions, mjcf, vocabulary
from vla_nodes.envs.tabletop.scene import CABINET_POSITION, COLORS, DRAWER_TRAVEL, GRASPABLE, HALF_HEIGHT
from vla_nodes.envs.tabletop.tasks import RELATIONS, Task, destination, kind_of

SHUT = 0.08  # m of drawer travel below which nothing can be put inside
REFERENCE_X, REFERENCE_Y = (0.30, 0.66), (-0.16, 0.31)  # m: where made-up references stand
UNUSUAL = 0.5  # share of `unusual` sentences that name something of a category nobody knows


class TabletopGrounding:
    """See `envs.base.Grounding`."""

    appearances = (*COLORS, "")
    categories = ("block", "can", "bowl", "tray", "drawer", "")
    movable = GRASPABLE
    containers = ("bowl", "tray")
    verbs = ("pick", "place", "open", "close", *RELATIONS)
    state = ("drawer_opening",)
    held_out_axes = ("pairs", "phrasings", "synonyms")  # of held_out.AXES, those that are a matter of words

    def describe(self, name: str) -> tuple[str, str]:
        appearance, _, category = name.rpartition(" ")
        return appearance, category

    def about(self, things: list[str], rng: np.random.Generator) -> Sentence:
        return _sentence(*random_instruction(things, rng))

    def imagined(self, rng: np.random.Generator) -> Sentence:
        return _sentence(*imagined(rng))

    def plain(self, rng: np.random.Generator) -> Sentence:
        _, task = imagined(rng)
        return _sentence(instructions.plain(task) if task else str(rng.choice(vocabulary.SMALL_TALK)), task)

    def unusual(self, rng: np.random.Generator) -> Sentence:
        text, task = imagined(rng)
        if task is None or rng.random() > UNUSUAL:
            return _sentence(text, task)
        roles = [role for role in ("target", "reference") if kind_of(getattr(task, role)) in GRASPABLE]
        if not roles:
            return _sentence(text, task)
        color, kind = str(rng.choice(list(COLORS))), str(rng.choice(vocabulary.OTHER_KINDS))
        renamed: dict[str, Any] = {str(rng.choice(roles)): f"{color} {kind}"}
        task = replace(task, **renamed)
        return _sentence(instructions.phrase(task, rng), task)

    def held_out(self, axis: str, rng: np.random.Generator) -> Sentence:
        while True:
            _, task = imagined(rng)
            if task is None:
                continue
            if axis == "pairs":
                kind, color = sorted(held_out.PAIRS)[rng.integers(len(held_out.PAIRS))]
                if kind_of(task.target) not in GRASPABLE or f"{color} {kind}" == task.reference:
                    continue
                task = Task(task.verb, f"{color} {kind}", task.reference, task.relation)
            return _sentence(instructions.phrase(task, rng, axis), task)

    def feasible(self, step: Task, at: int, state: Mapping[str, np.ndarray]) -> bool:
        """An open drawer may be the doing of an earlier step of the sentence."""
        return not (step.reference == "drawer" and at == 0 and float(state["drawer_opening"]) < SHUT)

    def place_position(self, step: Task, reference: np.ndarray) -> np.ndarray:
        return destination(step, reference)

    def reference_position(self, step: Task, rng: np.random.Generator) -> np.ndarray:
        """Anywhere on the table; the drawer, which stands where it stands, anyhow open."""
        if step.reference == "drawer":
            return np.array([*CABINET_POSITION, 0.0]) + mjcf.handle_offset() - [rng.uniform(0, DRAWER_TRAVEL), 0, 0]
        lower, upper = zip(REFERENCE_X, REFERENCE_Y, strict=True)
        return np.array([*rng.uniform(lower, upper), HALF_HEIGHT.get(kind_of(step.reference), 0.0)])


def _sentence(text: str, task: Task | None) -> Sentence:
    return Sentence(text, tuple(task.steps) if task else ())


def _asked_for(name: str) -> bool:
    """Whether sentences may ask for an object of this name: not for one whose color has no name."""
    return kind_of(name) in GRASPABLE and name.split()[0] in COLORS


def random_step(things: list[str], rng: np.random.Generator) -> Task:
    """One step about a scene of ``things``: mostly doable, sometimes naming what is absent."""
    objects = [t for t in things if _asked_for(t)]
    goals = [t for t in things if t in ("bowl", "tray")]
    absent = [n for n in instructions.KNOWN if n not in objects]
    alike = [t for t in absent if any(t.split()[0] == o.split()[0] for o in objects)]  # right colour, other kind

    def thing(avoid: str = "") -> str:
        draw, there = rng.random(), [o for o in objects if o != avoid]
        return str(rng.choice(alike if alike and draw < 0.14 else absent if draw < 0.24 or not there else there))

    def container() -> str:
        missing = [g for g in ("bowl", "tray") if g not in goals]
        return str(rng.choice(missing if missing and (not goals or rng.random() < 0.15) else goals))

    draw, first = rng.random(), thing()
    if draw < 0.15:
        return Task("open" if rng.random() < 0.5 else "close", "drawer")
    if draw < 0.38:
        return Task("pick", first)
    if draw < 0.60:
        return Task("place", first, "drawer" if rng.random() < 0.6 else container())
    goal = container() if rng.random() < 0.4 else thing(avoid=first)
    if draw < 0.70 and kind_of(goal) in GRASPABLE and goal != first:
        return Task("place", first, goal)
    if goal == first:
        goal = container()
    return Task("place", first, goal, str(rng.choice(RELATIONS)))


def random_instruction(things: list[str], rng: np.random.Generator) -> tuple[str, Task | None]:
    """A sentence about a scene of ``things``, with one step or two; sometimes noise."""
    if rng.random() < 0.10:
        about = tuple(t for t in things if t in instructions.KNOWN)
        return instructions.unrelated(rng, about or instructions.KNOWN), None
    task = random_step(things, rng)
    if rng.random() < 0.4:
        second = random_step(things, rng)
        if task.verb == "open" and rng.random() < 0.5:
            objects = [t for t in things if _asked_for(t)] or ["red block"]
            second = Task("place", str(rng.choice(objects)), "drawer")
        if task.verb != "pick" and second != task:
            task = Task(task.verb, task.target, task.reference, task.relation, second)
    return instructions.phrase(task, rng), task


def imagined(rng: np.random.Generator) -> tuple[str, Task | None]:
    """A sentence about a scene that is nowhere drawn."""
    return random_instruction(["bowl", "tray", "drawer", *rng.permutation(instructions.KNOWN)[:5].tolist()], rng)

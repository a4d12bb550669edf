"""Stage 1's examples: one recorded frame, any instruction about it, and where the answer is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vla_nodes.datasets import episode as episodes
from vla_nodes.envs.tabletop import instructions
from vla_nodes.envs.tabletop.scene import COLORS, GRASPABLE
from vla_nodes.envs.tabletop.tasks import RELATIONS, Task, destination, kind_of
from vla_nodes.training.examples import number

SHADES = (*COLORS, "")
KINDS = ("block", "can", "bowl", "tray", "drawer", "")
NO_NAME = 255  # in place of an index: a colour or a shape that nothing is asked about


def named(name: str) -> tuple[int, int]:
    """(index in SHADES, index in KINDS) of a thing as people call it, NO_NAME where it has none; "" is nothing."""
    color, kind = name.split()[0] if " " in name else "", kind_of(name)
    return (SHADES.index(color) if color in SHADES else NO_NAME), (KINDS.index(kind) if kind in KINDS else NO_NAME)


class Frame(NamedTuple):
    """One example: an image, a sentence, and one step of it. ``cells`` is uint8: 1 the thing, 2 the goal."""

    tick: int  # of its episode
    color: np.ndarray  # (S, S, 3) uint8
    depth: np.ndarray  # (S, S) float32 m
    intrinsics: np.ndarray  # (3, 3)
    camera_pose: np.ndarray  # (4, 4)
    tool: np.ndarray  # (3,)
    text: str
    step: int  # which step of the sentence the rest is about
    steps: int  # how many it has
    cells: np.ndarray  # (h, w) uint8
    shown: np.ndarray  # (2, h, w) uint8: what stands in every cell, as `named` says
    centre: np.ndarray  # (3, h, w) m in base: the middle of what stands there
    wanted: np.ndarray  # (2,) bool: the step names a thing, a goal
    present: np.ndarray  # (2,) bool: it is in the scene
    middle: np.ndarray  # (2, 3) m in base; zero when absent
    aim: np.ndarray  # (3,) m in base where the thing is to be put; nan when nowhere
    grounded: bool  # understood, possible, and all it names is in the scene


def random_step(things: list[str], rng: np.random.Generator) -> Task:
    """One step about a scene of ``things``: mostly doable, sometimes naming what is absent."""
    objects = [t for t in things if kind_of(t) in GRASPABLE and named(t)[0] != NO_NAME]
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
            objects = [t for t in things if kind_of(t) in GRASPABLE and named(t)[0] != NO_NAME] or ["red block"]
            second = Task("place", str(rng.choice(objects)), "drawer")
        if task.verb != "pick" and second != task:
            task = Task(task.verb, task.target, task.reference, task.relation, second)
    return instructions.phrase(task, rng), task


def imagined(rng: np.random.Generator) -> tuple[str, Task | None]:
    """A sentence about a scene that is nowhere drawn."""
    return random_instruction(["bowl", "tray", "drawer", *rng.permutation(instructions.KNOWN)[:5].tolist()], rng)


class FrameSampler:
    """Draws frames from folders of episodes. What it draws follows from the generator alone, also from threads."""

    def __init__(self, folders: Path | Sequence[Path], held_out: bool = False, every: int = 12) -> None:
        """Every ``every``-th episode, by number, is held out for measuring and never trained on."""
        found = [p for folder in ([folders] if isinstance(folders, Path) else folders) for p in episodes.files(folder)]
        self.paths = [p for p in found if (number(p) % every == 0) == held_out]
        self._cache: dict[Path, episodes.Episode] = {}
        self.damaged: dict[Path, str] = {}

    def draw(self, rng: np.random.Generator) -> Frame:
        return self.questions(rng, 1)[0]

    def questions(self, rng: np.random.Generator, count: int) -> list[Frame]:
        """One image and ``count`` sentences about it: the image is what costs.

        DataError when there is no episode, or none that can be used.
        """
        while len(self.damaged) < len(self.paths):
            path = self.paths[rng.integers(len(self.paths))]
            inner = np.random.default_rng(rng.integers(2**63))  # a damaged file costs as many draws however it is met
            if path in self.damaged:
                continue
            try:
                episode = self._cache.get(path) or episodes.read(path)
                self._cache[path] = episode
                first = self._frame(episode, int(inner.integers(len(episode))), inner)
                return [first, *(self._frame(episode, first.tick, inner, first) for _ in range(count - 1))]
            except episodes.DataError as error:
                if path not in self.damaged:
                    print(f"skipped: {error}", flush=True)
                self.damaged[path] = str(error)
        raise episodes.DataError(next(iter(self.damaged.values()), "no episode to draw from"))

    def _frame(self, episode: episodes.Episode, tick: int, rng: np.random.Generator, like: Frame | None = None
               ) -> Frame:  # fmt: skip
        episode.require("things", "segmentation", "thing_positions", "drawer_opening")
        episode.require("intrinsics", "camera_pose", "ee_pose")
        header, things = episode.header, list(episode.header["things"])
        text, task = random_instruction(things, rng)
        steps = list(task.steps) if task else []
        at = int(rng.integers(len(steps))) if steps else 0
        segmentation, places = episode.arrays["segmentation"][tick], episode.arrays["thing_positions"][tick]
        cells = np.zeros_like(segmentation)
        wanted, present, middle = np.zeros(2, bool), np.zeros(2, bool), np.zeros((2, 3), np.float32)
        aim, possible = np.full(3, np.nan, np.float32), bool(steps)
        if steps:
            step = steps[at]
            for role, name in enumerate((step.target, step.reference)):
                wanted[role] = bool(name)
                if name in things:
                    index = things.index(name)
                    present[role] = True
                    middle[role] = places[index]
                    cells[segmentation == index + 1] = role + 1
            if present[1]:
                aim = destination(step, places[things.index(step.reference)]).astype(np.float32)
            shut = float(episode.arrays["drawer_opening"][tick]) < 0.08
            possible = bool((present == wanted).all()) and not (step.reference == "drawer" and shut and at == 0)
        if like:  # the same image: all that does not depend on the question is there
            color, depth, shown, centre = like.color, like.depth, like.shown, like.centre
        else:
            color, depth = episode.color(tick), episode.depth(tick)
            shown = np.array([named(""), *map(named, things)], np.uint8)[segmentation].transpose(2, 0, 1)
            centre = np.concatenate([np.zeros((1, 3), np.float32), places])[segmentation].transpose(2, 0, 1)
        return Frame(
            tick, color, depth, np.asarray(header["intrinsics"], np.float32),
            np.asarray(header["camera_pose"], np.float32), episode.arrays["ee_pose"][tick, :3, 3].astype(np.float32),
            text, at, max(1, len(steps)), cells, shown, centre, wanted, present, middle, aim, possible)  # fmt: skip

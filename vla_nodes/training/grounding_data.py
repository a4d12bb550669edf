"""Stage 1's examples: one recorded frame, any instruction about it, and where the answer is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vla_nodes.datasets import episode as episodes
from vla_nodes.envs.base import Grounding
from vla_nodes.training.examples import number

NO_NAME = 255  # in place of an index: an appearance or a category that nothing is asked about


class Names:
    """Appearances and categories as labels hold them: by their index in what an environment's sentences may name."""

    def __init__(self, grounding: Grounding) -> None:
        self.describe = grounding.describe
        self.appearances = {name: index for index, name in enumerate(grounding.appearances)}
        self.categories = {name: index for index, name in enumerate(grounding.categories)}
        self.nothing = self.of("")

    def of(self, name: str) -> tuple[int, int]:
        """Indices of an object's appearance and category, NO_NAME where it has none; "" is nothing at all."""
        appearance, category = self.describe(name)
        return self.appearances.get(appearance, NO_NAME), self.categories.get(category, NO_NAME)


class Frame(NamedTuple):
    """One example: an image, a sentence, and one step of it. ``cells`` is uint8: 1 the target, 2 the reference."""

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
    shown: np.ndarray  # (2, h, w) uint8: what stands in every cell, as `Names.of` says
    shown_center: np.ndarray  # (3, h, w) m in base: the centre of what stands there
    wanted: np.ndarray  # (2,) bool: the step names a target, a reference
    present: np.ndarray  # (2,) bool: it is in the scene
    center: np.ndarray  # (2, 3) m in base; zero when absent
    place_position: np.ndarray  # (3,) m in base where the target is to be put; nan when nowhere
    grounded: bool  # understood, possible, and all it names is in the scene


class FrameSampler:
    """Draws frames from folders of episodes. What it draws follows from the generator alone, also from threads."""

    def __init__(self, folders: Path | Sequence[Path], grounding: Grounding, held_out: bool = False, every: int = 12
                 ) -> None:  # fmt: skip
        """Every ``every``-th episode, by number, is held out for measuring and never trained on."""
        found = [p for folder in ([folders] if isinstance(folders, Path) else folders) for p in episodes.files(folder)]
        self.paths = [p for p in found if (number(p) % every == 0) == held_out]
        self.grounding, self.names = grounding, Names(grounding)
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
        episode.require("things", "segmentation", "thing_positions", *self.grounding.state)
        episode.require("intrinsics", "camera_pose", "ee_pose")
        header, things = episode.header, list(episode.header["things"])
        text, steps = self.grounding.about(things, rng)
        at = int(rng.integers(len(steps))) if steps else 0
        segmentation, places = episode.arrays["segmentation"][tick], episode.arrays["thing_positions"][tick]
        cells = np.zeros_like(segmentation)
        wanted, present, center = np.zeros(2, bool), np.zeros(2, bool), np.zeros((2, 3), np.float32)
        place, possible = np.full(3, np.nan, np.float32), bool(steps)
        if steps:
            step = steps[at]
            for role, name in enumerate((step.target, step.reference)):
                wanted[role] = bool(name)
                if name in things:
                    index = things.index(name)
                    present[role] = True
                    center[role] = places[index]
                    cells[segmentation == index + 1] = role + 1
            if present[1]:
                place = self.grounding.place_position(step, places[things.index(step.reference)]).astype(np.float32)
            state = {name: episode.arrays[name][tick] for name in self.grounding.state}
            possible = bool((present == wanted).all()) and self.grounding.feasible(step, at, state)
        if like:  # the same image: all that does not depend on the question is there
            color, depth, shown, shown_center = like.color, like.depth, like.shown, like.shown_center
        else:
            color, depth = episode.color(tick), episode.depth(tick)
            names = np.array([self.names.nothing, *map(self.names.of, things)], np.uint8)
            shown = names[segmentation].transpose(2, 0, 1)
            shown_center = np.concatenate([np.zeros((1, 3), np.float32), places])[segmentation].transpose(2, 0, 1)
        return Frame(
            tick, color, depth, np.asarray(header["intrinsics"], np.float32),
            np.asarray(header["camera_pose"], np.float32), episode.arrays["ee_pose"][tick, :3, 3].astype(np.float32),
            text, at, max(1, len(steps)), cells, shown, shown_center, wanted, present, center, place,
            possible)  # fmt: skip

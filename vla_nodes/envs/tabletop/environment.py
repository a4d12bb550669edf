"""The tabletop world as an environment (envs/base.py): a seven-axis arm at a table with blocks, cans and a drawer.

What the ROS graph does live happens here without ROS: chunks go through the chunk executor and the joint trajectory
controllers, and the success checker and the episode monitor read the simulator's state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_nodes.envs.base import EnvError, Outcome, Plan, Start
from vla_nodes.envs.tabletop import expert as experts
from vla_nodes.envs.tabletop import instructions, static_scenes, suites
from vla_nodes.envs.tabletop.camera import Camera
from vla_nodes.envs.tabletop.disturbance import Disturbance
from vla_nodes.envs.tabletop.episode_monitor import PATH_PERIOD, EpisodeMonitor
from vla_nodes.envs.tabletop.labels import TabletopGrounding
from vla_nodes.envs.tabletop.rollout import Rollout
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.tabletop_contract import CONTRACT
from vla_nodes.envs.tabletop.tasks import SuccessChecker, Task
from vla_nodes.envs.tabletop.world import World

if TYPE_CHECKING:
    from vla_nodes.policy.processing import Observation

IMAGE, CELLS = 224, 56  # px: edge of the camera's image and of the labels that cover it
SHARES = {"pick-and-place": 0.26, "drawer": 0.12, "rearrangement": 0.24, "multi-step": 0.26, "stacking": 0.12}
"""Task family -> share of the demonstrations."""
DEMO_SCENES = 0.3  # share of demonstrations in scenes like the one ./run starts with
VARIED_STARTS = 0.45  # share of demonstrations that begin with the arm elsewhere than at its ready pose
DEMONSTRATION_LIMIT = 20.0  # s for each step of a demonstrated instruction
PARAPHRASES = 3  # other wordings recorded with each demonstration


def make() -> Tabletop:
    return Tabletop()


def grounding() -> TabletopGrounding:
    return TabletopGrounding()


class Tabletop:
    """See `envs.base.Environment`, `Demonstrator` and `StaticScenes`."""

    suites = suites.LAYOUT
    contract = CONTRACT
    latency = 0.05
    families = tuple(SHARES)
    primitives = experts.PRIMITIVES
    afterwards = 1.3

    def __init__(self, image: int = IMAGE, cells: int = CELLS) -> None:
        """``image`` and ``cells``: edges in px of what `observe` shows and of the segmentation in `labels`."""
        self.image, self.cells = image, cells
        self._camera: Camera | None = None

    # -- an episode --------------------------------------------------------------------------------------------------
    def reset(self, suite: str, seed: int, instruction: str | None = None) -> Start:
        if suite not in self.suites.names:
            raise EnvError(f"no suite {suite!r}; there are {', '.join(self.suites.names)}")
        try:
            return self.begin(*suites.episode(suite, seed, instruction))
        except ValueError as error:
            raise EnvError(str(error)) from None

    def episodes_for(self, instruction: str, first_seed: int, count: int) -> list[tuple[str, int]]:
        found = [("demo", seed) for seed in suites.feasible_seeds(instruction, first_seed, count)]
        try:
            suites.episode("demo", found[0][1], instruction)
        except ValueError as error:
            raise EnvError(str(error)) from None
        return found

    def begin(self, scene: Scene, task: Task, text: str) -> Start:
        """An episode in a given scene, in which a sentence asks for a task."""
        self.close()
        self.scene, self.task, self.text = scene, task, text
        self.world = World(scene)
        self.rollout = Rollout(self.world)
        self.idle = suites.idle(task, scene)
        self.checker = None if self.idle else SuccessChecker(task)
        self.monitor = EpisodeMonitor(self.world, self.checker)
        self.expert = None if self.idle else experts.Expert(task, scene)
        self._moments = [(0.0, self.world.qpos())]
        limit = suites.IDLE_LIMIT if self.idle else suites.time_limit(task)
        return Start(text, task.family, limit, len(list(task.steps)), None if self.idle else suites.GIVEN_UP)

    @property
    def time(self) -> float:
        return self.world.time

    @property
    def succeeded(self) -> bool:
        return self.checker is not None and self.checker.succeeded

    def observe(self) -> Observation:
        camera = self._eye()
        return self.rollout.observation(camera, camera.render())

    def apply(self, actions: np.ndarray | None, period: float, tick: float, latency: float | None = None) -> str:
        stamp, refused = self.world.time, ""
        latency = min(self.latency if latency is None else latency, tick)
        self._run(latency)
        if actions is not None:
            refused = self.rollout.submit(actions, stamp, period, self.text).refused or ""
        self._run(tick - latency)
        if self.checker is not None:
            self.checker.update(self.world)
        self.monitor.look()
        self._moments.append((self.world.time, self.world.qpos()))
        return refused

    def _run(self, seconds: float) -> None:
        for _ in range(round(seconds / PATH_PERIOD)):
            self.rollout.run(PATH_PERIOD)
            self.monitor.sample()

    def outcome(self) -> Outcome:
        facts, monitor = self.monitor.facts(), self.monitor
        if self.idle:
            success, reason, detail = not monitor.touched, "touched something", ", ".join(facts["touched"])
        else:
            success, reason, detail = self.succeeded, monitor.reason, self.task.progress(self.world)
        return Outcome(success, "" if success else reason, detail, facts["steps_done"], tuple(facts["wrong"]),
                       tuple(facts["touched"]), facts["mean_jerk"], facts["p99_jerk"])  # fmt: skip

    @property
    def moments(self) -> int:
        return len(self._moments)

    def frame(self, moment: int) -> tuple[float, np.ndarray]:
        seconds, qpos = self._moments[moment]
        self.world.set_qpos(qpos)
        return seconds, self._eye().render().color

    def close(self) -> None:
        if self._camera is not None:
            self._camera.close()
            self._camera = None

    def _eye(self) -> Camera:
        if self._camera is None:
            self._camera = Camera(self.world, self.image, self.image)
        return self._camera

    # -- demonstrations ----------------------------------------------------------------------------------------------
    def reset_demonstration(self, seed: int, rng: np.random.Generator, family: str | None = None) -> Start:
        family = family or str(rng.choice(list(SHARES), p=list(SHARES.values())))
        start = self.begin(*suites.draw(family, seed, demo=DEMO_SCENES))
        if rng.random() < VARIED_STARTS:
            tool = rng.uniform([0.32, -0.22, 0.10], [0.60, 0.25, 0.40])
            self.rollout.place(tool, opening=float(rng.choice([1.0, rng.random()])))
        words = np.random.default_rng([seed, 59])
        record = {
            "task": asdict(self.task),
            "paraphrases": [instructions.phrase(self.task, words) for _ in range(PARAPHRASES)],
            **static_scenes.header(self.scene),
        }
        return Start(start.instruction, start.family, DEMONSTRATION_LIMIT * start.steps, start.steps, start.patience,
                     record)  # fmt: skip

    def plan(self, horizon: int, period: float) -> Plan:
        if self.expert is None:
            raise EnvError("the expert is asked for what can be done: this episode has nothing to be done")
        actions, primitive = self.expert.plan(self.world, self.rollout.velocity, horizon, period)
        return Plan(actions, self.primitives.index(primitive), self.expert.step, self.expert.finished)

    def disturbance(self, rng: np.random.Generator) -> Disturbance:
        return Disturbance(rng, self.contract.actions.period)

    def labels(self) -> dict[str, np.ndarray]:
        return static_scenes.labels(self.world, self._eye(), self.cells)

    # -- pictures of static scenes -------------------------------------------------------------------------------------
    def static_scene(self, seed: int, unusual: float) -> tuple[dict[str, Any], Iterator[tuple[Observation, dict]]]:
        scene, rng = static_scenes.draw(seed, unusual)
        self.begin(scene, Task("", ""), "")
        header = {**static_scenes.header(scene), "seed": seed}

        def pictures() -> Iterator[tuple[Observation, dict]]:
            for _ in range(static_scenes.PICTURES):
                static_scenes.shuffle(self.world, self.rollout, rng)
                yield self.observe(), self.labels()

        return header, pictures()

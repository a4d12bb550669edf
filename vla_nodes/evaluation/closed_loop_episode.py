"""One episode in closed loop, as the ROS graph runs it: images in, chunks out, executor, controllers, judge."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vla_nodes.envs.tabletop import suites
from vla_nodes.envs.tabletop.camera import Camera
from vla_nodes.envs.tabletop.episode_monitor import PATH_PERIOD, Witness
from vla_nodes.envs.tabletop.expert import Expert
from vla_nodes.envs.tabletop.rollout import Rollout
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.tasks import Judge, Task
from vla_nodes.envs.tabletop.world import World
from vla_nodes.evaluation import contact_sheet
from vla_nodes.evaluation.metrics import Result

if TYPE_CHECKING:
    from vla_nodes.policy.runtime import PolicyRuntime

TICK, LATENCY = 0.10, 0.05  # s between observations; s from exposure to the chunk's arrival
IMAGE = 224  # px, edge of the simulated camera's image


class Driver(Protocol):
    """What decides: the policy, or the expert that knows the simulator's state."""

    def begin(self, rollout: Rollout, task: Task, text: str) -> None: ...

    def act(self) -> tuple[np.ndarray | None, float, str]:
        """(H, 7) ee_delta rows or None, s between them, and why it holds."""
        ...

    def close(self) -> None: ...


class PolicyDriver:
    """The policy, seeing what the simulated camera sees and nothing more."""

    def __init__(self, runtime: PolicyRuntime) -> None:
        self.runtime = runtime

    def begin(self, rollout: Rollout, task: Task, text: str) -> None:
        self._rollout = rollout
        self._camera = Camera(rollout.world, IMAGE, IMAGE)
        self.runtime.set_instruction(text)

    def act(self) -> tuple[np.ndarray | None, float, str]:
        output = self.runtime.step(self._rollout.observation(self._camera, self._camera.render()))
        return output.actions, self.runtime.config.period, output.hold_reason

    def close(self) -> None:
        self._camera.close()


class ExpertDriver:
    """The scripted expert: what the simulator's state allows, and the ceiling of what it can teach."""

    HORIZON, PERIOD = 16, 0.05  # as the demonstrations are

    def begin(self, rollout: Rollout, task: Task, text: str) -> None:
        self._rollout, self._expert = rollout, Expert(task, rollout.world.scene)

    def act(self) -> tuple[np.ndarray | None, float, str]:
        actions, _ = self._expert.plan(self._rollout.world, self._rollout.velocity, self.HORIZON, self.PERIOD)
        return actions, self.PERIOD, ""

    def close(self) -> None:
        pass


@lru_cache(maxsize=1)
def driver(checkpoint: str, engine: str = "torch") -> Driver:
    """The policy of a checkpoint folder, computed by this engine (policy/inference/engine.py), or for "" the expert.

    CheckpointError or ValueError, one line, when it cannot be loaded or run here.
    """
    if not checkpoint:
        return ExpertDriver()
    from vla_nodes.policy.runtime import PolicyRuntime

    return PolicyDriver(PolicyRuntime.load(Path(checkpoint), device="cpu", threads=1, engine=engine))


def run(who: Driver, suite: str, scene: Scene, task: Task, text: str, limit: float | None = None
        ) -> tuple[Result, contact_sheet.Frames]:  # fmt: skip
    """One instruction from a fresh start to success or the time limit, and frames of it if it failed.

    Where there is nothing to be done, success is that the robot touches nothing for suites.STILL_LIMIT.
    """
    still = suites.still(task, scene)
    limit = limit or (suites.STILL_LIMIT if still else suites.time_limit(task))
    world = World(scene)
    rollout, judge = Rollout(world), None if still else Judge(task)
    witness = Witness(world, judge)
    moments = [(0.0, world.qpos())]
    acted, hold, last_action, refused = False, "", 0.0, ""
    who.begin(rollout, task, text)
    try:
        while world.time < limit - 1e-6 and not (judge and judge.succeeded):
            stamp = world.time
            actions, period, hold = who.act()
            for part, seconds in enumerate((LATENCY, TICK - LATENCY)):
                if part and actions is not None:
                    acted, last_action = True, stamp
                    refused = rollout.submit(actions, stamp, period, text).refused or ""
                for _ in range(round(seconds / PATH_PERIOD)):
                    rollout.run(PATH_PERIOD)
                    witness.sample()
            if judge:
                judge.update(world)
            witness.look()
            moments.append((world.time, world.qpos()))
            if not still and world.time - last_action > suites.GIVEN_UP:
                break
    finally:
        who.close()
    facts = witness.facts()
    if still:
        success, reason = not witness.touched, "touched something" if witness.touched else ""
        detail = ", ".join(facts["touched"])
    else:
        success, reason, detail = judge.succeeded, witness.reason, task.progress(world)
        if not success and (not acted or world.time - last_action > suites.GIVEN_UP):
            reason, detail = ("refused" if not acted else "gave up"), f"{hold}; {detail}"
        elif not success and refused:
            detail = f"the last motion was refused: {refused}; {detail}"
    result = Result(suite, scene.seed, task.family, text, success, round(world.time, 2), "" if success else reason,
                    detail, len(list(task.steps)), facts["steps_done"], facts["wrong"], facts["touched"],
                    facts["mean_jerk"], facts["p99_jerk"])  # fmt: skip
    return result, [] if success else _frames(world, moments)


def _frames(world: World, moments: list[tuple[float, np.ndarray]]) -> contact_sheet.Frames:
    """The camera's view of some moments."""
    camera = Camera(world, IMAGE, IMAGE)
    frames = []
    try:
        for index in contact_sheet.pick(len(moments)):
            seconds, qpos = moments[index]
            world.set_qpos(qpos)
            frames.append((seconds, camera.render().color))
    finally:
        camera.close()
    return frames

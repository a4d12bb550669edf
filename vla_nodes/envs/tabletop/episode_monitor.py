"""What happened in an episode, read off the simulator's own state: contacts, grasps, losses, and why it failed.

The same monitor watches evaluation without ROS and sim_node, so that both tell the same story. No policy sees it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.envs.tabletop.tasks import SuccessChecker
from vla_nodes.envs.tabletop.world import World

PATH_PERIOD = 0.01  # s between samples of the tool's path
RAISED = 0.025  # m over where it last lay: held by both fingers and this high counts as lifted
FALL = 0.03  # m of free fall that makes a loss a drop
DISPLACED = 0.03  # m from where it stood at the start
FAR_ENOUGH = 0.01  # m that a drawer must move to count as moved


class EpisodeMonitor:
    """One per instruction. Call ``sample`` every PATH_PERIOD and ``look`` every 0.1 s or so, after the checker.

    ``checker`` is None when nothing can be judged: only contacts and the path are then kept.
    """

    def __init__(self, world: World, checker: SuccessChecker | None) -> None:
        self.world, self.checker = world, checker
        model = world.model
        robot = model.body_rootid[model.body("panda_hand_tcp").id]
        self._robot = model.body_rootid[model.geom_bodyid] == robot  # per geom
        owners = [(thing.name, thing.name) for thing in world.scene.things] + [("drawer", "drawer")]
        owners.append(("cabinet", "drawer"))
        self._owner = np.full(model.ngeom, -1)
        self._names = [name for _, name in owners]
        for index, (body, _) in enumerate(owners):
            self._owner[model.geom_bodyid == model.body(body).id] = index
        self._things = [thing.name for thing in world.scene.things if thing.kind in sc.GRASPABLE]
        self._start = {name: world.position(name) for name in self._things}
        named = checker.task.names if checker else ()
        self.others = [name for name in self._things if name not in named]
        self.touched: set[str] = set()  # by any part of the robot, since the start
        self.wrong: set[str] = set()  # things nobody named that were lifted or displaced
        self.wrong_lifted = False
        self._path: list[np.ndarray] = []
        self._reached = 0
        self._step_starts()

    def _step_starts(self) -> None:
        """The marks that only concern the step in progress."""
        self._felt: set[str] = set()
        self._drawer = self.world.drawer_opening()
        self._held = self._lifted = False
        self._low = self._high = self.world.position(self._thing)[2] if self._thing else 0.0

    @property
    def _thing(self) -> str:
        """What the step in progress takes into the hand, "" for a drawer or nothing."""
        thing = self.checker.steps[self._reached].target if self.checker else ""
        return "" if thing == "drawer" else thing

    def sample(self) -> None:
        """Contacts and the tool's position now."""
        self._path.append(self.world.tool_pose()[:3, 3])
        geoms = self.world.data.contact.geom
        if not len(geoms):
            return
        robot = self._robot[geoms]
        other = self._owner[np.where(robot[:, 0], geoms[:, 1], geoms[:, 0])]
        for index in set(other[(robot[:, 0] != robot[:, 1]) & (other >= 0)].tolist()):
            self.touched.add(self._names[index])
            self._felt.add(self._names[index])

    def look(self) -> None:
        """Grasps, losses and displacements now."""
        world, checker = self.world, self.checker
        for name in self.others:
            if name in self.wrong and self.wrong_lifted:
                continue
            position = world.position(name)
            lifted = position[2] > self._start[name][2] + RAISED and world.touched_by_fingers(name) == 2
            self.wrong_lifted |= lifted
            if lifted or np.linalg.norm(position - self._start[name]) > DISPLACED:
                self.wrong.add(name)
        if checker is None:
            return
        if checker.reached != self._reached:
            self._reached = checker.reached
            self._step_starts()
        if thing := self._thing:
            height = world.position(thing)[2]
            self._held = world.touched_by_fingers(thing) == 2
            if self._held:
                self._high = height
                self._lifted |= height > self._low + RAISED
            elif world.speed(thing) < 0.02:
                self._low = height

    @property
    def reason(self) -> str:
        """Why the task is not done, as one of a few kinds."""
        checker, world = self.checker, self.world
        if checker is None or checker.succeeded:
            return ""
        if self.wrong_lifted:
            return "wrong object"
        if checker.early:
            return "wrong step order"
        done = checker.steps[: checker.reached]
        if any(step.verb == "place" and not step.success(world) for step in done):
            return "undone again"
        step = checker.steps[checker.reached]
        if step.success(world):
            return "timeout"  # done, but not for long enough
        if step.target == "drawer":
            if "drawer" not in self._felt:
                return "never reached"
            moved = abs(world.drawer_opening() - self._drawer) > FAR_ENOUGH
            return "drawer not far enough" if moved else "missed grasp"
        if self._held:
            return "timeout"
        if self._lifted:
            return "dropped" if self._high - world.position(step.target)[2] > FALL else "misplaced"
        return "missed grasp" if step.target in self._felt else "never reached"

    def jerk(self) -> tuple[float, float]:
        """Mean and 99th percentile of the tool's jerk so far, m/s^3."""
        if len(self._path) < 4:
            return 0.0, 0.0
        size = np.linalg.norm(np.diff(np.array(self._path), 3, axis=0), axis=1) / PATH_PERIOD**3
        return float(size.mean()), float(np.quantile(size, 0.99))

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        checker = self.checker
        mean, peak = self.jerk()
        return {
            "reason": self.reason,
            "steps_done": (len(checker.steps) if checker.succeeded else checker.reached) if checker else 0,
            "touched": sorted(self.touched),
            "wrong": sorted(self.wrong),
            "mean_jerk": mean,
            "p99_jerk": peak,
        }

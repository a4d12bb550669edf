"""The scripted expert: privileged state in, the same action chunk out that the policy learns to give.

It is reactive: every call looks at the world as it is and rolls its own decisions forward over one chunk, so a
disturbed arm, a missed grasp or a moved object gets the label that mends it. Frames: base; units: m, s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.envs.tabletop.tasks import Task, destination, place_of, placed
from vla_nodes.envs.tabletop.world import World
from vla_nodes.poses import rotation_vector

PRIMITIVES = ("reach", "grasp", "lift", "move", "place", "open", "close", "hold")

DOWN = np.diag([1.0, -1.0, -1.0])  # tool pointing down, fingers moving along y
HOVER = 0.10  # above an object before descending
TRANSIT = 0.20  # height at which things are carried
CLEAR = 0.13  # above this nothing on the table is in the way
HOME = np.array([0.43, 0.0, 0.30])  # where it waits when done
ALIGNED = 0.010  # horizontal error that allows a descent
NEAR = 0.006
SPEED, SLOW, ACCELERATION = 0.32, 0.14, 1.3  # m/s, m/s, m/s^2
CLOSE_RATE = 4.0  # opening fraction per second, as the simulated fingers move
SETTLE = 0.20  # s of squeezing before lifting
PULL = 0.145  # drawer pull


@dataclass
class _State:
    """What the expert decides on; rolled forward kinematically inside a chunk."""

    p: np.ndarray
    v: np.ndarray
    g: float
    held: bool
    squeezed: float
    reopening: bool
    target: np.ndarray
    opening: float
    done: bool


class Expert:
    """One per instruction: it does one step after the other. ``step`` is the one it is at, ``finished`` says whether
    the last plan found that step done and the hand clear of it."""

    def __init__(self, task: Task, scene: sc.Scene) -> None:
        self._parts = [StepExpert(step, scene) for step in task.steps]
        self.step, self.finished = 0, False

    def plan(self, world: World, velocity: np.ndarray, horizon: int, period: float) -> tuple[np.ndarray, str]:
        """One chunk in action space ee_delta, (horizon, 7), and the primitive it starts with.

        ``velocity`` (3,) is the tool's velocity; the chunk continues it.
        """
        if self.finished and self.step + 1 < len(self._parts):
            self.step += 1
        part = self._parts[self.step]
        chunk, primitive = part.plan(world, velocity, horizon, period)
        self.finished = part.finished(world)
        return chunk, primitive


class StepExpert:
    """One step; remembers only that a failed grasp is being opened again and how long it has squeezed."""

    def __init__(self, task: Task, scene: sc.Scene) -> None:
        self.task, self.scene = task, scene
        self._squeezed = 0.0
        self._reopening = False
        self._last_time: float | None = None

    # -- what the world looks like now -----------------------------------------------------------------------------
    def _state(self, world: World, velocity: np.ndarray) -> _State:
        task = self.task
        drawer = task.target == "drawer"
        thing = world.handle_position() if drawer else world.position(task.target)
        p, g = world.tool_pose()[:3, 3], world.opening()
        body = "drawer" if drawer else task.target
        close_by = np.linalg.norm((p - thing)[:2]) < 0.03 and abs(p[2] - thing[2]) < 0.05
        touching = world.touched_by_fingers(body) == 2 and close_by
        elapsed = 0.0 if self._last_time is None else world.time - self._last_time
        self._last_time = world.time
        self._squeezed = self._squeezed + elapsed if touching and g < 0.9 else 0.0
        if g < 0.12 and not touching:
            self._reopening = True
        if g > 0.9 or touching:
            self._reopening = False
        done = False
        if task.verb == "place":
            done = placed(world, task) and not (touching and g < 0.9)
        elif drawer:
            done = task.success(world)
        return _State(
            p,
            velocity.copy(),
            g,
            bool(touching and self._squeezed > 0),
            self._squeezed,
            self._reopening,
            thing,
            world.drawer_opening(),
            done,
        )

    def finished(self, world: World) -> bool:
        """Done, let go and up out of the way."""
        hand, task = world.tool_pose()[:3, 3], self.task
        if task.verb == "pick":
            return task.success(world)
        clear = hand[2] > place_of(world, task.target)[2] + 0.09 or hand[2] > CLEAR + 0.05
        return task.success(world) and world.opening() > 0.8 and clear

    def plan(self, world: World, velocity: np.ndarray, horizon: int, period: float) -> tuple[np.ndarray, str]:
        """See Expert.plan."""
        state = self._state(world, velocity)
        goal = destination(self.task, place_of(world, self.task.reference)) if self.task.reference else None
        # The tool's small tilt away from straight down is taken out at a bounded rate.
        tilt = rotation_vector((DOWN @ world.tool_pose()[:3, :3].T)[None])[0]
        rows, first = [], ""
        for _ in range(horizon):
            primitive, waypoint, gripper, speed = self._decide(state, goal)
            first = first or primitive
            step = self._move(state, waypoint, speed, period)
            turn = np.clip(tilt, -0.05, 0.05)
            tilt = tilt - turn
            rows.append([*step, *turn, gripper])
            self._close(state, gripper, period)
        return np.array(rows), first

    # -- one step of the roll-out ---------------------------------------------------------------------------------
    def _move(self, s: _State, waypoint: np.ndarray, speed: float, dt: float) -> np.ndarray:
        gap = waypoint - s.p
        distance = float(np.linalg.norm(gap))
        wanted = gap / max(distance, 1e-9) * min(speed, np.sqrt(1.2 * ACCELERATION * distance), distance / dt)
        change = wanted - s.v
        size = float(np.linalg.norm(change))
        s.v = s.v + change * min(1.0, ACCELERATION * dt / max(size, 1e-9))
        step = s.v * dt
        s.p = s.p + step
        if s.held:
            s.target = s.target + step
            if self.task.target == "drawer":
                s.opening -= step[0]
        return step

    def _close(self, s: _State, gripper: float, dt: float) -> None:
        s.g = float(np.clip(s.g + np.clip(gripper - s.g, -CLOSE_RATE * dt, CLOSE_RATE * dt), 0, 1))
        width = 0.15 if self.task.target == "drawer" else 0.5
        near = np.linalg.norm((s.p - s.target)[:2]) < 0.02
        if gripper < 0.5 and near and s.g <= width + 0.05:
            s.held, s.g = True, max(s.g, width)
            s.squeezed += dt
        if gripper > 0.5 and s.g > width + 0.1:
            if s.held and self.task.verb == "place":
                s.done = True
            s.held, s.squeezed = False, 0.0
        if s.g > 0.9:
            s.reopening = False

    # -- decisions ------------------------------------------------------------------------------------------------
    def _decide(self, s: _State, goal: np.ndarray | None) -> tuple[str, np.ndarray, float, float]:
        if self.task.verb in ("open", "close"):
            return self._decide_drawer(s)
        if s.done:
            return self._retreat(s)
        if not s.held:
            return self._approach(s, s.target, max(s.target[2] - 0.002, 0.016))
        if s.squeezed < SETTLE:
            return "grasp", s.p, 0.0, SLOW
        if self.task.verb == "pick":
            top = np.array([s.p[0], s.p[1], TRANSIT])
            return ("hold" if s.p[2] > TRANSIT - 0.02 else "lift"), top, 0.0, SPEED
        away = float(np.hypot(*(s.target - goal)[:2]))
        target = s.p + (goal - s.target)  # where the tool must be for the object to be over the goal
        if away > 0.02:
            if s.p[2] < CLEAR:
                return "lift", np.array([s.p[0], s.p[1], TRANSIT]), 0.0, SPEED
            return "move", np.array([target[0], target[1], TRANSIT]), 0.0, SPEED
        release = target[2]
        if s.p[2] > release + NEAR or away > 0.008:
            down = s.p[2] - release
            return "place", np.array([target[0], target[1], release]), 0.0, SLOW + 0.06 * (down > 0.04)
        return "place", np.array([s.p[0], s.p[1], release]), 1.0, SLOW

    def _approach(self, s: _State, thing: np.ndarray, height: float) -> tuple[str, np.ndarray, float, float]:
        """Open, come over it, go down, close; up again after closing on nothing."""
        error = float(np.hypot(*(thing - s.p)[:2]))
        hover = thing[2] + HOVER
        if s.reopening:
            return "reach", np.array([s.p[0], s.p[1], hover]), 1.0, SLOW
        low = s.p[2] < hover - 0.03
        if error > (0.018 if low else ALIGNED):
            if low and error > 0.03:
                return "reach", np.array([s.p[0], s.p[1], hover + 0.01]), 1.0, SPEED
            z = hover if not low else s.p[2]
            return "reach", np.array([thing[0], thing[1], z]), 1.0, SPEED
        if s.p[2] > height + NEAR:
            down = s.p[2] - height
            return (
                ("grasp" if down < 0.05 else "reach"),
                np.array([thing[0], thing[1], height]),
                1.0,
                SLOW + 0.08 * (down > 0.05),
            )
        return "grasp", np.array([thing[0], thing[1], height]), 0.0, SLOW

    def _retreat(self, s: _State) -> tuple[str, np.ndarray, float, float]:
        if s.p[2] < CLEAR + 0.05 and s.g < 0.85:
            return "place", s.p, 1.0, SLOW
        if s.p[2] < CLEAR + 0.05:
            return "hold", np.array([s.p[0], s.p[1], HOME[2]]), 1.0, SPEED
        return "hold", HOME, 1.0, SPEED

    def _decide_drawer(self, s: _State) -> tuple[str, np.ndarray, float, float]:
        opening = self.task.verb == "open"
        if s.done:
            if s.g < 0.85 and s.p[2] < s.target[2] + 0.03:
                return self.task.verb, s.p, 1.0, SLOW
            if s.p[2] < s.target[2] + 0.10 and np.hypot(*(s.p - s.target)[:2]) < 0.06:
                return "hold", np.array([s.p[0], s.p[1], s.target[2] + 0.13]), 1.0, SPEED
            return "hold", HOME, 1.0, SPEED
        if not s.held:
            return self._approach(s, s.target, s.target[2])
        if s.squeezed < SETTLE:
            return "grasp", s.p, 0.0, SLOW
        travel = (PULL - s.opening) if opening else -(s.opening + 0.004)
        return self.task.verb, np.array([s.p[0] - travel, s.target[1], s.p[2]]), 0.0, SLOW + 0.04

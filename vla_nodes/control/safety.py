"""The gate between a neural network and a motor.

Every chunk passes `SafetyGate.check` before the executor sees it; `SafetyGate.tick` runs at a fixed rate and says
whether the arm may go on moving. Each refusal and each stop has a named cause and is counted. A stop is always a
decelerating hold (`ChunkExecutor.stop`), never zeros and never silence.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.robot import RobotModel
from vla_nodes.control.rows import tool_targets
from vla_nodes.control.tracking import Tracking
from vla_nodes.poses import rotation_vector

CAUSES = {
    "malformed": "wrong shape, joint count, period or action space",
    "not_finite": "NaN or infinity in the chunk",
    "too_old": "observation older than max_age",
    "future": "observation stamped ahead of the clock",
    "no_joint_state": "no joint state seen yet, or none near the chunk's stamp",
    "workspace": "targets outside the workspace box",
    "under_table": "targets below the table",
    "truncated": "rows from the first one outside the workspace on were cut off",
    "impossible_step": "a row farther from the one before than the arm can physically move",
    "stale_joint_states": "joint_states stopped",
    "bad_joint_states": "joint_states with wrong size or NaN",
    "tracking": "the arm does not follow its reference (blocked, sagging, a wrong zero?)",
    "clock_jump": "the clock jumped",
    "silent_policy": "no usable chunk for chunk_timeout while moving",
    "stop": "vla/stop was called",
    "self_collision": "the arm would touch itself",
    "controller": "the controller gave the motion up",
    "estop": "emergency stop",
    "deadman": "the deadman signal stopped",
}


RESUME = "held; vla/resume to go on"


class Action(str, Enum):
    """What the action node must do now."""

    GO = "go"  # chunks may be carried out
    HOLD = "hold"  # decelerate along the plan and hold; take no chunks
    RELEASE = "release"  # stop pressing: move the reference back to the arm, once, and hold
    FORGET = "forget"  # the clock jumped: the reference means nothing any more


@dataclass(frozen=True)
class SafetySettings:
    """Lengths in m in base (the tool point), times in s, angles in rad. A value of 0 switches a timeout off.

    workspace_low, workspace_high: corners of the box; table: height below which nothing goes;
    outside: "truncate" keeps the leading rows inside the box (at least min_rows of them), "refuse" refuses all;
    max_age: oldest observation a chunk may serve; step_factor: share of the robot's own top speed above which a row
    counts as impossible; tracking_tolerance, tracking_time: error and how long it must last; joint_timeout,
    chunk_timeout, deadman_timeout: silence that stops the arm; clock_jump: forward jump that counts as one.
    """

    workspace_low: tuple[float, float, float] = (-math.inf, -math.inf, -math.inf)
    workspace_high: tuple[float, float, float] = (math.inf, math.inf, math.inf)
    table: float = 0.0
    outside: str = "truncate"
    min_rows: int = 2
    max_age: float = 1.0
    step_factor: float = 1.2
    tracking_tolerance: float = 0.15
    tracking_time: float = 0.1
    joint_timeout: float = 0.25
    chunk_timeout: float = 1.0
    deadman_timeout: float = 0.0
    clock_jump: float = 1.0

    def __post_init__(self) -> None:
        if len(self.workspace_low) != 3 or len(self.workspace_high) != 3:
            raise ValueError("workspace_low and workspace_high need 3 values (x, y, z in m)")
        if not all(a < b for a, b in zip(self.workspace_low, self.workspace_high, strict=True)):
            raise ValueError(f"workspace_low {self.workspace_low} must be below workspace_high {self.workspace_high}")
        if self.outside not in ("truncate", "refuse"):
            raise ValueError(f"outside must be 'truncate' or 'refuse', got {self.outside!r}")
        for name in ("max_age", "step_factor", "tracking_tolerance", "clock_jump", "min_rows"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Verdict:
    """action; cause: a key of CAUSES or ""; reason: one line for the operator; chunk: what may be carried out (check
    only); new: this cause was not active before, so log it once."""

    action: Action = Action.GO
    cause: str = ""
    reason: str = ""
    chunk: ActionChunk | None = None
    new: bool = False


class SafetyGate:
    """Checks chunks and watches the arm. `counts` holds how often each cause refused or stopped."""

    def __init__(self, robot: RobotModel, settings: SafetySettings | None = None) -> None:
        self.robot = robot
        self.settings = settings or SafetySettings()
        self.counts: Counter[str] = Counter()
        self._active: set[str] = set()  # causes that were logged and still hold
        self._estops: dict[tuple[str, str], bool] = {}  # (topic, reader): what was heard last
        self._latched: dict[str, str] = {}  # cause: reason, until resume
        self.tracking = Tracking(robot.joint_names, self.settings.tracking_tolerance, self.settings.tracking_time)
        self.reset()

    def reset(self) -> None:
        """Forget timing (activation, clock jump). Latched stops stay latched."""
        self._joint_seen: float | None = None  # steady clock
        self._q: np.ndarray | None = None
        self._now: float | None = None
        self._steady: float | None = None
        self._chunk_used: float | None = None
        self._deadman_seen: float | None = None
        self.tracking.reset()

    # -- the operator ------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """vla/stop: hold until resume."""
        self.hold("stop", "stopped on request")

    def estop(self, asserted: bool, topic: str = "estop", reader: str = "") -> None:
        """An emergency stop topic: True holds at once; False only allows a later resume.

        reader: which of several subscriptions on that topic heard it. Each counts by itself: what one of them delivers
        late, or misses, must not undo what another heard.
        """
        self._estops[topic, reader] = asserted
        if asserted:
            self.hold("estop", f"emergency stop ({', '.join(self.estops)})")

    @property
    def estops(self) -> list[str]:
        """The emergency stop topics that are asserted now."""
        return sorted({topic for (topic, _), asserted in self._estops.items() if asserted})

    def hold(self, cause: str, reason: str) -> None:
        """Hold until resume, for a cause that was seen elsewhere."""
        self._latched[cause] = f"{reason}; {RESUME}"

    def deadman(self, steady: float) -> None:
        """The deadman switch is held, at `steady` s on the steady clock."""
        self._deadman_seen = steady

    def resume(self) -> str | None:
        """vla/resume: release what is latched; returns why not, or None."""
        if self.estops:
            return f"emergency stop is still asserted: release it (publish false on {', '.join(self.estops)}) first"
        if self.tracking.problem:
            return (
                f"{self.tracking.problem}: free the arm, or mend its zero; to begin from where it is, "
                "deactivate and activate action_node first"
            )
        self._latched.clear()
        return None

    # -- the arm -----------------------------------------------------------------------------------------------

    def observe(self, q: np.ndarray, steady: float) -> Verdict:
        """A joint state q (J,) rad arrived at `steady` s (steady clock, so that silence is seen with any clock)."""
        q = np.asarray(q, dtype=float)
        if q.shape != (self.robot.dof,) or not np.isfinite(q).all():
            return self._verdict(Action.HOLD, "bad_joint_states", f"joint_states unusable: {q.tolist()}")
        self._q, self._joint_seen = q, steady
        return Verdict()

    def tick(self, now: float, steady: float, reference: np.ndarray | None, moving: bool) -> Verdict:
        """May the arm go on? Call at 20 Hz or more.

        Args: now: s, the ROS clock; steady: s, the steady clock; reference: (J,) rad the controller should be at
        now, None if nothing was commanded; moving: the trajectory in flight has not ended.
        """
        s = self.settings
        jump = self._clock(now, steady)
        if jump is not None:
            return self._verdict(Action.FORGET, "clock_jump", jump)
        silent = self.age_of_joints(steady)
        stale = bool(s.joint_timeout) and silent > s.joint_timeout
        if reference is None:
            self.tracking.reset()
        elif self._q is not None and not stale and self.tracking.look(reference, self._q, steady):
            if "tracking" not in self._latched:
                self.hold("tracking", f"{self.tracking.problem} (blocked, sagging, a wrong zero?)")
                if "estop" not in self._latched:  # after an emergency stop nothing moves
                    return self._verdict(Action.RELEASE, "tracking", self._latched["tracking"])
        if self._latched:
            return self._verdict(Action.HOLD, self.holding, self._latched[self.holding])
        if s.deadman_timeout and (self._deadman_seen is None or steady - self._deadman_seen > s.deadman_timeout):
            return self._verdict(Action.HOLD, "deadman", "deadman signal missing")
        if self._joint_seen is None:
            return self._verdict(Action.HOLD, "no_joint_state", "no joint_states received yet")
        if stale:
            return self._verdict(Action.HOLD, "stale_joint_states", f"no joint_states for {silent:.2f} s")
        if moving and s.chunk_timeout and self._chunk_used is not None and now - self._chunk_used > s.chunk_timeout:
            silence = f"no usable chunk for {now - self._chunk_used:.2f} s while moving"
            return self._verdict(Action.HOLD, "silent_policy", silence)
        self._clear("clock_jump", "stop", "estop", "deadman", "no_joint_state", "stale_joint_states", "tracking",
                    "bad_joint_states", "silent_policy")  # fmt: skip
        return Verdict()

    def _clock(self, now: float, steady: float) -> str | None:
        before, steady_before = self._now, self._steady
        self._now, self._steady = now, steady
        if before is None or steady_before is None:
            return None
        ahead = now - before
        if ahead < -1e-3:
            self.reset()
            return f"clock went back by {-ahead:.3f} s"
        if ahead > self.settings.clock_jump and ahead > 3.0 * (steady - steady_before):
            self.reset()
            return f"clock went ahead by {ahead:.3f} s"
        return None

    # -- chunks ------------------------------------------------------------------------------------------------

    def used(self, now: float) -> None:
        """A chunk was carried out at `now` (ROS clock)."""
        self._chunk_used = now

    def check(self, chunk: ActionChunk, now: float, measured: np.ndarray | None) -> Verdict:
        """May this chunk be carried out? The verdict's chunk is the one to submit (possibly cut short), or None.

        Args: now: s, ROS clock; measured: (J,) joints at the chunk's stamp (`ChunkExecutor.measured`).
        """
        s = self.settings
        values = np.asarray(chunk.actions)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = int(np.count_nonzero(~np.isfinite(values)))
            return self._refuse("not_finite", f"{bad} of {values.size} actions are NaN or infinite")
        problem = chunk.problem(self.robot.joint_names, self.robot.gripper_names)
        if problem is not None:
            return self._refuse("malformed", problem)
        age = now - chunk.stamp
        if age > s.max_age:
            return self._refuse("too_old", f"observation is {age:.3f} s old, most allowed is {s.max_age} s")
        if age < -0.1:
            return self._refuse("future", f"observation is stamped {-age:.3f} s ahead of the clock")
        if measured is None:
            return self._refuse("no_joint_state", "no joint state near the chunk's stamp")
        joints = chunk.action_space in (ActionSpace.JOINT_DELTA, ActionSpace.JOINT_POSITION)
        pose = self.robot.forward(measured)
        if joints:
            rows = chunk.motion
            q = measured + np.cumsum(rows, axis=0) if chunk.action_space is ActionSpace.JOINT_DELTA else rows
            allowed = s.step_factor * self.robot.max_velocity * chunk.period
            step = np.abs(np.diff(np.concatenate([measured[None], q]), axis=0)) / allowed
            where = f"row {int(step.max(axis=1).argmax())}, {self.robot.joint_names[int(step.max(axis=0).argmax())]}"
            worst = float(step.max())
            tool = self.robot.kinematics(np.clip(q, self.robot.lower, self.robot.upper))[0]
        else:
            tool, rotations = tool_targets(chunk, pose)
            steps = np.linalg.norm(np.diff(np.concatenate([pose[None, :3, 3], tool]), axis=0), axis=1)
            turned = np.concatenate([pose[None, :3, :3], rotations])
            turns = np.linalg.norm(rotation_vector(turned[1:] @ turned[:-1].transpose(0, 2, 1)), axis=1)
            # No turn of the tool is faster than the last three joints together.
            spin = float(self.robot.max_velocity[-3:].sum())
            step = np.maximum(steps / self.robot.max_tool_speed, turns / spin) / (s.step_factor * chunk.period)
            where, worst = f"row {int(step.argmax())}", float(step.max())
        if worst > 1.0:
            return self._refuse("impossible_step", f"{where}: {worst:.1f} times what the arm can move in one period")
        return self._within(chunk, pose[:3, 3], tool)

    def _within(self, chunk: ActionChunk, here: np.ndarray, tool: np.ndarray) -> Verdict:
        s = self.settings
        low, high = np.array(s.workspace_low), np.array(s.workspace_high)
        depth = np.maximum(np.maximum(low - tool, tool - high), 0.0).max(axis=1)
        below = s.table - tool[:, 2]
        # An arm that starts outside may come back in, but go no farther out.
        slack = float(np.maximum(np.maximum(low - here, here - high), 0.0).max())
        under = below > max(s.table - here[2], 0.0) + 1e-3
        bad = (depth > slack + 1e-3) | under
        if not bad.any():
            self._clear("malformed", "not_finite", "too_old", "future", "impossible_step", "workspace", "under_table",
                        "truncated")  # fmt: skip
            return Verdict(chunk=chunk)
        first = int(np.argmax(bad))
        x, y, z = tool[first]
        place = f"row {first} is at x {x:.3f} y {y:.3f} z {z:.3f} m"
        if s.outside == "truncate" and first >= s.min_rows:
            verdict = self._verdict(Action.GO, "truncated", f"{place}, outside the workspace; cut from there")
            return replace(verdict, chunk=replace(chunk, actions=chunk.actions[:first]))
        if under[first]:
            return self._refuse("under_table", f"{place}, below the table at {s.table:.3f} m")
        return self._refuse("workspace", f"{place}, outside the box {s.workspace_low} to {s.workspace_high}")

    # -- counting ----------------------------------------------------------------------------------------------

    def refused(self, cause: str) -> bool:
        """Count a refusal made elsewhere (the executor's causes); True if it was not active before: log it."""
        self.counts[cause] += 1
        new = cause not in self._active
        self._active.add(cause)
        return new

    def _refuse(self, cause: str, reason: str) -> Verdict:
        return Verdict(Action.GO, cause, reason, None, self.refused(cause))

    def _verdict(self, action: Action, cause: str, reason: str) -> Verdict:
        new = cause not in self._active
        # A hold lasts many ticks and is one stop; a truncation is one per chunk.
        if new or cause in ("truncated", "bad_joint_states", "clock_jump"):
            self.counts[cause] += 1
        self._active.add(cause)
        return Verdict(action, cause, reason, None, new)

    def _clear(self, *causes: str) -> None:
        self._active.difference_update(causes)

    @property
    def holding(self) -> str:
        """The latched cause, gravest first, or ""."""
        return next((cause for cause in ("estop", "tracking", "controller", "stop") if cause in self._latched), "")

    @property
    def measured(self) -> np.ndarray | None:
        """(J,) rad, the last usable joint state, None before the first."""
        return self._q

    def age_of_joints(self, steady: float) -> float:
        """Seconds since the last usable joint state, inf if none."""
        return math.inf if self._joint_seen is None else steady - self._joint_seen

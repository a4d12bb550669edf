"""The chunk executor: from policy chunks to one timed, limited, restful trajectory at a time.

Each chunk is aligned by its observation stamp, turned into a path in joint space (rows.py, path.py), given a time law
within the limits (path.py), and spliced onto the reference in flight (splice.py). Before a trajectory is published
it is proven against every limit (limits.py); candidates go from the smoothest splice to a stop followed by a fresh
start, and if none passes the motion in flight, which ends at rest, simply goes on. So no input can make a
published trajectory break a limit or a seam jump.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.gripper import GripperChannel
from vla_nodes.control.guards import Guard
from vla_nodes.control.history import JointHistory
from vla_nodes.control.lag import Lag
from vla_nodes.control.limits import Limits, excess
from vla_nodes.control.path import ChunkPath, TimeLaw, smoothed, time_law
from vla_nodes.control.robot import RobotModel
from vla_nodes.control.rows import JointRows, joint_rows
from vla_nodes.control.settings import ExecutorSettings, OnInstructionChange, Strategy
from vla_nodes.control.splice import clear_of_knots, hold, join_path, joined, with_prefix
from vla_nodes.control.stop import approach, come_to_rest
from vla_nodes.control.trajectory import Trajectory, sample

PLANNED = 0.95  # share of the limits the time law uses
HARD = 0.95  # share of the limits a join may ask for that is not to be had with less
# How a chunk may join the motion in flight, smoothest first, and how often each is tried slower.
MODES = (("moving", 4), ("rest", 6))
State = tuple[np.ndarray, np.ndarray, np.ndarray]  # q, q', q'' (J,)
FINE = 1.0 / 4.0  # knots: what must not wait is planned on finer ones
FINEST = 1.0 / 64.0  # s, rows closer together than that are thinned out: an arm cannot follow faster ones


@dataclass(frozen=True)
class ExecutorOutput:
    """What to publish for one chunk, and the seam in numbers.

    arm: trajectory to publish, None if none; grippers: the same by name of the gripper, None if none; refused: why the
    chunk was not used, or None, with a short `cause` to count by; begin: s, absolute, where the new motion leaves the
    old; mode: moving (blended onto the motion in flight), stopping (while slowing it down) or rest (after stopping it);
    gap, gap_velocity: rad,
    rad/s, largest disagreement of chunk and reference at begin, what a naive executor would jump by;
    seam_position, seam_velocity: rad, rad/s, what is left of it in the published trajectory; latency: s from the
    chunk's stamp to begin; dropped: rows already past; clipped: rows outside joint limits; stretched: s the path
    takes beyond the policy's pace; starved: s the reference had been at rest, its chunk used up.
    """

    arm: Trajectory | None = None
    grippers: dict[str, Trajectory] | None = None
    refused: str | None = None
    cause: str = ""
    begin: float = 0.0
    mode: str = ""
    blend: float = 0.0
    gap: float = 0.0
    gap_velocity: float = 0.0
    seam_position: float = 0.0
    seam_velocity: float = 0.0
    latency: float = 0.0
    dropped: int = 0
    clipped: int = 0
    stretched: float = 0.0
    starved: float = 0.0


def _refuse(cause: str, reason: str) -> ExecutorOutput:
    return ExecutorOutput(refused=reason, cause=cause)


class ChunkExecutor:
    """Feeds a joint trajectory controller from policy chunks. One per arm; not thread-safe.

    Use: observe(...) for every joint state, submit(...) for every chunk, publish what comes back.
    """

    def __init__(
        self, robot: RobotModel, settings: ExecutorSettings | None = None, guards: Sequence[tuple[str, Guard]] = ()
    ) -> None:
        """guards: (cause, guard) pairs that every splice must pass (guards.py)."""
        self.robot = robot
        self._guards = tuple(guards)
        self._objection = ("", "")
        self.settings = s = settings or ExecutorSettings()
        self.limits = Limits.scaled(robot, s.velocity_scale, s.acceleration_scale, s.jerk_scale, s.tool_speed)
        self.full = Limits.scaled(robot, 1.0, 1.0, 1.0, robot.max_tool_speed)
        self._joints = JointHistory(robot.dof, s.history, s.max_joint_gap)
        self.reset()

    def reset(self) -> None:
        """Forget the motion in flight and everything seen: the next chunk starts from the measured pose at rest."""
        self._plan: Trajectory | None = None
        self._grippers = {g.name: GripperChannel(g, self.settings.knot) for g in self.robot.grippers}
        self._joints.clear()
        self._lag = Lag(self.settings.at_rest == "path", 2.0 * self.settings.history)
        self._guess: tuple[float, ChunkPath] | None = None
        self._recent: deque[tuple[float, ChunkPath]] = deque(maxlen=self.settings.ensemble_size)
        self._instruction: str | None = None
        self._resume_after = -math.inf

    # -- what is seen ------------------------------------------------------------------------------------------

    def observe(self, stamp: float, q: np.ndarray, qd: np.ndarray, fingers: np.ndarray | float | None = None) -> None:
        """Measured arm joints q (J,) rad, qd (J,) rad/s at stamp; fingers: positions of the grippers' joints (G,), m or
        rad, in the robot's order (or the number, of one), None where they are not known.

        What is not finite, of another size or not later than the last one is ignored.
        """
        if self._joints.observe(stamp, q, qd) and fingers is not None:
            for channel, finger in zip(self._grippers.values(), np.atleast_1d(fingers).tolist(), strict=False):
                channel.observe(finger)

    def measured(self, stamp: float) -> np.ndarray | None:
        """Measured joints (J,) at a past stamp, interpolated; None if nothing was seen near it."""
        return self._joints.at(stamp)

    def reference(self, now: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """What the controller is following at now: q, qd, qdd (J,), or None before the first chunk."""
        return None if self._plan is None else sample(self._plan, now - self._plan.stamp)

    @property
    def plan(self) -> Trajectory | None:
        """The trajectory in flight (the last one published)."""
        return self._plan

    # -- what is done ------------------------------------------------------------------------------------------

    def submit(self, chunk: ActionChunk, now: float) -> ExecutorOutput:
        """Turn a chunk into the trajectories to publish now, or say why not; the motion in flight then goes on.

        Args: now: s, the clock the stamps are on.
        """
        s = self.settings
        problem = chunk.problem(self.robot.joint_names, self.robot.gripper_names)
        if problem is not None:
            return _refuse("malformed", problem)
        if chunk.stamp > now + s.max_joint_gap:
            return _refuse("future", f"chunk stamped {chunk.stamp - now:.3f} s ahead of the clock")
        measured = self.measured(chunk.stamp)
        if measured is None:
            return _refuse("no_joint_state", f"no joint state within {s.max_joint_gap} s of the chunk's stamp")
        if s.strategy is Strategy.NAIVE:
            return self._naive(chunk, measured, now)
        begin, base = self._begin(now), self._base(now)
        if base is None:
            return _refuse("no_joint_state", "no joint state yet")
        waiting = self._waiting(chunk, base, begin, now)
        if waiting is not None:
            return waiting
        rows = joint_rows(self.robot, chunk, measured, s.ik, s.unreachable, self._guess_for(chunk))
        if rows.reachable == 0:
            return _refuse("unreachable", f"the first row is {rows.short * 1e3:.0f} mm out of the arm's reach")
        path = self._path(chunk, measured, rows)
        start = max(begin - chunk.stamp - self._lag.between(chunk.stamp, begin), 0.0)
        if path is None or start > path.length - 0.5 * path.period:
            return _refuse("too_late", f"all {rows.reachable} usable rows are past, {start:.3f} s after the stamp")
        self._guess = (chunk.stamp, path)
        if s.strategy is Strategy.TEMPORAL_ENSEMBLE:
            path = self._ensemble(chunk.stamp, path)
        law = self._law(path, rows, start)
        if law.rate < s.slowest:
            return _refuse("too_fast", f"rows too far apart: the limits allow only {law.rate:.1%} of the asked pace")
        state = sample(base, begin - base.stamp)
        found = self._splice(base, begin, state, path, law)
        if found is None and self._objection[0]:
            return _refuse(*self._objection)
        if found is None:
            return _refuse("no_splice", "no motion within the limits joins this chunk to the reference in flight")
        return self._publish(chunk, now, begin, base, state, rows, *found)

    def stop(self, now: float, full: bool = False) -> Trajectory | None:
        """Decelerate to rest and hold: along the planned path, or faster off it where that would take too long.

        Args: full: at the robot's own limits instead of the scaled ones, and off the path wherever that is faster.
        Returns the trajectory to publish, None if nothing was ever seen or commanded.
        """
        base = self._base(now)
        if base is None:
            return None
        if full:
            begin, knot = self._begin(now, FINE), FINE * self.settings.knot
            after = come_to_rest(base, begin, self.full, self.robot, knot, None)
        else:
            after = self._stopping(base, self._begin(now))
        self._plan = with_prefix(base, now, after, self.settings.knot)
        return self._plan

    def approach(self, target: np.ndarray, now: float, full: bool = False) -> Trajectory | None:
        """Move to rest at joint positions `target` (J,); None if nothing is known, ruckig finds no way, or a guard
        objects to it.

        Args: full: with the robot's own acceleration and jerk; its speed stays scaled.
        """
        base, limits, fine = self._base(now), self.limits, 1.0
        if base is None:
            return None
        if full:
            limits, fine = replace(self.full, velocity=limits.velocity, tool_speed=limits.tool_speed), FINE
        begin, knot = self._begin(now, fine), fine * self.settings.knot
        state = sample(base, begin - base.stamp)
        for slower in (1.0, 1.2, 1.5, 2.0, 3.0, 5.0):
            after = approach(self.robot.joint_names, limits, *state, target, begin, knot, slower)
            if after is not None and excess(after, limits, self.robot)[0] <= 1.0:
                if self._objects(after, float(after.times[-1])):
                    return None
                self._plan = with_prefix(base, now, after, self.settings.knot)
                return self._plan
        return None

    # -- parts of submit ---------------------------------------------------------------------------------------

    def _begin(self, now: float, fine: float = 1.0) -> float:
        """When what is planned now may begin: `lead` from now, on a multiple of `fine` knots."""
        knot = self.settings.knot
        begin = math.ceil((now + self.settings.lead) / (fine * knot) - 1e-6) * fine * knot
        return begin if self._plan is None else clear_of_knots(self._plan, begin, knot)

    def _base(self, now: float) -> Trajectory | None:
        if self._plan is not None:
            return self._plan
        if self._joints.latest is None:
            return None
        return hold(self.robot.joint_names, self._joints.latest, self._begin(now) - 1.0, self.settings.knot)

    def _waiting(self, chunk: ActionChunk, base: Trajectory, begin: float, now: float) -> ExecutorOutput | None:
        """The refusal of a chunk whose time has not come, by strategy and instruction; may start a stop."""
        s = self.settings
        changed = self._instruction is not None and chunk.instruction != self._instruction
        finishing = s.strategy is Strategy.FINISH_CHUNK or (
            changed and s.on_instruction_change is OnInstructionChange.FINISH_CHUNK
        )
        if finishing and base.end > begin + 1e-9 and self._plan is not None:
            return _refuse("finishing", f"the chunk in flight goes on for {base.end - now:.2f} s")
        if changed and s.on_instruction_change is OnInstructionChange.STOP_FIRST:
            self._instruction = chunk.instruction
            self._recent.clear()
            if base.end > begin + 1e-9:
                arm = self.stop(now)
                assert arm is not None  # there is a base to stop
                self._resume_after = arm.end
                reason = "stopping before the new instruction is carried out"
                return ExecutorOutput(arm=arm, refused=reason, cause="stopping", begin=begin)
        if chunk.stamp < self._resume_after:
            return _refuse("stopping", "computed before the arm came to rest for the new instruction")
        if changed:
            self._recent.clear()  # an ensemble must not mix two instructions
        return None

    def _path(self, chunk: ActionChunk, measured: np.ndarray, rows: JointRows) -> ChunkPath | None:
        """The chunk's path, from where it is at its stamp on; None if it is too short to be one."""
        q, period = rows.q[: min(rows.reachable, int(self.settings.span / chunk.period))], chunk.period
        if period < FINEST:
            each = math.ceil(FINEST / period - 1e-9)
            q, period = q[each - 1 :: each], each * period
        if not len(q):
            return None
        points = np.concatenate([self._origin(chunk, measured, q)[None], q])
        return ChunkPath(smoothed(points, period, self.settings.smoothing), period)

    def _origin(self, chunk: ActionChunk, measured: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Where a chunk's path is at its stamp (J,), its rows being at q (H, J): deltas begin at the measured joints,
        absolute rows in line with themselves. An arm that is elsewhere joins them; its distance is no part of the
        path, whose every step sets the pace of all the others."""
        if chunk.action_space in (ActionSpace.EE_DELTA, ActionSpace.JOINT_DELTA) or len(q) < 2:
            return measured
        return np.minimum(np.maximum(2.0 * q[0] - q[1], self.limits.lower), self.limits.upper)

    def _guess_for(self, chunk: ActionChunk) -> np.ndarray | None:
        """The previous chunk's joints at this chunk's row times: close to the solution when policies are consistent."""
        if self._guess is None:
            return None
        stamp, path = self._guess
        s = chunk.stamp - stamp + chunk.period * np.arange(1, len(chunk.actions) + 1)
        if not 0.0 <= s[0] <= path.length:
            return None
        x = np.minimum(s, path.length) / path.period
        i = np.minimum(x.astype(int), len(path.points) - 2)
        return path.points[i] + (x - i)[:, None] * (path.points[i + 1] - path.points[i])

    def _ensemble(self, stamp: float, path: ChunkPath) -> ChunkPath:
        """The weighted mean of recent chunks at this chunk's row times, oldest weighted most (ACT, section IV.B)."""
        self._recent.append((stamp, path))
        times = stamp + path.period * np.arange(len(path.points))
        total, weight = np.zeros_like(path.points), np.zeros((len(times), 1))
        for i, (old_stamp, old) in enumerate(self._recent):
            covered = (times >= old_stamp) & (times <= old_stamp + old.length + 1e-9)
            if covered.any():
                w = math.exp(-self.settings.ensemble_decay * i)
                total[covered] += w * old.evaluate(times[covered] - old_stamp)[0]
                weight[covered] += w
        return replace(path, points=total / weight)

    def _law(self, path: ChunkPath, rows: JointRows, start: float) -> TimeLaw:
        limits = self.limits
        tool = np.concatenate([self.robot.forward(path.points[0])[None, :3, 3], rows.tool[: rows.reachable]])
        steps = tool[1:] - tool[:-1]
        step = math.sqrt(float((steps * steps).sum(axis=1).max()))
        fastest = min(1.0, PLANNED * limits.tool_speed * path.period / max(step, 1e-9))
        return time_law(path, start, PLANNED * limits.rates, fastest)

    def _splice(
        self, base: Trajectory, begin: float, state: State, path: ChunkPath, law: TimeLaw
    ) -> tuple[Trajectory, TimeLaw, str, float, float, tuple[float, float]] | None:
        """The first candidate proven within the limits: its trajectory from begin on, law, mode, when the join
        begins (s after begin), how long it takes, and what it bridges (rad, rad/s)."""
        limits, names, s, self._objection = self.limits, base.joint_names, self.settings, ("", "")
        t0, stopping = 0.0, None
        for mode, attempts in MODES:
            if mode == "rest":
                stopping = self._stopping(base, begin)
                t0 = float(stopping.times[-1])
                velocities, accelerations = stopping.derivatives()
                state = stopping.positions[-1], velocities[-1], accelerations[-1]
            slower, effort, tried = 1.0, s.effort, law
            for _ in range(attempts):
                found = join_path(names, begin + t0, state, path, tried, limits, s.blend, effort)
                if found is not None:
                    after, over, gaps = found
                    if stopping is not None and t0 > 0.0:
                        after = joined(stopping, after)
                    ratio, whose = excess(after, limits, self.robot)
                    if ratio <= 1.0 and self._objects(after, t0 + over):
                        break
                    if ratio <= 1.0:
                        return after, tried, mode, t0, over, gaps
                    if not math.isfinite(ratio):
                        break
                    effort *= 0.9 / ratio
                elif effort < HARD:
                    effort, ratio = HARD, 1.0  # in less time, then
                    continue
                slower *= 1.25 if found is None else 1.03 * ratio
                tried = time_law(path, law.start, PLANNED * limits.rates, law.rate / slower)
        return None

    def _objects(self, after: Trajectory, over: float) -> bool:
        for cause, guard in self._guards:
            if reason := guard(after, over):
                self._objection = cause, reason
                return True
        return False

    def _stopping(self, base: Trajectory, begin: float) -> Trajectory:
        return come_to_rest(base, begin, self.limits, self.robot, self.settings.knot, self.settings.stop_time)

    def _publish(
        self,
        chunk: ActionChunk,
        now: float,
        begin: float,
        base: Trajectory,
        state: State,
        rows: JointRows,
        after: Trajectory,
        law: TimeLaw,
        mode: str,
        t0: float,
        over: float,
        gaps: tuple[float, float],
    ) -> ExecutorOutput:
        s = self.settings
        arm = with_prefix(base, now, after, s.knot)
        new = sample(arm, begin - arm.stamp)
        starved = max(now - base.end, 0.0) if self._plan is not None else 0.0
        self._lag.follow(begin, t0, law)
        self._plan = arm
        self._instruction = chunk.instruction
        return ExecutorOutput(
            arm=arm,
            grippers=self._gripper_motions(chunk, rows, now, begin, law, t0),
            begin=begin,
            mode=mode,
            blend=over,
            gap=gaps[0],
            gap_velocity=gaps[1],
            seam_position=float(np.abs(new[0] - state[0]).max()),
            seam_velocity=float(np.abs(new[1] - state[1]).max()),
            latency=begin - chunk.stamp,
            dropped=int(law.start / chunk.period),
            clipped=rows.clipped,
            stretched=max(t0 + law.cruise - (law.end - law.start) + 0.5 * law.tail, 0.0),
            starved=starved,
        )

    def _gripper_motions(
        self, chunk: ActionChunk, rows: JointRows, now: float, begin: float, law: TimeLaw, t0: float
    ) -> dict[str, Trajectory] | None:
        """Trajectories of the grippers that have something to do, by name, or None."""
        moved = {}
        for name, opening in zip(chunk.grippers, rows.openings.T, strict=True):
            trajectory = self._grippers[name].submit(chunk.period, opening, now, begin, law, t0)
            if trajectory is not None:
                moved[name] = trajectory
        return moved or None

    def _naive(self, chunk: ActionChunk, measured: np.ndarray, now: float) -> ExecutorOutput:
        rows = joint_rows(self.robot, chunk, measured, self.settings.ik, math.inf, self._guess_for(chunk))
        times = chunk.period * np.arange(1, len(rows.q) + 1)
        arm = Trajectory(self.robot.joint_names, times, rows.q, stamp=0.0)
        by_name = {gripper.name: gripper for gripper in self.robot.grippers}
        grippers = {}
        for name, opening in zip(chunk.grippers, rows.openings.T, strict=True):
            fingers = by_name[name].position(opening)[:, None]
            grippers[name] = Trajectory((by_name[name].joint,), times, fingers, stamp=0.0)
        return ExecutorOutput(arm=arm, grippers=grippers or None, begin=now, mode="naive", latency=now - chunk.stamp)

"""action_node without ROS: the safety gate before the executor, and one smooth stop for every reason to stop."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vla_nodes.control.chunk import ActionChunk
from vla_nodes.control.executor import ChunkExecutor, ExecutorOutput
from vla_nodes.control.guards import Guard, WorkspaceGuard
from vla_nodes.control.limits import OUTSIDE
from vla_nodes.control.robot import RobotModel
from vla_nodes.control.safety import Action, SafetyGate, SafetySettings, Verdict
from vla_nodes.control.seam_report import SeamRecord
from vla_nodes.control.settings import ExecutorSettings
from vla_nodes.control.trajectory import Trajectory

LONGEST_AGE = 1.0  # s; joints measured longer ago are looked at as if it were then
ALLOWANCE = 1e-3  # m, rounding at the workspace's faces


@dataclass(frozen=True)
class Answer:
    """What to publish, and what to tell the operator. `new`: the cause was not there before, so log it once; `output`:
    the seam in numbers, where the executor saw a chunk."""

    arm: Trajectory | None = None
    grippers: dict[str, Trajectory] | None = None  # by name of the gripper
    cause: str = ""
    reason: str = ""
    new: bool = False
    output: ExecutorOutput | None = None


class ActionCore:
    """One arm. Not thread-safe. `now` is the ROS clock, `steady` a clock that never jumps, both in s."""

    def __init__(
        self,
        robot: RobotModel,
        executor: ExecutorSettings,
        safety: SafetySettings,
        window: int = 500,
        guards: Sequence[tuple[str, Guard]] = (),
        record: Callable[[SeamRecord], None] | None = None,
    ) -> None:
        """guards: (cause, guard) beside that of the workspace; record: given the seam of every chunk the gate lets
        through."""
        self.robot = robot
        low = np.maximum(safety.workspace_low, [-np.inf, -np.inf, safety.table])
        self._workspace = WorkspaceGuard(robot, low, np.array(safety.workspace_high))
        self.executor = ChunkExecutor(robot, executor, (("workspace", self._workspace), *guards))
        self._record = record
        self.gate = SafetyGate(robot, safety)
        self.used = 0
        self.clipped = 0
        self.stretched = 0.0
        self.starved = 0.0
        self._latency: deque[float] = deque(maxlen=window)
        self._commanded: deque[float] = deque(maxlen=window)
        self._gap: deque[float] = deque(maxlen=window)
        self._gap_velocity: deque[float] = deque(maxlen=window)
        self._seam: deque[float] = deque(maxlen=window)
        self._seam_velocity: deque[float] = deque(maxlen=window)
        self.stops: Counter[str] = Counter()
        self._stopped_for = ""
        self.reason = ""
        """Why the gate holds the arm, in one line, or ""."""

    @property
    def holding(self) -> str:
        """Cause for which the arm is held at present, or ""."""
        return self._stopped_for

    def moving(self, now: float) -> bool:
        plan = self.executor.plan
        return plan is not None and plan.end > now

    def reset(self) -> None:
        """Activation or a clock set back: no motion in flight, the next chunk starts from the measured pose."""
        self.executor.reset()
        self.gate.reset()
        self._stopped_for = ""

    def joints(self, stamp: float, q: np.ndarray, qd: np.ndarray, fingers: np.ndarray | None, steady: float) -> Answer:
        """A joint state: arm q (J,) rad, qd (J,) rad/s, the grippers' joints (G,) if known, at `stamp` s."""
        verdict = self.gate.observe(q, steady)
        if verdict.action is not Action.GO:
            return Answer(cause=verdict.cause, reason=verdict.reason, new=verdict.new)
        self.executor.observe(stamp, q, qd, fingers)
        return Answer()

    def chunk(self, chunk: ActionChunk, now: float) -> Answer:
        """Take a new chunk. Returns the trajectories to publish, or why the chunk was refused."""
        held = self.gate.holding or self._stopped_for
        if held and held not in ("policy", "silent_policy"):
            new = self.gate.refused(f"held: {held}")
            return Answer(cause=held, reason=f"chunk not carried out while held ({held})", new=new)
        verdict = self.gate.check(chunk, now, self.executor.measured(chunk.stamp))
        if verdict.chunk is None:
            return Answer(cause=verdict.cause, reason=verdict.reason, new=verdict.new)
        output = self.executor.submit(verdict.chunk, now)
        if self._record is not None:
            self._record(SeamRecord.of(output, now))
        if output.refused is not None:
            new = self.gate.refused(output.cause)
            return Answer(output.arm, output.grippers, output.cause, output.refused, new, output)
        self.gate.used(now)
        self._stopped_for = ""
        self._commanded.append(now - chunk.stamp)
        self._count(output)
        return Answer(output.arm, output.grippers, verdict.cause, verdict.reason, verdict.new, output)

    def tick(self, now: float, steady: float, idle: str = "") -> Answer:
        """To be called at 20 Hz or more: returns a stop to publish where the arm must stop.

        Args: idle: why no chunk is to be expected (the policy holds or is silent), or "".
        """
        # Where the arm should have been when it was measured last: silence is no tracking error.
        reference = self.executor.reference(now - min(self.gate.age_of_joints(steady), LONGEST_AGE))
        verdict = self.gate.tick(now, steady, None if reference is None else reference[0], self.moving(now))
        self.reason = verdict.reason
        if verdict.action is Action.FORGET:
            return self._forget(verdict)
        if verdict.action is Action.RELEASE:
            return self._release(now, verdict)
        if verdict.action is Action.HOLD:
            return self._hold(now, verdict.cause, verdict.reason, verdict.new)
        if idle and self.moving(now):
            return self._hold(now, "policy", idle, self._stopped_for != "policy")
        if self._stopped_for not in ("", "policy", "silent_policy") or not idle:
            self._stopped_for = ""
        return Answer()

    def lost(self, reason: str, astray: bool = False) -> Answer:
        """The controller gave up the motion in flight and holds: the next chunk starts from the measured pose.

        Args: astray: because the arm did not follow. That chunk then comes after resume only: from where an arm with
        an offset says that it is, every start would move it by that offset.
        """
        new = self.gate.refused("controller")
        if astray:
            self.gate.hold("controller", reason)
        self.executor.reset()
        return Answer(cause="controller", reason=reason, new=new or astray)

    def stop(self, now: float) -> Trajectory | None:
        """A decelerating stop at once, whatever is in flight (deactivation)."""
        return self.executor.stop(now) if self.moving(now) else None

    def numbers(self) -> dict[str, str]:
        """Numbers on how chunks were joined, for diagnostics."""

        def percentiles(values: deque[float], scale: float) -> str:
            if not values:
                return "none yet"
            p50, p99 = np.percentile(values, [50, 99])
            return f"{p50 * scale:.4g}, {p99 * scale:.4g}"

        return {
            "chunks carried out": str(self.used),
            "latency exposure to command p50, p99 [ms]": percentiles(self._commanded, 1e3),
            "latency exposure to splice p50, p99 [ms]": percentiles(self._latency, 1e3),
            "gap bridged at the seam p50, p99 [rad]": percentiles(self._gap, 1.0),
            "gap bridged at the seam p50, p99 [rad/s]": percentiles(self._gap_velocity, 1.0),
            "seam left in the trajectory p50, p99 [rad]": percentiles(self._seam, 1.0),
            "seam left in the trajectory p50, p99 [rad/s]": percentiles(self._seam_velocity, 1.0),
            "rows clipped at joint limits": str(self.clipped),
            "time stretched [s]": f"{self.stretched:.2f}",
            "time starved [s]": f"{self.starved:.2f}",
            **{f"count of {cause}": str(count) for cause, count in sorted(self.gate.counts.items())},
        }

    def _hold(self, now: float, cause: str, reason: str, new: bool) -> Answer:
        """Publish one stop per cause. A hold that continues needs no other: a stop's trajectory ends at rest."""
        begun = cause == self._stopped_for
        self._stopped_for = cause
        if begun or not self.moving(now):
            return Answer(cause=cause, reason=reason, new=new)
        self.stops[cause] += 1
        return Answer(self.executor.stop(now, full=cause == "estop"), None, cause, reason, new)

    def _forget(self, verdict: Verdict) -> Answer:
        """After a clock jump the reference means nothing; the controller holds, and the first joint state of the new
        time is yet to come."""
        self.stops[verdict.cause] += 1
        self._stopped_for = verdict.cause
        self.executor.reset()
        return Answer(None, None, verdict.cause, verdict.reason, verdict.new)

    def _release(self, now: float, verdict: Verdict) -> Answer:
        """The arm does not follow. Joints that the reference left are let go: it moves back to where they are, this one
        time, if that is within the joint limits and the workspace. For others it stays where it is."""
        self.stops[verdict.cause] += 1
        self._stopped_for = verdict.cause
        trajectory, abandoned = None, self.gate.tracking.abandoned
        following, measured = self.executor.reference(now), self.gate.measured
        if abandoned.any() and following is not None and measured is not None:
            reference = following[0]
            back = np.where(abandoned, measured, reference)
            if self._allowed(back, reference):
                trajectory = self.executor.approach(back, now, full=True)
        if trajectory is None and self.moving(now):
            trajectory = self.executor.stop(now, full=True)
        return Answer(trajectory, None, verdict.cause, verdict.reason, verdict.new)

    def _allowed(self, target: np.ndarray, reference: np.ndarray) -> bool:
        """Whether the reference (J,) may move to the target (J,), where something that blocks the arm has it."""
        if (target < self.robot.lower - OUTSIDE).any() or (target > self.robot.upper + OUTSIDE).any():
            return False
        beyond = self._workspace.beyond(np.stack([reference, target]))
        return bool((beyond[1] <= np.maximum(beyond[0], 0.0) + ALLOWANCE).all())

    def _count(self, output: ExecutorOutput) -> None:
        self.used += 1
        self.clipped += output.clipped
        self.stretched += output.stretched
        self.starved += output.starved
        self._latency.append(output.latency)
        self._gap.append(output.gap)
        self._gap_velocity.append(output.gap_velocity)
        self._seam.append(output.seam_position)
        self._seam_velocity.append(output.seam_velocity)

"""Drives the live pipeline through a recording in bag time, as fast as the machine can, with one result for one input.

The rules are the nodes' own (`pipeline/`): a message comes in, the policy steps on the newest complete observation if
one is due, its chunk goes to the executor behind the safety gate, and both look around on their timers. What a machine
decides on the robot is fixed here: a step takes `latency` of bag time, whatever it takes on the wall. Time is that of
the recording (clock.py); timers run in it; at equal times a finished step comes first, then the gate, then the policy's
watch, then the recording's next message.

Not replayed: what operators press (vla/stop, estop, deadman). The recorded arm does not follow our commands, so
the loop is open: the safety gate may find that the arm "does not follow" where the policy wants to go elsewhere.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_nodes.control.robot import RobotModel
from vla_nodes.control.trajectory import Trajectory, sample
from vla_nodes.pipeline.action_core import ActionCore, Answer
from vla_nodes.pipeline.action_loop import GATE_PERIOD, ActionLoop, executor_settings, safety_settings
from vla_nodes.pipeline.messages import chunk_fields, matrix_from, pose_matrix, status_fields
from vla_nodes.pipeline.policy_core import PolicyCore
from vla_nodes.pipeline.policy_loop import STATUS_PERIOD, WATCH_PERIOD, Job, PolicyLoop
from vla_nodes.replay.clock import Event

SAMPLE_PERIOD = 0.05
"""s of bag time between two samples of what the controllers would be following."""
IDLE = 5 * 10**9
"""ns without any message after which timers need not run on: everything has timed out and stopped."""


@dataclass(frozen=True)
class Step:
    """One policy step: number, the observation's stamp (ns), bag time of start and end (ns), what it was for and what
    came out (output None and error set where it failed), wall time in s."""

    number: int
    stamp: int
    begun: int
    ended: int
    instruction: str
    output: Any
    error: Exception | None
    wall: float


class Sink:
    """What becomes of the results; every method may be overridden. Times are ns of bag time."""

    def message(self, event: Event) -> None:
        """A message of the recording, before it is used."""

    def step(self, step: Step, published: bool) -> None:
        """A step has ended; published: its chunk goes to the executor."""

    def chunk(self, now: int, fields: dict[str, Any], stamp: int) -> None:
        """A chunk is published: ActionChunk's fields, the observation's stamp."""

    def answer(self, now: int, answer: Answer, chunk_stamp: int | None, wall: float) -> None:
        """The executor or the gate has something to publish or to say; chunk_stamp: for a chunk of that stamp."""

    def status(self, now: int, fields: dict[str, Any]) -> None:
        """vla/status is published: PolicyStatus' fields."""

    def commanded(self, now: int, q: np.ndarray | None, qd: np.ndarray | None, finger: float) -> None:
        """Every SAMPLE_PERIOD: what the controllers follow, (J,) rad, rad/s, or None before the first chunk; m."""

    def measured(self, now: int, stamp: int, q: np.ndarray, reference: np.ndarray | None) -> None:
        """A joint_states message: its stamp, arm joints (J,) rad, and what we had commanded for that stamp."""

    def problem(self, now: int, text: str) -> None:
        """Something an operator would have read in a node's log."""


class Replay:
    """One pass through a recording; make a new one for each. The runtime may be shared by passes, one at a time."""

    def __init__(
        self, runtime: Any, robot: RobotModel, parameters: dict[str, dict[str, Any]], latency: float, sink: Sink,
        instruction: str = "",
    ) -> None:  # fmt: skip
        """
        Args:
            runtime: a PolicyRuntime that fits the robot.
            parameters: of policy_node and action_node, see parameters.load.
            latency: s of bag time from an observation's arrival to its chunk's.
            instruction: put in force at the start; those of the recording are then ignored.

        Raises:
            ValueError: a parameter out of range, a camera_pose that is none.
        """
        p, a = parameters["policy_node"], parameters["action_node"]
        self.robot, self.sink, self.latency = robot, sink, round(latency * 1e9)
        self.core = PolicyCore(runtime, p["rate"] or 1.0 / runtime.config.tick, p["max_image_age"])
        self.policy = PolicyLoop(self.core, robot, p["slop"], p["use_depth"], p["joint_map"])
        core = ActionCore(robot, executor_settings(a.__getitem__), safety_settings(a.__getitem__))
        self.action = ActionLoop(core, a["joint_map"])
        self.counts: Counter[str] = Counter()
        self._instruction, self._base = instruction, p["base_frame"]
        self._fixed_pose = p["camera_pose_source"] == "parameter"
        self._pose = matrix_from(p["camera_pose"]) if self._fixed_pose else None
        self._pose_problem = "no camera/pose in the recording so far"
        self._finger: Trajectory | None = None
        self._job: tuple[Job, Future, int] | None = None
        self._ends = 0
        self._now = self._steady = 0
        self._gate = self._watch = self._sample = 0
        self._status_at = -(10**12)

    def run(self, events: Iterator[Event], progress: Callable[[Event], None] | None = None) -> None:
        """Go through all events. Raises what reading them raises, after what came before has been worked off."""
        with ThreadPoolExecutor(1, thread_name_prefix="policy") as self._worker:
            started = False
            try:
                for event in events:
                    if not started:
                        started = True
                        self._start(event.now)
                    if event.jumped:
                        self._jump(event.now)
                    self._advance(event.now)
                    self.sink.message(event)
                    self._take(event)
                    if progress is not None:
                        progress(event)
            finally:
                if started:
                    self._advance(max(self._now, self._ends if self._job else self._now))

    # -- time --------------------------------------------------------------------------------------------------------
    @property
    def now(self) -> int:
        return self._now

    def _start(self, now: int) -> None:
        self._now = now
        self._set_timers(now)
        if self._instruction:
            self._instruct(self._instruction)
        self.core.activate()
        self.action.core.reset()
        self._publish_status()

    def _set_timers(self, now: int) -> None:
        periods = (GATE_PERIOD, WATCH_PERIOD, SAMPLE_PERIOD)
        self._gate, self._watch, self._sample = (now + round(period * 1e9) for period in periods)

    def _jump(self, now: int) -> None:
        """The clock was set back: as the nodes do then. The steady clock just goes on."""
        self.counts["clock set back"] += 1
        self.sink.problem(self._now, f"the clock was set back by {(self._now - now) * 1e-9:.3f} s")
        self._steady += self._now - now
        self._now = now
        self._ends = min(self._ends, now + self.latency)
        self._set_timers(now)
        self.policy.clear()
        self.core.reset()
        self.core.waiting("the clock was set back: waiting for an observation")
        self.action.core.reset()

    def _advance(self, target: int) -> None:
        """Everything that is due up to `target` ns, in order."""
        quiet = self._now + IDLE
        while True:
            ends = self._ends if self._job is not None else target + 1
            due = min(ends, self._gate, self._watch, self._sample)
            if due > target:
                break
            if due > quiet:
                self._now = target
                self._set_timers(target)
                continue
            self._now = max(self._now, due)
            if due == ends:
                self._finish()
            elif due == self._gate:
                self._gate += round(GATE_PERIOD * 1e9)
                self._answer(self.action.tick(self._seconds, self._steady_seconds), None, 0.0)
            elif due == self._watch:
                self._watch += round(WATCH_PERIOD * 1e9)
                self._look()
            else:
                self._sample += round(SAMPLE_PERIOD * 1e9)
                self._show()
        self._now = max(self._now, target)

    @property
    def _seconds(self) -> float:
        return self._now * 1e-9

    @property
    def _steady_seconds(self) -> float:
        return (self._now + self._steady) * 1e-9

    # -- messages ----------------------------------------------------------------------------------------------------
    def _take(self, event: Event) -> None:
        name, message = event.name, event.message
        if name in ("color", "depth", "info"):
            getattr(self.policy, name)(message)
            self._try()
        elif name == "joints":
            self._joints(message)
        elif name == "instruction" and not self._instruction:
            self._instruct(message.data)
        elif name == "active_instruction" and not self._instruction:
            # What was in force when the recording began, as action_node tells a policy_node that comes back.
            if message.data and not self.core.instruction and not self.core.refused:
                self._instruct(message.data)
        elif name == "camera_pose" and not self._fixed_pose:
            self._take_pose(message)
        if name:
            self.counts[name] += 1

    def _joints(self, message: Any) -> None:
        if problem := self.policy.joints(message):
            self.sink.problem(self._now, problem)
        answer = self.action.joints(message, self._steady_seconds)
        if answer.new:
            self._answer(answer, None, 0.0)
        if self.action.joint_problem:
            self.counts["joints: unusable"] += 1
            return
        q, _, _ = self.action.read_joints(message)
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        reference = self.action.core.executor.reference(stamp * 1e-9)
        self.sink.measured(self._now, stamp, q, None if reference is None else reference[0])
        self._try()

    def _instruct(self, text: str) -> None:
        if refused := self.core.instruct(text):
            self.sink.problem(self._now, f"instruction refused, the arm holds: {refused}")
        self._publish_status()

    def _take_pose(self, message: Any) -> None:
        self._pose = None
        if message.header.frame_id != self._base:
            self._pose_problem = f"camera/pose is in frame '{message.header.frame_id}', base_frame is '{self._base}'"
        else:
            try:
                self._pose = pose_matrix(message.pose)
                return
            except ValueError as error:
                self._pose_problem = f"camera/pose: {error}"
        self.sink.problem(self._now, self._pose_problem)

    # -- the policy --------------------------------------------------------------------------------------------------
    def _try(self) -> None:
        if self._job is not None:
            return
        job = self.policy.next(self._seconds, lambda: self._pose)
        if job is None:
            return
        self.core.started(job.ticket)
        self._job = (job, self._worker.submit(self._compute, job), self._now)
        self._ends = self._now + self.latency
        if not self.latency:
            self._finish()

    def _compute(self, job: Job) -> tuple[Any, Exception | None, float]:
        started = time.perf_counter()
        try:
            return self.policy.compute(job), None, time.perf_counter() - started
        except Exception as error:  # a step that fails is a result: the live node holds and says why
            return None, error, time.perf_counter() - started

    def _finish(self) -> None:
        job, future, begun = self._job
        self._job = None
        output, error, wall = future.result()
        ticket, stamp = job.ticket, job.pair.color.header.stamp
        ns = stamp.sec * 10**9 + stamp.nanosec
        published = self.core.finished(ticket, output, error, self.latency * 1e-9, self._seconds)
        self.counts["steps"] += 1
        step = Step(self.counts["steps"], ns, begun, self._now, ticket.instruction, output, error, wall)
        self.sink.step(step, published)
        if error is not None:
            self.sink.problem(self._now, f"policy step failed: {error!r}")
        if published:
            fields = chunk_fields(self.core.runtime.config, ticket.instruction, output.actions)
            self.sink.chunk(self._now, fields, ns)
            started = time.perf_counter()
            answer = self.action.chunk(_Message(stamp, fields), self._seconds)
            self._answer(answer, ns, time.perf_counter() - started)
        self._publish_status()

    def _look(self) -> None:
        """The policy node's watch timer."""
        if self.core.instruction and self._job is None:
            self._try()
            if self._job is None:
                self.policy.watch(self._seconds, self._pose_problem if self._pose is None else "")
        if self._now - self._status_at > STATUS_PERIOD * 1e9:
            self._publish_status()

    def _publish_status(self) -> None:
        fields = status_fields(self.core)
        fields["dropped_frames"] = self.policy.dropped_frames()
        self._status_at = self._now
        self.sink.status(self._now, fields)
        self.action.status(fields["state"], fields["reason"])

    # -- the arm -----------------------------------------------------------------------------------------------------
    def _answer(self, answer: Answer, chunk_stamp: int | None, wall: float) -> None:
        if answer.gripper is not None:
            self._finger = answer.gripper
        if chunk_stamp is not None or answer.arm is not None or answer.gripper is not None or answer.new:
            self.sink.answer(self._now, answer, chunk_stamp, wall)

    def _show(self) -> None:
        reference = self.action.core.executor.reference(self._seconds)
        finger = float("nan")
        if self._finger is not None:
            finger = float(sample(self._finger, self._seconds - self._finger.stamp)[0][0])
        q, qd = (None, None) if reference is None else reference[:2]
        self.sink.commanded(self._now, q, qd, finger)


class _Message:
    """An ActionChunk message's fields with its header, as action_node gets it."""

    def __init__(self, stamp: Any, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self.header = _Header(stamp)


@dataclass(frozen=True)
class _Header:
    stamp: Any

"""Drives the live pipeline through a recording in bag time, as fast as the machine can, with one result for one input.

The rules are the nodes' own (`pipeline/`): a message comes in, the policy steps on the newest complete observation if
one is due, its chunk goes to the executor behind the safety gate, and both look around on their timers. What a machine
decides on the robot is fixed here: a step takes `latency` of bag time, whatever it takes on the wall. Time is that of
the recording (rosbag.timeline), and timers run in it. At equal times a finished step comes first, then the gate, then
the policy's watch, then the recording's next message.

Not replayed: what operators press (vla/stop, estop, deadman). The recorded arm does not follow our commands, so
the loop is open: where the policy wants to go elsewhere the safety gate finds that the arm does not follow, and holds
it for the rest of the recording, as on the robot. A larger action_node.tracking_tolerance lets such a replay go on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_nodes.control.robot import RobotModel
from vla_nodes.control.trajectory import Trajectory, sample
from vla_nodes.messages.convert import chunk_fields, status_fields
from vla_nodes.pipeline.action_core import ActionCore, Answer
from vla_nodes.pipeline.action_loop import GATE_PERIOD, ActionLoop, executor_settings, safety_settings
from vla_nodes.pipeline.policy_loop import STATUS_PERIOD, Job
from vla_nodes.policy.contract import Box
from vla_nodes.replay.policy_clock import PolicySide, Scout
from vla_nodes.rosbag.timeline import Event, nanoseconds

SAMPLE_PERIOD = 0.05
"""s of bag time between two samples of what the controllers would be following."""
SWITCH = 2e-4
"""s after which one thread lets another have the interpreter: a step of the policy is hundreds of short operations."""


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

    def commanded(self, now: int, q: np.ndarray | None, qd: np.ndarray | None, fingers: np.ndarray) -> None:
        """Every SAMPLE_PERIOD: what the controllers follow, (J,) rad, rad/s, or None before the first chunk; (G,) m or
        rad of the grippers' joints, NaN before their first command."""

    def measured(self, now: int, stamp: int, q: np.ndarray, reference: np.ndarray | None) -> None:
        """A joint_states message: its stamp, arm joints (J,) rad, and what we had commanded for that stamp."""

    def problem(self, now: int, text: str) -> None:
        """Something an operator would have read in a node's log."""


class Replay(PolicySide):
    """One pass through a recording; make a new one for each. The runtime may be shared by passes, one at a time."""

    def __init__(
        self, runtime: Any, robot: RobotModel, workspace: Box | None, parameters: dict[str, dict[str, Any]],
        latency: float, sink: Sink, instruction: str = "",
    ) -> None:  # fmt: skip
        """
        Args:
            runtime: a PolicyRuntime that fits the robot.
            workspace: of the robot's contract.yaml.
            parameters: of policy_node and action_node, see parameters.load.
            latency: s of bag time from an observation's arrival to its chunk's.
            instruction: put in force at the start; those of the recording are then ignored.

        Raises:
            ValueError: a parameter out of range, a camera_pose that is none.
        """
        arguments = (runtime, robot, parameters, latency, instruction)
        super().__init__(*arguments)
        a = parameters["action_node"]
        core = ActionCore(robot, executor_settings(a.__getitem__), safety_settings(a.__getitem__, workspace))
        self.action = ActionLoop(core, a["joint_map"])
        self.sink = sink
        self._for_scout = arguments
        self._scout: Scout | None = None
        self._fingers: dict[str, Trajectory] = {}  # by gripper
        self._set_back = 0  # ns that the clock was set back so far: the steady clock was not
        self._status_at = -(10**12)

    def run(self, events: Iterator[Event], progress: Callable[[Event], None] | None = None) -> None:
        """Go through all events. Raises what reading them raises, after what came before has been worked off."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH)
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="policy") as worker:
                self._scout = Scout(worker, *self._for_scout)
                try:
                    for event in self._scout.lead(events):
                        self.sink.message(event)
                        self.feed(event)
                        if event.name:
                            self.counts[event.name] += 1
                        if progress is not None:
                            progress(event)
                finally:
                    if self.begun:
                        self.drain()
        finally:
            sys.setswitchinterval(interval)

    def timers(self) -> list[tuple[float, Callable[[], None]]]:
        return [(GATE_PERIOD, self._gate), *super().timers(), (SAMPLE_PERIOD, self._show)]

    @property
    def _steady(self) -> float:
        return (self._now + self._set_back) * 1e-9

    # -- the policy's side ---------------------------------------------------------------------------------------------
    def started(self) -> None:
        self.action.core.reset()

    def _jump(self, now: int) -> None:
        self._set_back += self._now - now
        super()._jump(now)

    def set_back(self) -> None:
        self.action.core.reset()

    def problem(self, text: str) -> None:
        self.sink.problem(self._now, text)

    def joints(self, message: Any) -> None:
        answer = self.action.joints(message, self._steady)
        if answer.new:
            self._answer(answer, None, 0.0)
        if self.action.joint_problem:
            self.counts["joints: unusable"] += 1
            return
        stamp = nanoseconds(message.header.stamp)
        reference = self.action.core.executor.reference(stamp * 1e-9)
        assert self.action.last is not None  # the message was usable
        self.sink.measured(self._now, stamp, self.action.last[0], None if reference is None else reference[0])

    def begin(self, job: Job) -> Future:
        assert self._scout is not None
        return self._scout.claim(job)

    def end(self, job: Job, handle: Future, begun: int) -> None:
        output, error, wall = handle.result()
        ticket, stamp = job.ticket, job.pair.first.color.header.stamp
        ns = nanoseconds(stamp)
        published = self.core.finished(ticket, output, error, self.latency * 1e-9, self.seconds)
        self.counts["steps"] += 1
        step = Step(self.counts["steps"], ns, begun, self._now, ticket.instruction, output, error, wall)
        self.sink.step(step, published)
        if error is not None:
            self.problem(f"policy step failed: {error!r}")
        if published:
            contract = self.core.runtime.config.contract
            fields = chunk_fields(contract.actions, ticket.instruction, output.actions)
            self.sink.chunk(self._now, fields, ns)
            started = time.perf_counter()
            answer = self.action.chunk(_Message(stamp, contract.robot.base_frame, fields), self.seconds)
            self._answer(answer, ns, time.perf_counter() - started)

    def watched(self) -> None:
        if self._now - self._status_at > STATUS_PERIOD * 1e9:
            self.status()

    def status(self) -> None:
        fields = status_fields(self.core)
        fields["dropped_frames"] = self.policy.dropped_frames()
        self._status_at = self._now
        self.sink.status(self._now, fields)
        self.action.status(fields["state"], fields["reason"])

    # -- the arm's side ------------------------------------------------------------------------------------------------
    def _gate(self) -> None:
        self._answer(self.action.tick(self.seconds, self._steady), None, 0.0)

    def _answer(self, answer: Answer, chunk_stamp: int | None, wall: float) -> None:
        self._fingers.update(answer.grippers or {})
        if chunk_stamp is not None or answer.arm is not None or answer.grippers or answer.new:
            self.sink.answer(self._now, answer, chunk_stamp, wall)

    def _show(self) -> None:
        reference = self.action.core.executor.reference(self.seconds)
        fingers = np.full(len(self.robot.grippers), np.nan)
        for i, name in enumerate(self.robot.gripper_names):
            if (motion := self._fingers.get(name)) is not None:
                fingers[i] = sample(motion, self.seconds - motion.stamp)[0][0]
        q, qd = (None, None) if reference is None else reference[:2]
        self.sink.commanded(self._now, q, qd, fingers)


class _Message:
    """An ActionChunk message's fields with its header, as action_node gets it."""

    def __init__(self, stamp: Any, frame_id: str, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self.header = _Header(stamp, frame_id)


@dataclass(frozen=True)
class _Header:
    stamp: Any
    frame_id: str

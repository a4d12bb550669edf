"""policy_node in bag time: which observation is computed when, whatever the policy answers.

When a step is taken follows from the recording alone: from stamps, the rate, and a step's fixed duration. So the same
code runs twice. `open_loop.Replay` produces the results; `Scout` runs some steps ahead of `Replay`, so that the policy
already computes the steps to come, in a thread of its own, while the executor works on the present one.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any

from vla_nodes.control.robot import RobotModel
from vla_nodes.messages.camera_pose import CameraPose
from vla_nodes.pipeline.policy_core import PolicyCore
from vla_nodes.pipeline.policy_loop import WATCH_PERIOD, Job, PolicyLoop
from vla_nodes.rosbag.timeline import Event

IDLE = 5 * 10**9
"""ns without any message after which timers need not run on: everything has timed out and stopped."""
AHEAD = 2
"""Steps that are computed before they are asked for."""
MAX_EVENTS, MAX_BYTES = 4000, 256 << 20
"""Most that is read ahead."""


class PolicySide:
    """Time, timers and the policy's rules. Subclasses say what a step's end, a status and a problem mean."""

    def __init__(
        self, runtime: Any, robot: RobotModel, parameters: dict[str, dict[str, Any]], latency: float, instruction: str
    ) -> None:
        """See `open_loop.Replay`."""
        p = parameters["policy_node"]
        self.robot, self.latency = robot, round(latency * 1e9)
        self.core = PolicyCore(runtime, p["rate"] or 1.0 / runtime.config.contract.tick, p["max_image_age"])
        self.policy = PolicyLoop(self.core, robot, p["slop"], p["use_depth"], p["joint_map"])
        self.counts: Counter[str] = Counter()
        contract = runtime.config.contract
        self.eye = contract.cameras[0].name
        self.camera = CameraPose(p["camera_pose_source"], contract.robot.base_frame, p["camera_pose"], self.eye)
        self._instruction = instruction
        self._job: tuple[Job, Any, int] | None = None  # with what begin() returned, and when it began
        self._ends = 0
        self._now = 0  # ns
        self.begun = False
        """Whether a message has come in; there is no time before it."""
        # Timers by priority: [due ns, period ns, what to do]
        self._timers: list[list] = []
        self._watch = (WATCH_PERIOD, self._look)

    # -- for subclasses ----------------------------------------------------------------------------------------------
    def begin(self, job: Job) -> Any:
        """A step begins; what is returned is given to `end`."""
        raise NotImplementedError

    def end(self, job: Job, handle: Any, begun: int) -> None:
        """A step's time is over."""
        raise NotImplementedError

    def started(self) -> None:
        """The first message is about to come in."""

    def set_back(self) -> None:
        """The clock was set back."""

    def joints(self, message: Any) -> None:
        """A joint_states message, after the policy's side has read it."""

    def status(self) -> None:
        """vla/status is due, since something changed."""

    def watched(self) -> None:
        """The watch timer has run."""

    def problem(self, text: str) -> None:
        """Something an operator would have read in policy_node's log."""

    # -- time --------------------------------------------------------------------------------------------------------
    @property
    def seconds(self) -> float:
        """Bag time in s, as the nodes' clock would give it."""
        return self._now * 1e-9

    def feed(self, event: Event) -> None:
        """Everything up to the event's time, then the event."""
        if not self.begun:
            self._now, self.begun = event.now, True
            self._set_timers()
            if self._instruction:
                self._instruct(self._instruction)
            self.core.activate()
            self.started()
            self.status()
        if event.jumped:
            self._jump(event.now)
        self.advance(event.now)
        self._take(event)

    def advance(self, target: int) -> None:
        """Everything that is due up to `target` ns, in order: a step's end first, then the timers by priority."""
        quiet = self._now + IDLE
        while True:
            due = min(timer[0] for timer in self._timers)
            ending = self._job is not None and self._ends <= due
            due = self._ends if ending else due
            if due > target:
                break
            if due > quiet and not ending:
                self._now = target
                self._set_timers()
                continue
            self._now = max(self._now, due)
            if ending:
                self._finish()
                continue
            timer = next(timer for timer in self._timers if timer[0] == due)
            timer[0] += timer[1]
            timer[2]()
        self._now = max(self._now, target)

    def drain(self) -> None:
        """The recording is over: a step under way still ends."""
        if self._job is not None:
            self.advance(max(self._now, self._ends))

    def _set_timers(self) -> None:
        self._timers = [[self._now + round(p * 1e9), round(p * 1e9), call] for p, call in self.timers()]

    def timers(self) -> list[tuple[float, Callable[[], None]]]:
        """(period in s, what to do), by priority."""
        return [self._watch]

    def _jump(self, now: int) -> None:
        """The clock was set back: as the nodes do then."""
        self.counts["clock set back"] += 1
        self.problem(f"the clock was set back by {(self._now - now) * 1e-9:.3f} s")
        self._now = now
        self._ends = min(self._ends, now + self.latency)
        self._set_timers()
        self.policy.clear()
        self.camera.clear()
        self.core.reset()
        self.core.waiting("the clock was set back: waiting for an observation")
        self.set_back()

    # -- messages ----------------------------------------------------------------------------------------------------
    def _take(self, event: Event) -> None:
        name, message = event.name, event.message
        if name in ("color", "depth", "info"):
            getattr(self.policy, name)(message)
            self._try()
        elif name == "joints":
            if problem := self.policy.joints(message):
                self.problem(problem)
            self.joints(message)
            if not self.policy.joint_problem:
                self._try()
        elif name == "instruction" and not self._instruction:
            self._instruct(message.data)
        elif name == "active_instruction" and not self._instruction:
            # What was in force when the recording began, as action_node tells a policy_node that comes back.
            if message.data and not self.core.instruction and not self.core.refused:
                self._instruct(message.data)
        elif name == "camera_pose" and self.camera.source == "topic":
            if problem := self.camera.pose(message):
                self.problem(problem)
        elif name in ("tf", "tf_static"):
            self.camera.transforms(message, name == "tf_static")

    def _instruct(self, text: str) -> None:
        if refused := self.core.instruct(text):
            self.problem(f"instruction refused, the arm holds: {refused}")
        self.status()

    # -- steps -------------------------------------------------------------------------------------------------------
    def _try(self) -> None:
        if self._job is not None:
            return
        job = self.policy.next(self.seconds, {self.eye: self.camera.at})
        if job is None:
            return
        self.core.started(job.ticket)
        self.counts["started"] += 1
        self._job = (job, self.begin(job), self._now)
        self._ends = self._now + self.latency
        if not self.latency:
            self._finish()

    def _finish(self) -> None:
        assert self._job is not None
        job, handle, begun = self._job
        self._job = None
        self.end(job, handle, begun)
        self.status()

    def _look(self) -> None:
        """The watch timer."""
        if self.core.instruction and self._job is None:
            self._try()
            if self._job is None:
                self.policy.watch(self.seconds, self.camera.problem)
        self.watched()

    def lacking(self) -> str:
        """Why no step was taken, for the report."""
        unable = self.policy.joint_problem or self.camera.problem or self.core.refused
        return unable or self.policy.sync.why_not() or self.core.reason


Result = tuple[Any, Exception | None, float]
"""What a step gave, or how it failed, and its wall time in s."""


class Scout(PolicySide):
    """Finds the steps to come and has them computed, in order, one at a time."""

    NOTHING = SimpleNamespace(actions=None, hold_reason="computed ahead")

    def __init__(self, worker: Executor, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.found: deque[tuple[Job, Future]] = deque()
        self._worker = worker

    def begin(self, job: Job) -> None:
        self.found.append((job, self._worker.submit(self._compute, job)))

    def end(self, job: Job, handle: None, begun: int) -> None:
        self.core.finished(job.ticket, self.NOTHING, None, 0.0, self.seconds)  # what was computed decides nothing here

    def _compute(self, job: Job) -> Result:
        started = time.perf_counter()
        try:
            return self.policy.compute(job), None, time.perf_counter() - started
        except Exception as error:  # a step that fails is a result: the live node holds and says why
            return None, error, time.perf_counter() - started

    def claim(self, job: Job) -> Future:
        """The result of a step that has been found before."""
        found, future = self.found.popleft()
        if found.ticket != job.ticket:
            raise AssertionError(f"a step on {job.ticket} was foreseen on {found.ticket}")
        return future

    def lead(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events, each a little after this has seen it. An error of `events` is raised after what came before."""
        waiting: deque[Event] = deque()
        size, failure = 0, None
        iterator = iter(events)
        while True:
            try:
                event = next(iterator)
            except StopIteration:
                break
            except ValueError as error:  # a BagError: the recording ends in damage
                failure = error
                break
            self.feed(event)
            waiting.append(event)
            size += len(event.data)
            while waiting and (len(self.found) > AHEAD or len(waiting) > MAX_EVENTS or size > MAX_BYTES):
                event = waiting.popleft()
                size -= len(event.data)
                yield event
        if self.begun:
            self.drain()
        yield from waiting
        if failure is not None:
            raise failure

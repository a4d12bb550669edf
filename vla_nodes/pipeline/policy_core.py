"""policy_node without ROS: which instruction is in force, when to compute, and what the operator is told.

Two threads meet here. The node's thread takes instructions, offers observations and reads the status; one worker thread
computes, one observation at a time, so nothing ever queues: what arrives meanwhile is simply superseded. The
policy's carried state is touched by the worker only.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or the exception's name where it has no text."""
    return (str(error).splitlines() or [""])[0] or repr(error)


class State(IntEnum):
    """The states of PolicyStatus.msg."""

    INACTIVE = 0
    WAITING_INSTRUCTION = 1
    WAITING_OBSERVATION = 2
    HOLDING = 3
    RUNNING = 4
    DONE = 5


@dataclass(frozen=True)
class Result:
    """One finished step: the job it was for, what came out, and how long it took from hand-over on."""

    job: Any
    output: Any | None
    error: Exception | None
    seconds: float


class Worker:
    """One thread that computes one job at a time. `offer` never waits and never queues."""

    def __init__(self, compute: Callable[[Any], Any], done: Callable[[Result], None]) -> None:
        """compute(job) runs in the worker; done(result) too, right after it."""
        self._compute, self._done = compute, done
        self._job: Any = None
        self._busy = False
        self._stopped = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        with self._condition:
            return self._busy

    def offer(self, job: Any) -> bool:
        """Hand over a job; False (and nothing happens) while one is being computed."""
        with self._condition:
            if self._busy or self._stopped:
                return False
            self._job, self._busy = job, True
            self._condition.notify_all()
            return True

    def stop(self, timeout: float = 10.0) -> bool:
        """End the thread after its present job; False if that takes longer than `timeout` s."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._busy and not self._stopped:
                    self._condition.wait()
                if not self._busy:
                    return
                job = self._job
            begin = time.perf_counter()
            output = error = None
            try:
                output = self._compute(job)
            except Exception as caught:  # the error is reported to the operator; it must not end the thread
                error = caught
            try:
                self._done(Result(job, output, error, time.perf_counter() - begin))
            finally:
                with self._condition:
                    self._job, self._busy = None, False


@dataclass(frozen=True)
class Ticket:
    """What a step is computed for. A result whose epoch has passed is dropped."""

    epoch: int
    instruction: str
    stamp: float


class PolicyCore:
    """Instruction, timing and status of a running policy. All methods are for the node's thread, but `prepare`."""

    def __init__(self, runtime: Any, rate: float, max_image_age: float, window: int = 200) -> None:
        """
        Args:
            runtime: a `policy.runtime.PolicyRuntime`.
            rate: Hz of observation time at which steps are taken.
            max_image_age: s, an older observation is not acted upon.
        """
        self.runtime = runtime
        self.period = 1.0 / rate
        self.max_image_age = max_image_age
        self.instruction = ""
        self.refused = ""
        self.epoch = 0
        self.ticks = 0
        self.discarded = 0
        self._latencies: deque[float] = deque(maxlen=window)
        self._ages: deque[float] = deque(maxlen=window)
        self._last_stamp = -np.inf
        self._state, self._reason = State.INACTIVE, "policy_node is not active"
        self.output: Any = None
        self.output_stamp: float | None = None
        self._prepared: tuple[int, str] | None = None

    # -- instruction and state ---------------------------------------------------------------------
    def instruct(self, text: str) -> str:
        """Put an instruction in force; returns "" or why it was refused. A refused one also withdraws the
        instruction in force: an operator who is not understood expects the arm to hold."""
        self.refused = self.runtime.check_instruction(text)
        self.instruction = "" if self.refused else text
        self.reset()
        if self.refused:
            self._set(State.WAITING_INSTRUCTION, f"instruction refused: {self.refused}")
        else:
            self._set(State.WAITING_OBSERVATION, "waiting for an observation")
        return self.refused

    def withdraw(self, why: str) -> None:
        """No instruction is in force any more; the status says why, unless the node is not active."""
        self.instruction = self.refused = ""
        self.reset()
        if self._state != State.INACTIVE:
            self._set(State.WAITING_INSTRUCTION, why)

    def reset(self) -> None:
        """Start anew (activation, clock set back): the carried state is reset and results under way are dropped."""
        self.epoch += 1
        self._last_stamp = -np.inf
        self.output = self.output_stamp = None

    def activate(self) -> None:
        self.reset()
        self.ticks = 0
        self._latencies.clear()
        self._ages.clear()
        if self.instruction:
            self._set(State.WAITING_OBSERVATION, "waiting for an observation")
        else:
            reason = (
                f"instruction refused: {self.refused}"
                if self.refused
                else "no instruction: publish one on 'instruction'"
            )
            self._set(State.WAITING_INSTRUCTION, reason)

    def deactivate(self) -> None:
        self.reset()
        self._set(State.INACTIVE, "policy_node is not active")

    # -- steps -------------------------------------------------------------------------------------
    def due(self, stamp: float) -> bool:
        """Whether the observation of `stamp` is to be computed: it may be a tenth of a period early."""
        return bool(self.instruction) and stamp >= self._last_stamp + 0.9 * self.period

    def ticket(self, stamp: float, now: float) -> Ticket | None:
        """Leave to compute on the observation of `stamp`, or None, with the status saying why not."""
        if not self.instruction or self._state == State.INACTIVE:
            return None
        age = now - stamp
        if age > self.max_image_age:
            self.waiting(f"the newest observation is {age:.2f} s old, more than max_image_age {self.max_image_age} s")
            return None
        return Ticket(self.epoch, self.instruction, stamp)

    def started(self, ticket: Ticket) -> None:
        self._last_stamp = ticket.stamp

    def prepare(self, ticket: Ticket) -> None:
        """Worker thread, before a step: the ticket's instruction to the runtime, or a reset, where either changed."""
        if self._prepared is None or self._prepared[1] != ticket.instruction:
            self.runtime.set_instruction(ticket.instruction)
        elif self._prepared[0] != ticket.epoch:
            self.runtime.reset()
        self._prepared = (ticket.epoch, ticket.instruction)

    def finished(self, ticket: Ticket, output: Any, error: Exception | None, seconds: float, now: float) -> bool:
        """Take the result of a step; True if its chunk is to be published."""
        if ticket.epoch != self.epoch:
            self.discarded += 1
            return False
        if error is not None:
            self._set(State.HOLDING, f"the policy step failed: {first_line(error)}")
            return False
        self.ticks += 1
        self._latencies.append(1e3 * seconds)
        self._ages.append(now - ticket.stamp)
        self.output, self.output_stamp = output, ticket.stamp
        if output.actions is None:
            self._set(State.HOLDING, output.hold_reason or "the policy holds")
            return False
        if not np.isfinite(output.actions).all():
            self._set(State.HOLDING, "the policy gave actions that are not finite: the chunk was not published")
            return False
        self._set(State.RUNNING, "")
        return True

    def waiting(self, why: str) -> None:
        """No usable observation: say so, unless there is nothing to do anyway."""
        if self.instruction and self._state != State.INACTIVE:
            self._set(State.WAITING_OBSERVATION, why)

    # -- for the operator --------------------------------------------------------------------------
    @property
    def state(self) -> State:
        return self._state

    @property
    def reason(self) -> str:
        return self._reason

    def latencies(self) -> tuple[float, float, float]:
        """Last, median and 99th percentile of a step's wall time in ms; NaN before the first."""
        if not self._latencies:
            return (float("nan"),) * 3
        p50, p99 = np.percentile(self._latencies, [50, 99])
        return self._latencies[-1], float(p50), float(p99)

    def age(self) -> float:
        """Age of the observation when its result was there, s; NaN before the first."""
        return self._ages[-1] if self._ages else float("nan")

    def _set(self, state: State, reason: str) -> None:
        self._state, self._reason = state, reason

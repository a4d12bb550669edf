"""The nodes' ROS-free cores: noticing silence, one step at a time, the instruction's rules, one stop per reason."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import robots
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.safety import SafetySettings
from vla_nodes.control.settings import ExecutorSettings
from vla_nodes.control.trajectory import refusal, sample
from vla_nodes.nodes.liveness import Rate, Watch
from vla_nodes.pipeline.action_core import ActionCore
from vla_nodes.pipeline.policy_core import PolicyCore, State, Worker

READY = np.array([0.0, -0.40, 0.0, -2.30, 0.0, 1.90, 0.785])


# -- silence ----------------------------------------------------------------------------------------------------
def test_silence_is_said_once_and_return_once():
    watch = Watch(timeout=0.7)
    watch.expect("camera")
    said = []
    for k in range(60):
        now = 0.1 * k
        if now < 2.0 or now > 4.0:
            watch.heard("camera", now)
        said += [(round(now, 1), change.lost) for change in watch.check(now)]
    assert [lost for _, lost in said] == [True, False]
    assert 2.6 <= said[0][0] <= 2.8
    assert watch.lost() == []


def test_never_heard_is_awaited_not_lost():
    watch = Watch()
    watch.expect("camera")
    for k in range(50):
        assert watch.check(0.1 * k) == []
    assert watch.awaited() == ["camera"]


def test_a_process_that_was_held_up_accuses_nobody():
    watch = Watch(timeout=0.7, late=0.35)
    watch.heard("camera", 0.0)
    watch.check(0.05)
    assert watch.check(3.0) == []  # we slept, not the camera
    watch.heard("camera", 3.01)
    assert watch.check(3.1) == []


def test_a_slow_source_is_given_its_own_time_and_no_more():
    watch = Watch(timeout=0.7)
    said = []
    for k in range(400):
        now = 0.1 * k
        if now < 20.0 and k % 5 == 0:  # every half second, where others come every few milliseconds
            watch.heard("camera", now)
        said += [now for change in watch.check(now) if change.lost]
    assert len(said) == 1 and 20.5 < said[0] < 21.3


def test_rate_falls_when_nothing_comes():
    rate = Rate()
    for k in range(100):
        rate.tick(0.05 * k)
    assert rate.hz(5.0) == pytest.approx(20, rel=0.05)
    assert rate.hz(10.0) < 10


# -- one step at a time -------------------------------------------------------------------------------------------
def test_worker_computes_one_job_and_never_queues():
    gate, results = threading.Event(), []
    worker = Worker(lambda job: gate.wait(10) and job, results.append)
    assert worker.offer(1)
    assert not worker.offer(2) and not worker.offer(3)
    gate.set()
    while worker.busy:
        time.sleep(0.001)
    assert worker.offer(4)
    assert worker.stop()
    assert [result.output for result in results] == [1, 4]
    assert not worker.offer(5)


def test_worker_survives_a_step_that_fails():
    results = []
    worker = Worker(lambda job: 1 / job, results.append)
    for job in (0, 2):
        assert worker.offer(job)
        while worker.busy:
            time.sleep(0.001)
    worker.stop()
    assert isinstance(results[0].error, ZeroDivisionError)
    assert results[1].output == 0.5


class FakeRuntime:
    """Records what the worker does to the policy's state."""

    def __init__(self):
        self.calls = []

    def check_instruction(self, text):
        return "" if 0 < len(text.strip()) <= 256 else "the instruction is empty or too long"

    def set_instruction(self, text):
        self.calls.append(text)

    def reset(self):
        self.calls.append("reset")


def output(actions=None, reason=""):
    return SimpleNamespace(actions=actions, hold_reason=reason, grounding=0.9, primitive="reach", target=np.zeros(3))


def active_core(**kwargs):
    core = PolicyCore(FakeRuntime(), rate=10.0, max_image_age=0.5, **kwargs)
    core.activate()
    return core


def run_step(core, stamp, now, result):
    ticket = core.ticket(stamp, now)
    assert ticket is not None
    core.started(ticket)
    core.prepare(ticket)
    return core.finished(ticket, result, None, 0.02, now + 0.02)


def test_states_of_a_normal_run():
    core = active_core()
    assert core.state == State.WAITING_INSTRUCTION and "no instruction" in core.reason
    assert not core.due(1.0)
    assert core.instruct("pick up the red block") == ""
    assert core.state == State.WAITING_OBSERVATION
    assert run_step(core, 1.0, 1.02, output(np.zeros((16, 7))))
    assert core.state == State.RUNNING and core.reason == ""
    assert not run_step(core, 1.1, 1.12, output(None, "not in view"))
    assert core.state == State.HOLDING and core.reason == "not in view"
    core.deactivate()
    assert core.state == State.INACTIVE
    assert core.ticket(1.2, 1.2) is None


@pytest.mark.parametrize("text", ["", "   ", "x" * 10_000])
def test_a_refused_instruction_withdraws_the_one_before(text):
    core = active_core()
    core.instruct("pick up the red block")
    run_step(core, 1.0, 1.0, output(np.zeros((16, 7))))
    assert core.instruct(text)
    assert core.instruction == "" and core.state == State.WAITING_INSTRUCTION
    assert "refused" in core.reason
    assert core.ticket(1.2, 1.2) is None and not core.due(1.2)


def test_stale_observation_is_not_acted_upon():
    core = active_core()
    core.instruct("pick up the red block")
    assert core.ticket(1.0, 1.6) is None
    assert core.state == State.WAITING_OBSERVATION and "0.60 s old" in core.reason


def test_a_result_for_another_instruction_is_dropped():
    core = active_core()
    core.instruct("pick up the red block")
    ticket = core.ticket(1.0, 1.0)
    core.instruct("pick up the blue block")
    assert not core.finished(ticket, output(np.zeros((16, 7))), None, 0.02, 1.1)
    assert core.discarded == 1 and core.state == State.WAITING_OBSERVATION


def test_the_state_is_reset_on_instruction_activation_and_clock_jump_only():
    core = active_core()
    core.instruct("a")
    for stamp in (1.0, 1.1, 1.2):
        run_step(core, stamp, stamp, output(np.zeros((16, 7))))
    assert core.runtime.calls == ["a"]
    core.reset()  # clock jump
    run_step(core, 0.1, 0.1, output(np.zeros((16, 7))))
    assert core.runtime.calls == ["a", "reset"]
    core.instruct("a")  # the same words again start anew
    run_step(core, 0.2, 0.2, output(np.zeros((16, 7))))
    assert core.runtime.calls == ["a", "reset", "reset"]
    core.deactivate()
    core.activate()
    core.instruct("b")
    run_step(core, 0.3, 0.3, output(np.zeros((16, 7))))
    assert core.runtime.calls == ["a", "reset", "reset", "b"]


def test_not_finite_actions_and_failures_hold():
    core = active_core()
    core.instruct("a")
    assert not run_step(core, 1.0, 1.0, output(np.full((16, 7), np.nan)))
    assert core.state == State.HOLDING and "not finite" in core.reason
    ticket = core.ticket(1.1, 1.1)
    assert not core.finished(ticket, None, ValueError("camera_info has no focal length"), 0.0, 1.2)
    assert core.state == State.HOLDING and "focal length" in core.reason


@settings(deadline=None, max_examples=50)
@given(st.floats(5, 60), st.floats(2, 20))
def test_rate_is_kept_whatever_the_camera(camera, rate):
    """Steps never exceed the rate by more than a tenth, and every frame is used where the camera is slower."""
    core = PolicyCore(FakeRuntime(), rate=rate, max_image_age=0.5)
    core.activate()
    core.instruct("a")
    steps, frames = 0, int(10 * camera)
    for k in range(frames):
        stamp = k / camera
        if core.due(stamp):
            core.started(core.ticket(stamp, stamp))
            steps += 1
    assert steps <= 10 * rate * 1.12 + 1
    assert steps >= min(frames, 10 * rate * 0.5 - 1)


# -- one stop per reason --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def robot():
    return robots.panda()


class Arm:
    """Drives the core as the node does, with a robot that follows perfectly; checks every trajectory published."""

    def __init__(self, robot, **safety):
        self.core = ActionCore(robot, ExecutorSettings(), SafetySettings(**{**robots.workspace(), **safety}))
        self.now, self.q, self.qd = 10.0, READY.copy(), np.zeros(7)
        self.plan, self.published, self.said = None, 0, []

    def take(self, answer):
        if answer.arm is not None:
            assert refusal(answer.arm, self.core.robot.joint_names, self.now) is None
            self.plan = answer.arm
            self.published += 1
        if answer.new:
            self.said.append(answer.cause)
        return answer

    def run(self, seconds, chunks=False, idle="", joints=True, dy=0.003):
        for k in range(round(seconds / 0.02)):
            self.now += 0.02
            if self.plan is not None:
                self.q, self.qd, _ = sample(self.plan, self.now - self.plan.stamp)
            if joints:
                self.take(self.core.joints(self.now, self.q, self.qd, 0.04, self.now))
            if chunks and k % 5 == 0:
                rows = np.tile([0, dy, 0, 0, 0, 0, 1.0], (16, 1))
                chunk = ActionChunk(self.now - 0.04, "a", 0.05, ActionSpace.EE_DELTA, rows, robots.GRIPPER)
                self.take(self.core.chunk(chunk, self.now))
            self.take(self.core.tick(self.now, self.now, idle))

    @property
    def speed(self):
        return float(np.abs(self.qd).max())


def test_chunks_move_the_arm_and_an_idle_policy_stops_it_once(robot):
    arm = Arm(robot)
    arm.run(0.2)
    arm.run(1.0, chunks=True)
    assert arm.speed > 0.02
    before = arm.published
    arm.run(1.0, idle="the policy holds: not in view")
    assert arm.speed == pytest.approx(0, abs=1e-6)
    assert arm.published == before + 1
    assert arm.said == ["policy"]
    arm.run(1.0, chunks=True)
    assert arm.speed > 0.02


def test_silent_joint_states_stop_the_arm(robot):
    arm = Arm(robot)
    arm.run(0.2)
    arm.run(1.0, chunks=True)
    arm.run(1.5, joints=False)
    assert arm.speed == pytest.approx(0, abs=1e-6)
    assert arm.core.holding == "stale_joint_states"
    arm.run(0.5, chunks=True)
    assert arm.core.holding == ""


def test_stop_holds_until_resume(robot):
    arm = Arm(robot)
    arm.run(0.2)
    arm.run(1.0, chunks=True)
    arm.core.gate.stop()
    arm.run(1.5, chunks=True)
    assert arm.speed == pytest.approx(0, abs=1e-6) and arm.core.holding == "stop"
    assert arm.core.gate.resume() is None
    arm.run(1.0, chunks=True)
    assert arm.speed > 0.02


def test_estop_refuses_resume_while_asserted(robot):
    arm = Arm(robot)
    arm.run(0.2)
    arm.core.gate.estop(True)
    arm.run(0.2)
    assert "asserted" in arm.core.gate.resume()
    arm.core.gate.estop(False)
    assert arm.core.gate.resume() is None


def test_bad_chunks_are_counted_and_said_once(robot):
    arm = Arm(robot)
    arm.run(0.2)
    bad = ActionChunk(arm.now, "a", 0.05, ActionSpace.EE_DELTA, np.full((16, 7), np.nan), robots.GRIPPER)
    for _ in range(5):
        assert arm.take(arm.core.chunk(bad, arm.now)).arm is None
    assert arm.said == ["not_finite"]
    assert arm.core.gate.counts["not_finite"] == 5


def test_a_blocked_arm_is_let_go(robot):
    """The reference strays from an arm that does not move: it comes back to the arm, said and published once, and the
    arm is held until resume."""
    arm = Arm(robot, chunk_timeout=0.0)
    arm.run(0.2)
    rows = np.column_stack([np.tile(READY, (16, 1)), np.ones(16)])
    rows[:, 0] = 0.05 * np.arange(1, 17)
    arm.take(arm.core.chunk(ActionChunk(arm.now, "a", 0.05, ActionSpace.JOINT_POSITION, rows, robots.GRIPPER), arm.now))
    strayed = 0.0
    for _ in range(150):
        arm.now += 0.02
        arm.take(arm.core.joints(arm.now, READY, np.zeros(7), 0.04, arm.now))
        arm.take(arm.core.tick(arm.now, arm.now))
        strayed = max(strayed, float(np.abs(arm.core.executor.reference(arm.now)[0] - READY).max()))
    assert strayed > 0.25
    assert arm.said == ["tracking"]
    assert arm.published == 2
    assert np.abs(arm.core.executor.reference(arm.now)[0] - READY).max() < 1e-3
    assert arm.core.holding == "tracking" and "panda_joint1" in arm.core.reason
    arm.run(0.3, chunks=True)
    assert arm.published == 2  # still held
    assert arm.core.gate.resume() is None
    arm.run(0.3, chunks=True)
    assert arm.published > 2


def test_a_controller_that_gives_up_because_the_arm_is_astray_is_not_asked_again_before_resume(robot):
    arm = Arm(robot)
    arm.run(0.2)
    arm.run(1.0, chunks=True)
    arm.take(arm.core.lost("no action server"))
    before = arm.published
    arm.run(0.3, chunks=True)
    assert arm.published > before  # that one is tried again
    arm.take(arm.core.lost("path tolerance violated (panda_joint1)", astray=True))
    before = arm.published
    arm.run(0.5, chunks=True)
    assert arm.published == before and arm.core.holding == "controller" and "panda_joint1" in arm.core.reason
    assert arm.core.gate.resume() is None
    arm.run(0.3, chunks=True)
    assert arm.published > before

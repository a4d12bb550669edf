"""Every cause of the safety gate, its count, and how it clears."""

from dataclasses import replace

import numpy as np
import pytest
import robots

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.safety import CAUSES, Action, SafetyGate, SafetySettings

NOW = 100.0


@pytest.fixture(scope="module")
def robot():
    return robots.panda()


@pytest.fixture
def gate(robot):
    return SafetyGate(robot, SafetySettings(**robots.workspace()))


def delta(rows=16, step=(0.005, 0.0, 0.0), **changes):
    actions = np.zeros((rows, 7))
    actions[:, :3] = step
    return replace(ActionChunk(NOW - 0.1, "x", 0.1, ActionSpace.EE_DELTA, actions, robots.GRIPPER), **changes)


def joints(robot, first, **changes):
    actions = np.zeros((4, 8))
    actions[:, :7] = robot.rest
    actions[0, 0] = first
    return replace(ActionChunk(NOW - 0.1, "x", 0.1, ActionSpace.JOINT_POSITION, actions, robots.GRIPPER), **changes)


def with_value(chunk, value):
    actions = chunk.actions.copy()
    actions[1, 1] = value
    return replace(chunk, actions=actions)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda r: delta(), ""),
        (lambda r: joints(r, 0.1), ""),
        (lambda r: with_value(delta(), np.nan), "not_finite"),
        (lambda r: with_value(delta(), -np.inf), "not_finite"),
        (lambda r: delta(actions=np.zeros((16, 6))), "malformed"),
        (lambda r: delta(actions=np.zeros(16)), "malformed"),
        (lambda r: joints(r, 0.0, actions=np.zeros((4, 7))), "malformed"),
        (lambda r: delta(period=-0.1), "malformed"),
        (lambda r: delta(action_space=ActionSpace.EE_POSE, actions=np.zeros((4, 8))), "malformed"),
        (lambda r: delta(stamp=NOW - 1.2), "too_old"),
        (lambda r: delta(stamp=NOW + 0.5), "future"),
        (lambda r: delta(step=(0.3, 0, 0)), "impossible_step"),
        (lambda r: joints(r, 0.5), "impossible_step"),
        (lambda r: delta(step=(0.19, 0, 0.0)), "workspace"),
        (lambda r: delta(rows=8, step=(0.0, 0.0, -0.19)), "truncated"),
    ],
)
def test_chunk_causes(robot, gate, make, cause):
    if cause == "workspace":
        gate = SafetyGate(robot, SafetySettings(outside="refuse", **robots.workspace()))
    verdict = gate.check(make(robot), NOW, robot.rest)
    assert verdict.cause == cause
    assert (verdict.chunk is None) == (cause not in ("", "truncated"))
    if cause:
        assert cause in CAUSES and verdict.reason and verdict.new and gate.counts == {cause: 1}
        again = gate.check(make(robot), NOW, robot.rest)
        assert not again.new and gate.counts == {cause: 2}  # counted every time, logged once
        assert gate.check(delta(), NOW, robot.rest).cause == ""
        assert gate.check(make(robot), NOW, robot.rest).new  # logged again after it had cleared


def test_rows_beyond_the_box_are_cut_and_below_the_table_refused(robot, gate):
    height = robot.forward(robot.rest)[2, 3]
    chunk = delta(rows=16, step=(0.0, 0.0, -0.06))
    kept = gate.check(chunk, NOW, robot.rest).chunk
    assert len(kept.actions) == int(height / 0.06)
    low = SafetyGate(robot, SafetySettings(table=height - 0.05, workspace_low=(0.15, -0.6, -1.0)))
    assert low.check(chunk, NOW, robot.rest).cause == "under_table"


def test_an_arm_outside_may_come_back_in_but_not_go_out(robot):
    gate = SafetyGate(
        robot, SafetySettings(**{**robots.workspace(), "workspace_low": (0.4, -0.6, 0.0)})
    )  # rest is at x 0.307
    assert gate.check(delta(step=(0.01, 0, 0)), NOW, robot.rest).cause == ""
    assert gate.check(delta(step=(-0.01, 0, 0)), NOW, robot.rest).cause == "workspace"


def test_no_joint_state(robot, gate):
    assert gate.check(delta(), NOW, None).cause == "no_joint_state"
    verdict = gate.tick(NOW, 1.0, None, False)
    assert verdict.action is Action.HOLD and verdict.cause == "no_joint_state"


def test_joint_states_stale_or_bad(robot, gate):
    gate.observe(robot.rest, 1.0)
    assert gate.tick(NOW, 1.1, robot.rest, True).action is Action.GO
    verdict = gate.tick(NOW + 0.3, 1.4, robot.rest, True)
    assert (verdict.action, verdict.cause, verdict.new) == (Action.HOLD, "stale_joint_states", True)
    assert not gate.tick(NOW + 0.35, 1.45, robot.rest, True).new and gate.counts["stale_joint_states"] == 1
    assert gate.observe(np.zeros(6), 1.5).cause == "bad_joint_states"
    assert gate.observe(np.full(7, np.nan), 1.5).cause == "bad_joint_states"
    gate.observe(robot.rest, 1.5)
    assert gate.tick(NOW + 0.4, 1.5, robot.rest, True).action is Action.GO


@pytest.mark.parametrize("stopped", [False, True])
def test_blocked_arm(robot, gate, stopped):
    reference = robot.rest + [0.3, 0, 0, 0, 0, 0, 0]
    actions = []
    if stopped:
        gate.stop()  # who presses stop because the arm presses wants it let go, too
    for k in range(40):
        steady = 1.0 + 0.02 * k
        gate.observe(robot.rest, steady)
        verdict = gate.tick(NOW + 0.02 * k, steady, reference if k >= 10 else robot.rest, True)
        actions.append(verdict.action)
    first = actions.index(Action.RELEASE)
    assert first in (15, 16)  # 0.1 s of error, not one sample; rounding decides
    assert set(actions[:first]) == {Action.HOLD if stopped else Action.GO}
    assert set(actions[first + 1 :]) == {Action.HOLD}
    assert verdict.cause == gate.holding == "tracking"
    assert "panda_joint1 is 0.300 rad from its reference, 0.15 rad is allowed" in verdict.reason
    assert "panda_joint1" in gate.resume()  # not while it persists
    assert gate.tick(NOW + 0.8, 1.8, robot.rest + 0.05, True).action is Action.HOLD  # nor by itself
    gate.reset()
    assert gate.holding == "tracking"
    gate.observe(robot.rest, 1.82)
    gate.tick(NOW + 0.82, 1.82, robot.rest, True)
    assert gate.resume() is None
    assert gate.tick(NOW + 0.84, 1.84, robot.rest, True).action is Action.GO
    assert gate.counts["tracking"] == 1


def test_after_an_emergency_stop_nothing_moves_not_even_to_let_go(robot, gate):
    gate.estop(True)
    for k in range(20):
        gate.observe(robot.rest, 1.0 + 0.02 * k)
        assert gate.tick(NOW + 0.02 * k, 1.0 + 0.02 * k, robot.rest + 0.3, False).cause == "estop"
    gate.estop(False)
    assert "rad from its reference" in gate.resume()


def test_emergency_stop_sources_do_not_clear_each_other(robot, gate):
    """Two topics, and two readers of each: one says so for as long as any of them does."""
    gate.observe(robot.rest, 1.0)
    for reader in ("reliable", "best effort"):
        gate.estop(True, "estop", reader)
    gate.estop(True, "cell/estop", "best effort")
    gate.estop(True, "cell/estop", "best effort")  # heard again: the same
    assert gate.estops == ["cell/estop", "estop"] and gate.holding == "estop"
    gate.estop(False, "estop", "reliable")
    gate.estop(False, "cell/estop", "reliable")
    assert "cell/estop, estop" in gate.resume()
    gate.estop(False, "estop", "best effort")
    assert gate.estops == ["cell/estop"] and "publish false on cell/estop" in gate.resume()
    assert gate.tick(NOW, 1.0, None, False).cause == "estop"
    gate.estop(False, "cell/estop", "best effort")
    assert gate.tick(NOW + 0.02, 1.0, None, False).cause == "estop" and gate.resume() is None
    assert gate.tick(NOW + 0.04, 1.0, None, False).action is Action.GO and gate.counts["estop"] == 1


@pytest.mark.parametrize(("jump", "steady", "caught"), [(-0.5, 0.05, True), (5.0, 0.05, True), (5.0, 5.0, False)])
def test_clock_jump(robot, jump, steady, caught):
    gate = SafetyGate(robot, SafetySettings(joint_timeout=0.0))
    gate.observe(robot.rest, 1.0)
    gate.tick(NOW, 1.0, None, False)
    verdict = gate.tick(NOW + jump, 1.0 + steady, None, False)
    assert (verdict.cause == "clock_jump") == caught
    if caught:
        gate.observe(robot.rest, 2.0)
        assert gate.tick(NOW + jump + 0.1, 2.0, None, False).action is Action.GO


def test_stop_estop_and_resume(robot, gate):
    gate.observe(robot.rest, 1.0)
    gate.stop()
    assert gate.tick(NOW, 1.0, None, False).cause == "stop"
    assert gate.resume() is None
    assert gate.tick(NOW, 1.0, None, False).action is Action.GO
    gate.estop(True)
    assert gate.tick(NOW, 1.0, None, False).cause == "estop"
    assert "still asserted" in gate.resume()
    gate.estop(False)
    assert gate.tick(NOW, 1.0, None, False).cause == "estop"  # latched until resume
    gate.reset()
    gate.observe(robot.rest, 1.0)
    assert gate.tick(NOW, 1.0, None, False).cause == "estop"  # a reset does not release it
    assert gate.resume() is None
    assert gate.tick(NOW, 1.0, None, False).action is Action.GO
    assert gate.counts["estop"] == 1 and gate.counts["stop"] == 1


def test_deadman_and_silent_policy(robot):
    gate = SafetyGate(robot, SafetySettings(deadman_timeout=0.2, joint_timeout=0.0))
    gate.observe(robot.rest, 1.0)
    assert gate.tick(NOW, 1.0, None, False).cause == "deadman"
    gate.deadman(1.1)
    assert gate.tick(NOW, 1.2, None, False).action is Action.GO
    gate.used(NOW)
    gate.deadman(2.4)
    assert gate.tick(NOW + 0.9, 2.4, robot.rest, True).action is Action.GO
    assert gate.tick(NOW + 1.1, 2.5, robot.rest, True).cause == "silent_policy"
    assert gate.tick(NOW + 1.2, 2.5, robot.rest, False).action is Action.GO  # at rest silence is no danger


@pytest.mark.parametrize(
    "change",
    [{"outside": "ignore"}, {"max_age": 0.0}, {"workspace_low": (1.0, 0.0, 0.0), "workspace_high": (0.9, 1.0, 1.0)}],
)
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SafetySettings(**change)

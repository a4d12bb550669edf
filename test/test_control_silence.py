"""Camera, policy or joint states fall silent while the arm moves: it comes to rest, in time, near its planned path."""

import numpy as np
import pytest
import robots

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.joint_trajectory_controller import JointTrajectoryController
from vla_nodes.control.limits import Limits, bounds, excess
from vla_nodes.control.safety import SafetySettings
from vla_nodes.control.settings import ExecutorSettings
from vla_nodes.control.trajectory import sample
from vla_nodes.pipeline.action_core import ActionCore

T0, STEP, TICK = 1000.0, 0.01, 0.02
SILENT = 1.2  # s into the run


@pytest.fixture(scope="module")
def robot():
    return robots.panda()


def chunk(robot, stamp, speed):
    """The tool goes sideways and up at `speed` m/s."""
    t = stamp - T0 + 0.1 * np.arange(16)
    step = 0.1 * speed * np.stack([0.3 * np.sin(t), np.cos(0.8 * t), 0.5 * np.cos(t)], axis=1)
    return ActionChunk(
        stamp, "x", 0.1, ActionSpace.EE_DELTA, np.hstack([step, np.zeros((16, 3)), np.ones((16, 1))]), robots.GRIPPER
    )


def run(robot, silence, speed=0.25):
    """Chunks at 10 Hz, 80 ms late, until `silence` at SILENT s: times, joints (T, 7), the plan at the silence
    (where chunks go on in it, the last that was carried out), core."""
    core = ActionCore(robot, ExecutorSettings(), SafetySettings(**robots.workspace()))
    controller = JointTrajectoryController(robot.joint_names)
    q, qd = robot.rest.copy(), np.zeros(7)
    controller.hold(q)
    times, track, plan, coming = T0 + STEP * np.arange(500), [], None, []

    def publish(answer, t):
        if answer.arm is not None:
            assert controller.accept(answer.arm, t, q, qd) is None

    for k, t in enumerate(times):
        t = float(t)
        silent = t >= T0 + SILENT
        if silent and plan is None:
            plan = core.executor.plan
        if not (silent and silence == "joint_states"):
            core.joints(t, q, qd, 0.04, t)
        if k % 10 == 0 and not (silent and silence in ("policy", "camera")):
            coming.append(chunk(robot, t, speed))
        if coming and t >= coming[0].stamp + 0.08:
            answer = core.chunk(coming.pop(0), t)
            publish(answer, t)
            if answer.arm is not None and silence == "joint_states":
                plan = core.executor.plan
        if k % 2 == 0 and not (silent and silence == "action_node"):
            # policy_node says at once that images are old; a dead one is missed after its status' timeout.
            idle = {"camera": t > T0 + SILENT + 0.5, "policy": t > T0 + SILENT + 0.7}.get(silence, False)
            publish(core.tick(t, t, "silent" if idle else ""), t)
        if silence == "action_node" and silent:
            coming.clear()
        q, qd = controller.reference(t)
        track.append(q)
    return times, np.array(track), plan, core


@pytest.mark.parametrize("silence", ["camera", "policy", "joint_states", "action_node"])
def test_silence_brings_the_arm_to_rest_near_its_path(robot, silence):
    times, track, plan, core = run(robot, silence)
    silent = times >= T0 + SILENT
    limits = Limits.scaled(robot, 0.6, 0.3, 0.1, 0.6)
    velocity = np.diff(track, axis=0) / STEP
    assert np.abs(velocity[(times[1:] > T0 + 1.0) & ~silent[1:]]).max() > 0.1  # it was moving
    acceleration = np.diff(velocity, axis=0) / STEP
    assert (np.abs(acceleration[silent[2:]]) <= limits.acceleration * 1.01).all()
    assert np.abs(track[-1] - track[-50]).max() < 1e-9  # at rest
    if silence != "action_node":
        detected = {"camera": 0.5, "policy": 0.7, "joint_states": 0.25}[silence]
        resting = times[1:][np.abs(velocity).max(axis=1) > 1e-6][-1]
        at = np.searchsorted(times, T0 + SILENT + detected)
        speed = np.abs(velocity[at - 1])
        # v / a of the worst joint at full deceleration; the stop is smooth at both ends, which takes twice that.
        took, least = resting - (T0 + SILENT + detected), (speed / limits.acceleration).max()
        assert took <= 2.0 * least + 0.35
        print(f"{silence}: at rest {took:.2f} s after it was noticed, {least:.2f} s at full deceleration throughout")
    planned = robot.poses(sample(plan, np.arange(0.0, plan.times[-1] + 0.001, 0.001))[0])[0]
    tool = robot.poses(track[silent])[0]
    deviation = max(np.linalg.norm(planned - p, axis=1).min() for p in tool[::3])
    assert deviation <= 0.01, f"{deviation * 1e3:.1f} mm"
    print(f"{silence}: {deviation * 1e3:.2f} mm from the planned path")


def moving(robot, speed, chunks):
    """An arm that has followed so many chunks, and the time (s) that the next would be of."""
    core, t = ActionCore(robot, ExecutorSettings(), SafetySettings(**robots.workspace())), T0
    core.joints(t, robot.rest, np.zeros(7), 0.04, t)
    for _ in range(chunks):
        core.chunk(chunk(robot, t, speed), t + 0.08)
        for x in t + 0.02 * np.arange(1, 7):
            q, qd, _ = core.executor.reference(float(x))
            core.joints(float(x), q, qd, 0.04, float(x))
        t += 0.12
    return core, t


def test_a_stop_at_any_moment_is_within_the_deceleration_and_near_the_path(robot):
    """25 moments and speeds: vla/stop while chunks go on coming."""
    rng, worst, slowest = np.random.default_rng(0), 0.0, 0.0
    for _ in range(25):
        speed = rng.uniform(0.05, 0.4)
        core, t = moving(robot, speed, int(rng.integers(2, 9)))
        plan = core.executor.plan
        now = t + rng.uniform(0.0, 0.1)
        core.gate.stop()
        stop = core.tick(now, now).arm
        limits = core.executor.limits
        assert stop is not None and not stop.velocities[-1].any()
        assert (bounds(stop).acceleration <= limits.acceleration).all()
        speed = np.abs(sample(plan, now - plan.stamp)[1])
        slowest = max(slowest, stop.end - now - 2.0 * (speed / limits.acceleration).max())
        along = robot.poses(sample(plan, np.arange(0.0, plan.times[-1] + 0.002, 0.002))[0])[0]
        tool = robot.poses(sample(stop, np.arange(now, stop.end + 0.02, 0.02) - stop.stamp)[0])[0]
        worst = max(worst, max(np.linalg.norm(along - p, axis=1).min() for p in tool))
        assert core.chunk(chunk(robot, t, 0.2), now + 0.02).arm is None  # held: nothing more is carried out
    print(f"25 stops: at most {worst * 1e3:.2f} mm from the plan, {slowest:.2f} s beyond twice the shortest stop")
    assert worst <= 0.01 and slowest <= 0.4, (worst, slowest)


def test_an_emergency_stop_is_at_the_full_limits_and_on_the_path_where_that_is_as_fast(robot):
    """25 moments and speeds: from the emergency stop to rest, next to vla/stop at the scaled limits."""
    rng, took, away = np.random.default_rng(1), [], []
    for _ in range(25):
        seed, speed, late = int(rng.integers(1 << 30)), rng.uniform(0.05, 0.6), rng.uniform(0.0, 0.1)
        both = {}
        for cause in ("stop", "estop"):
            core, t = moving(robot, speed, int(np.random.default_rng(seed).integers(2, 9)))
            plan, now = core.executor.plan, t + late
            core.gate.estop(True) if cause == "estop" else core.gate.stop()
            both[cause] = stop = core.tick(now, now).arm
            assert stop.stamp <= now and not stop.velocities[-1].any() and not stop.accelerations[-1].any()
        assert excess(both["estop"], core.executor.full, robot)[0] <= 1.0
        took.append([both[cause].end - now for cause in ("stop", "estop")])
        leaves = now + core.executor.settings.lead  # until then the controller follows what it has
        for x in np.arange(now, leaves, 0.002):
            for old, new in zip(sample(plan, x - plan.stamp), sample(stop, x - stop.stamp), strict=True):
                np.testing.assert_allclose(old, new, atol=1e-6)
        along = robot.poses(sample(plan, np.arange(0.0, plan.times[-1] + 0.002, 0.002))[0])[0]
        tool = robot.poses(sample(stop, np.arange(now, stop.end + 0.005, 0.005) - stop.stamp)[0])[0]
        away.append(max(np.linalg.norm(along - p, axis=1).min() for p in tool))
        assert core.chunk(chunk(robot, t, 0.2), now + 0.02).arm is None
    took = np.array(took)
    print(f"from vla/stop to rest {took[:, 0].max():.2f} s at most, from estop {took[:, 1].max():.2f} s "
          f"(p50 {np.median(took, axis=0).round(2)}), off the path by {1e3 * max(away):.1f} mm")  # fmt: skip
    assert (took[:, 1] <= took[:, 0]).all() and took[:, 1].max() <= 0.2 and max(away) <= 0.015

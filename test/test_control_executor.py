"""What the chunk executor does with well-behaved chunks: alignment, seams, limits, stops, strategies."""

from dataclasses import replace

import numpy as np
import pytest
import robots

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.executor import ChunkExecutor
from vla_nodes.control.limits import bounds, excess
from vla_nodes.control.path import ChunkPath, TimeLaw
from vla_nodes.control.settings import ExecutorSettings, OnInstructionChange, Strategy
from vla_nodes.control.splice import join_path
from vla_nodes.control.trajectory import refusal, sample

T0 = 1000.0
FINGER = ("panda_finger_joint1",)


@pytest.fixture(scope="module")
def robot():
    return robots.panda()


def start(robot, **settings):
    executor = ChunkExecutor(robot, ExecutorSettings(**settings))
    executor.observe(T0, robot.rest, np.zeros(7), 0.04)
    return executor


def sine(robot, stamp, amplitude=0.15, rows=16, period=0.1, gripper=1.0, instruction="x"):
    """Joint positions of one smooth motion whatever the stamp, so that consecutive chunks agree."""
    t = stamp - T0 + period * np.arange(1, rows + 1)
    q = robot.rest + amplitude * (1 - np.cos(1.5 * t))[:, None] * np.linspace(0.5, 1.0, 7)
    actions = np.hstack([q, np.full((rows, 1), gripper)])
    return ActionChunk(stamp, instruction, period, ActionSpace.JOINT_POSITION, actions, robots.GRIPPER)


def wanted(robot, t, amplitude=0.15):
    return robot.rest + amplitude * (1 - np.cos(1.5 * (t - T0)))[:, None] * np.linspace(0.5, 1.0, 7)


def at(trajectory, t):
    return sample(trajectory, t - trajectory.stamp)


def follow(executor, t0, t1):
    """The arm follows the reference exactly; joint states at 100 Hz."""
    for t in np.arange(t0, t1 + 1e-9, 0.01):
        q, qd, _ = executor.reference(t)
        executor.observe(float(t), q, qd)


def test_first_command_is_the_measured_pose_and_the_last_is_at_rest(robot):
    executor = start(robot)
    output = executor.submit(sine(robot, T0), T0 + 0.15)
    assert output.refused is None
    for trajectory, names in ((output.arm, robot.joint_names), (output.grippers["gripper"], FINGER)):
        assert refusal(trajectory, names, T0 + 0.15) is None
        assert not trajectory.velocities[-1].any()
        assert trajectory.stamp <= T0 + 0.15
    for t in (T0 + 0.15, output.begin):
        np.testing.assert_allclose(at(output.arm, t)[0], robot.rest, atol=1e-12)
    assert not output.arm.accelerations[-1].any()
    np.testing.assert_allclose(output.arm.positions[-1], sine(robot, T0).actions[-1, :7], atol=1e-9)


@pytest.mark.parametrize("latency", [0.0, 0.05, 0.15, 0.3, 0.5])
def test_latency_is_compensated(robot, latency):
    executor = start(robot)
    output = executor.submit(sine(robot, T0), T0 + latency)
    t = np.arange(output.begin + 0.45, T0 + 1.2, 0.01)  # after the blend, before the final deceleration
    np.testing.assert_allclose(at(output.arm, t)[0], wanted(robot, t), atol=4e-3)
    assert output.dropped == int((output.begin - T0) / 0.1 + 1e-9)
    assert output.latency == pytest.approx(output.begin - T0) and output.latency < latency + 0.07


def test_at_rest_path_starts_at_the_first_row(robot):
    executor = start(robot, at_rest="path")
    output = executor.submit(sine(robot, T0), T0 + 0.3)
    assert output.dropped == 0 and output.gap < 5e-3  # rad, of the first row drawn back in line with the second
    t = np.arange(output.begin + 0.3, output.begin + 1.0, 0.05)
    np.testing.assert_allclose(at(output.arm, t)[0], wanted(robot, t - output.begin + T0), atol=4e-3)


def test_a_stream_of_agreeing_chunks_is_followed_without_seams(robot):
    executor = start(robot)
    before, t = None, T0
    for _ in range(30):
        now = t + 0.15
        output = executor.submit(sine(robot, t), now)
        assert output.refused is None and output.mode == "moving"
        assert excess(output.arm, executor.limits, robot)[0] <= 1.0
        if before is not None:
            for x in np.linspace(now, output.begin, 7):
                old, new = at(before, x), at(output.arm, x)
                np.testing.assert_allclose(old[0], new[0], atol=1e-9)
                np.testing.assert_allclose(old[1], new[1], atol=1e-7)
        follow(executor, t + 0.01, t + 0.125)
        before, t = output.arm, t + 0.125
        if t > T0 + 1.0:
            np.testing.assert_allclose(at(before, t)[0], wanted(robot, np.array([t]))[0], atol=5e-3)


def test_too_fast_rows_take_longer_on_the_same_path(robot):
    executor = start(robot, velocity_scale=0.1)
    chunk = sine(robot, T0, amplitude=0.3)
    output = executor.submit(chunk, T0)
    assert output.stretched > 1.0
    assert bounds(output.arm).velocity.max() <= (0.1 * robot.max_velocity).max()
    # Every row but those dropped and blended over is passed, only later.
    t = np.arange(0.0, output.arm.times[-1], 0.002)
    q = sample(output.arm, t)[0]
    for row in chunk.actions[6:, :7]:
        assert np.abs(q - row).max(axis=1).min() < 4e-3


def test_tool_speed_is_kept_by_stretching(robot):
    executor = start(robot, tool_speed=0.1)
    actions = np.tile([0.03, 0.0, 0.0, 0, 0, 0, 1.0], (16, 1))  # 0.3 m/s
    output = executor.submit(ActionChunk(T0, "x", 0.1, ActionSpace.EE_DELTA, actions, robots.GRIPPER), T0)
    t = np.arange(0.0, output.arm.times[-1], 0.005)
    q, qd, _ = sample(output.arm, t)
    assert 0.08 < robot.tool_speed(q, qd).max() <= 0.1
    assert output.stretched > 2.0


def test_action_spaces_agree(robot):
    rows = np.arange(1, 11)[:, None]
    pose = robot.forward(robot.rest)
    positions = pose[:3, 3] + rows * [0.008, 0.004, -0.006]
    quaternion = np.array([1.0, 0.000199, 0.0, 0.0])  # the rest pose's orientation, hand down, see its forward()
    open_ = np.ones((10, 1))
    delta = np.hstack([np.tile([0.008, 0.004, -0.006, 0, 0, 0], (10, 1)), open_])
    absolute = np.hstack([positions, np.tile(quaternion, (10, 1)), open_])
    ends = {}
    for space, actions in ((ActionSpace.EE_DELTA, delta), (ActionSpace.EE_POSE, absolute)):
        output = start(robot).submit(ActionChunk(T0, "x", 0.1, space, actions, robots.GRIPPER), T0)
        ends[space] = output.arm.positions[-1]
        np.testing.assert_allclose(robot.forward(ends[space])[:3, 3], positions[-1], atol=1e-3)
    np.testing.assert_allclose(*ends.values(), atol=5e-3)
    q = ends[ActionSpace.EE_DELTA]
    joint_rows = robot.rest + rows / 10 * (q - robot.rest)
    for space, values in (
        (ActionSpace.JOINT_POSITION, joint_rows),
        (ActionSpace.JOINT_DELTA, np.diff(np.vstack([robot.rest, joint_rows]), axis=0)),
    ):
        output = start(robot).submit(ActionChunk(T0, "x", 0.1, space, np.hstack([values, open_]), robots.GRIPPER), T0)
        np.testing.assert_allclose(output.arm.positions[-1], q, atol=1e-9)


def test_silence_ends_at_rest_on_the_planned_path_and_stop_is_quick(robot):
    executor = start(robot)
    for t in (T0, T0 + 0.3, T0 + 0.6):
        executor.submit(sine(robot, t), t + 0.1)
        follow(executor, t + 0.11, t + 0.3)
    plan = executor.plan
    now = T0 + 1.0
    assert np.abs(at(plan, now)[1]).max() > 0.15
    stopped = executor.stop(now)
    assert refusal(stopped, robot.joint_names, now) is None
    assert stopped.end < now + 0.6 < plan.end
    assert excess(stopped, executor.limits, robot)[0] <= 1.0
    along = sample(plan, np.arange(0, plan.times[-1], 0.001))[0]
    tools = robot.kinematics(along)[0]
    for t in np.arange(now, stopped.end, 0.02):
        tool = robot.forward(at(stopped, t)[0])[:3, 3]
        assert np.linalg.norm(tools - tool, axis=1).min() < 1e-3  # the issue allows 1 cm
    assert executor.stop(stopped.end + 1.0) is not None  # stopping an arm at rest holds it
    np.testing.assert_allclose(executor.reference(stopped.end + 2.0)[0], stopped.positions[-1], atol=1e-12)


def test_gripper_is_scaled_rate_limited_and_continuous(robot):
    executor = start(robot)
    first = executor.submit(sine(robot, T0, gripper=0.0), T0).grippers["gripper"]
    assert first.positions[-1, 0] == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(at(first, T0)[0], 0.04)
    executor.observe(T0 + 0.2, robot.rest, np.zeros(7), 0.03)
    second = executor.submit(sine(robot, T0 + 0.2, gripper=0.5), T0 + 0.25).grippers["gripper"]
    assert second.positions[-1, 0] == pytest.approx(0.02, abs=1e-5)
    np.testing.assert_allclose(at(first, T0 + 0.26)[0], at(second, T0 + 0.26)[0], atol=1e-9)
    for trajectory in (first, second):
        p, v, _ = sample(trajectory, np.arange(0, trajectory.times[-1], 0.001))
        assert np.abs(v).max() <= robot.grippers[0].speed + 1e-9 and p.min() >= 0 and p.max() <= 0.04


@pytest.mark.parametrize(
    ("change", "now", "cause"),
    [
        ({"actions": np.full((16, 8), np.nan)}, T0, "malformed"),
        ({"actions": np.zeros((16, 7))}, T0, "malformed"),
        ({"stamp": T0 + 5.0}, T0, "future"),
        ({"stamp": T0 - 5.0}, T0, "no_joint_state"),
        ({}, T0 + 3.0, "too_late"),
    ],
)
def test_refusals_leave_the_motion_in_flight(robot, change, now, cause):
    executor = start(robot)
    plan = executor.submit(sine(robot, T0), T0).arm
    output = executor.submit(replace(sine(robot, T0), **change), now)
    assert output.cause == cause and output.refused and output.arm is None
    assert executor.plan is plan


def test_unreachable_rows_are_cut(robot):
    actions = np.tile([0.1, 0.0, 0.0, 0, 0, 0, 1.0], (16, 1))
    output = start(robot).submit(ActionChunk(T0, "x", 0.1, ActionSpace.EE_DELTA, actions, robots.GRIPPER), T0)
    assert output.refused is None
    assert 0.5 < robot.forward(output.arm.positions[-1])[0, 3] < 0.87
    far = actions.copy()
    far[0, 0] = 2.0
    output = start(robot).submit(ActionChunk(T0, "x", 0.1, ActionSpace.EE_DELTA, far, robots.GRIPPER), T0)
    assert output.cause == "unreachable" and "mm" in output.refused


def test_finish_chunk_waits_and_temporal_ensemble_averages(robot):
    executor = start(robot, strategy=Strategy.FINISH_CHUNK)
    first = executor.submit(sine(robot, T0), T0)
    follow(executor, T0 + 0.01, T0 + 0.5)
    assert executor.submit(sine(robot, T0 + 0.5), T0 + 0.5).cause == "finishing"
    end = first.arm.end
    follow(executor, T0 + 0.51, end)
    assert executor.submit(sine(robot, end), end).refused is None

    executor = start(robot, strategy=Strategy.TEMPORAL_ENSEMBLE, ensemble_decay=0.0, at_rest="path")
    for offset in (0.0, 0.2):
        chunk = sine(robot, T0, amplitude=0.0)
        actions = chunk.actions.copy()
        actions[:, 0] += offset
        output = executor.submit(replace(chunk, actions=actions), T0)
    assert output.arm.positions[-1, 0] - robot.rest[0] == pytest.approx(0.1, abs=1e-6)


def test_instruction_change(robot):
    for policy in OnInstructionChange:
        executor = start(robot, on_instruction_change=policy)
        executor.submit(sine(robot, T0), T0)
        follow(executor, T0 + 0.01, T0 + 0.6)
        output = executor.submit(sine(robot, T0 + 0.6, instruction="y"), T0 + 0.6)
        if policy is OnInstructionChange.BLEND_NOW:
            assert output.refused is None and output.mode == "moving"
        elif policy is OnInstructionChange.FINISH_CHUNK:
            assert output.cause == "finishing" and output.arm is None
        else:
            assert output.cause == "stopping" and not output.arm.velocities[-1].any()
            end = output.arm.end
            assert executor.submit(sine(robot, T0 + 0.6, instruction="y"), T0 + 0.65).cause == "stopping"
            follow(executor, T0 + 0.61, end + 0.01)
            assert executor.submit(sine(robot, end + 0.01, instruction="y"), end + 0.02).refused is None


def test_approach_and_reset(robot):
    executor = start(robot)
    target = robot.rest + 0.4
    home = executor.approach(target, T0)
    assert excess(home, executor.limits, robot)[0] <= 1.0
    np.testing.assert_allclose(home.positions[0], robot.rest, atol=1e-12)
    np.testing.assert_allclose(home.positions[-1], target, atol=1e-6)
    executor.reset()
    assert executor.plan is None and executor.stop(T0) is None


@pytest.mark.parametrize("change", [{"knot": 0.03}, {"at_rest": "guess"}, {"blend": 0.0}, {"velocity_scale": 1.5}])
def test_settings_are_checked(robot, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ChunkExecutor(robot, ExecutorSettings(**change))


def test_an_arm_behind_an_absolute_chunk_catches_up_instead_of_refusing_it(robot):
    """The distance to the first row must not set the pace of the rows after it."""
    executor = start(robot)
    chunk = sine(robot, T0)
    behind = chunk.actions.copy()
    behind[:, :7] += 0.3  # rad: far more than a period's motion
    output = executor.submit(replace(chunk, actions=behind), T0 + 0.15)
    assert output.refused is None and excess(output.arm, executor.limits, robot)[0] <= 1.0
    assert output.stretched < 1.0 and output.gap > 0.2
    np.testing.assert_allclose(at(output.arm, T0 + 0.15)[0], robot.rest, atol=1e-12)
    np.testing.assert_allclose(output.arm.positions[-1], behind[-1, :7], atol=1e-9)
    assert output.arm.end < T0 + 1.6 + 1.5


@pytest.mark.parametrize(("beyond", "moves"), [(0.0, True), (1e-3, True), (0.04, True), (0.2, False)])
def test_an_arm_a_little_outside_its_limits_comes_back_in_and_goes_no_farther(robot, beyond, moves):
    executor = ChunkExecutor(robot)
    q = robot.rest.copy()
    q[3] = robot.upper[3] + beyond
    executor.observe(T0, q, np.zeros(7), 0.04)
    actions = np.hstack([np.tile(q, (16, 1)), np.ones((16, 1))])
    actions[:, 3] -= 0.02 * np.arange(1, 17)
    output = executor.submit(ActionChunk(T0, "x", 0.1, ActionSpace.JOINT_POSITION, actions, robots.GRIPPER), T0 + 0.05)
    assert (output.refused is None) == moves
    if moves:
        np.testing.assert_allclose(at(output.arm, T0 + 0.05)[0], q, atol=1e-12)
        path = sample(output.arm, np.arange(0.0, output.arm.times[-1], 0.002))[0]
        assert path[:, 3].max() <= q[3] + 1e-9 and path[-1, 3] < robot.upper[3]


@pytest.mark.parametrize("share", [0.5, 0.93, 0.97])
def test_an_arm_that_speeds_up_at_its_limit_goes_on_and_need_not_stop(robot, share):
    limits = ChunkExecutor(robot).limits
    acceleration = np.zeros(7)
    acceleration[3] = share * limits.acceleration[3]
    velocity = 0.15 * acceleration
    ahead = 0.1 * np.arange(16)[:, None]
    path = ChunkPath(robot.rest + ahead * 1.5 * velocity, 0.1)  # a little faster: it is still to be caught up with
    state = robot.rest, velocity, acceleration
    found = join_path(robot.joint_names, T0, state, path, TimeLaw(0.1, path.length, 1.0, 0.6), limits, 0.2, 0.9)
    assert found is not None and excess(found[0], limits, robot)[0] <= 1.0
    assert found[1] < 1.0  # s until on its path

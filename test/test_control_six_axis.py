"""The executor with an arm of other kinematics, and the guards that look at a splice's way."""

import re

import numpy as np
import pytest
import robots
import six_axis
import yaml

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.executor import ChunkExecutor
from vla_nodes.control.guards import SelfCollisionGuard, WorkspaceGuard
from vla_nodes.control.limits import excess
from vla_nodes.control.robot import RobotError, RobotModel
from vla_nodes.control.safety import SafetySettings
from vla_nodes.control.settings import ExecutorSettings
from vla_nodes.control.trajectory import refusal, sample
from vla_nodes.pipeline.action_core import ActionCore
from vla_nodes.poses import rotation_vector
from vla_nodes.share import share_path

T0 = 500.0


@pytest.fixture(scope="module")
def robot():
    return RobotModel(six_axis.urdf(), "tool0", robots.motion_limits(six_axis.LIMITS))


def rows(robot, space, stamp):
    """A slow sideways motion of the tool, in any action space."""
    t = stamp - T0 + 0.1 * np.arange(1, 17)
    pose, step = robot.forward(robot.rest), np.zeros((16, 3))
    step[:, 1] = 0.008 * np.cos(t)
    if space is ActionSpace.EE_DELTA:
        actions = np.hstack([step, np.zeros((16, 3))])
    elif space is ActionSpace.EE_POSE:
        path = pose[:3, 3] + np.stack([0 * t, 0.08 * np.sin(t), 0 * t], axis=1)
        actions = np.hstack([path, np.tile(_quaternion(pose[:3, :3]), (16, 1))])
    elif space is ActionSpace.JOINT_DELTA:
        actions = np.outer(0.01 * np.cos(t), [1, 0.5, -0.5, 0.2, 0, 0.3])
    else:
        actions = robot.rest + np.outer(0.1 * np.sin(t), [1, 0.5, -0.5, 0.2, 0, 0.3])
    return ActionChunk(stamp, "x", 0.1, space, actions)


def _quaternion(r):
    v = rotation_vector(r[None])[0]
    angle = np.linalg.norm(v)
    return [*(np.sin(angle / 2) * v / angle), np.cos(angle / 2)]


@pytest.mark.parametrize("space", list(ActionSpace))
def test_a_six_axis_arm_follows_any_action_space_within_its_limits(robot, space):
    executor = ChunkExecutor(robot)
    executor.observe(T0, robot.rest, np.zeros(6))
    plan, moved = None, 0.0
    for k in range(12):
        stamp = T0 + 0.1 * k
        chunk = rows(robot, space, stamp)
        output = executor.submit(chunk, stamp + 0.06)
        assert output.refused is None and output.grippers is None, output.refused
        assert refusal(output.arm, robot.joint_names, stamp + 0.06) is None
        assert excess(output.arm, executor.limits, robot)[0] <= 1.0
        if plan is not None:
            for at in np.linspace(stamp + 0.06, output.begin, 5):
                old, new = sample(plan, at - plan.stamp), sample(output.arm, at - output.arm.stamp)
                assert np.abs(old[0] - new[0]).max() <= 1e-6 and np.abs(old[1] - new[1]).max() <= 1e-4
        plan = output.arm
        for t in stamp + 0.02 * np.arange(1, 6):
            q, qd, _ = executor.reference(float(t))
            moved = max(moved, np.abs(q - robot.rest).max())
            executor.observe(float(t), q, qd)
    assert moved > 0.03


def test_the_straight_arm_is_singular_and_stays_within_limits(robot):
    q = np.array([0.0, -np.pi / 2, 0.0, -np.pi / 2, 0.0, 0.0])  # elbow and wrist both singular
    executor = ChunkExecutor(robot)
    executor.observe(T0, q, np.zeros(6))
    actions = np.tile([0.0, 0.0, 0.01, 0.0, 0.0, 0.02], (16, 1))
    output = executor.submit(ActionChunk(T0, "x", 0.1, ActionSpace.EE_DELTA, actions), T0 + 0.05)
    if output.arm is not None:
        assert excess(output.arm, executor.limits, robot)[0] <= 1.0
    else:
        assert output.cause in ("unreachable", "too_fast")
    assert np.isfinite(robot.solve(np.zeros((4, 3)), np.tile(np.eye(3), (4, 1, 1)), q).q).all()


def folding(robot):
    """Rows that fold the forearm onto the upper arm, and the base."""
    q = robot.rest + np.linspace(0.0, 1.0, 17)[1:, None] * np.array([0.0, 0.0, 1.2, 0.0, 0.0, 0.0])
    return ActionChunk(T0, "x", 0.1, ActionSpace.JOINT_POSITION, q)


def test_self_collision_is_refused_where_asked_for(robot):
    guard = SelfCollisionGuard(six_axis.urdf(), robot)
    assert guard.pairs >= 5
    for guards, cause in (((), ""), ((("self_collision", guard),), "self_collision")):
        executor = ChunkExecutor(robot, ExecutorSettings(), guards)
        executor.observe(T0, robot.rest, np.zeros(6))
        output = executor.submit(folding(robot), T0 + 0.05)
        assert output.cause == cause
        if cause:
            assert "touch" in output.refused and output.arm is None
        assert executor.submit(rows(robot, ActionSpace.JOINT_POSITION, T0), T0 + 0.1).refused is None


def test_a_urdf_without_two_shapes_that_could_meet_is_said(robot):
    with pytest.raises(RobotError, match="no two links"):
        SelfCollisionGuard(re.sub("<collision>.*?</collision>", "", six_axis.urdf()), robot)


def test_the_way_onto_a_chunk_stays_in_the_workspace():
    """An arm on its way down is turned around: its own momentum must not take it below the table."""
    panda = robots.panda()
    height = panda.forward(panda.rest)[2, 3]
    down = np.tile([0.0, 0.0, -0.02, 0, 0, 0, 1.0], (16, 1))
    up = -down + [0, 0, 0, 0, 0, 0, 2.0]
    lowest = []
    for table in (height - 0.125, -1.0):
        core = ActionCore(
            panda,
            ExecutorSettings(),
            SafetySettings(table=table, **{**robots.workspace(), "workspace_low": (0.1, -0.6, -0.5)}),
        )
        core.joints(T0, panda.rest, np.zeros(7), 0.04, 0.0)
        path = []
        core.chunk(ActionChunk(T0, "x", 0.1, ActionSpace.EE_DELTA, down, robots.GRIPPER), T0)
        for k in range(1, 120):
            t = T0 + 0.02 * k
            q, qd, _ = core.executor.reference(t)
            path.append(panda.forward(q)[2, 3])
            core.joints(t, q, qd, 0.04, 0.02 * k)
            if k == 32:
                core.chunk(ActionChunk(t, "x", 0.1, ActionSpace.EE_DELTA, up, robots.GRIPPER), t)
        lowest.append(min(path) - height)
        assert path[-1] > min(path) + 0.05  # it did turn around
    assert lowest[0] > -0.125 - 0.011


def test_a_guard_says_where_the_tool_leaves(robot):
    executor = ChunkExecutor(robot)
    executor.observe(T0, robot.rest, np.zeros(6))
    output = executor.submit(rows(robot, ActionSpace.EE_DELTA, T0), T0)
    tool = robot.forward(robot.rest)[:3, 3]
    assert WorkspaceGuard(robot, tool - 1.0, tool + 1.0)(output.arm, 0.4) == ""
    assert WorkspaceGuard(robot, tool - 1.0, tool - [-1, 0.5, -1])(output.arm, 0.4) == ""  # both ends are outside


def test_the_example_limits_fit_an_arm_with_those_joints():
    given = yaml.safe_load(share_path("config/ur5e/contract.yaml").read_text())
    arm = RobotModel(six_axis.urdf(), "tool0", robots.motion_limits({**given["limits"], "rest": given["rest"]}))
    assert not arm.grippers and arm.max_acceleration.tolist() == [5.0] * 6
    executor = ChunkExecutor(arm, ExecutorSettings(acceleration_scale=0.6, jerk_scale=1.0))
    executor.observe(T0, arm.rest, np.zeros(6))
    assert executor.submit(rows(arm, ActionSpace.EE_DELTA, T0), T0 + 0.05).refused is None

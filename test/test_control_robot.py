"""Kinematics, limits and inverse kinematics of the arm."""

import sys
import threading

import numpy as np
import pytest
import robots
import yaml

from vla_nodes.control.inverse_kinematics import IkSettings
from vla_nodes.control.robot import MotionLimits, RobotError, RobotModel
from vla_nodes.poses import quaternion_matrix, rotation_matrix, rotation_vector
from vla_nodes.share import share_path

URDF = share_path("config/panda/panda.urdf")
LIMITS = robots.motion_limits(yaml.safe_load(share_path(robots.PANDA).read_text())["limits"])
# Craig DH of the published Panda, FCI documentation: a_{i-1}, d_i, alpha_{i-1}; flange at 0.107, hand turned -45 deg.
DH = np.array(
    [
        [0, 0.333, 0], [0, 0, -np.pi / 2], [0, 0.316, np.pi / 2], [0.0825, 0, np.pi / 2],
        [-0.0825, 0.384, -np.pi / 2], [0, 0, np.pi / 2], [0.088, 0, np.pi / 2],
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def robot():
    return robots.panda()


def dh_forward(q):
    pose = np.eye(4)
    for (a, d, alpha), theta in zip(DH, q, strict=True):
        ca, sa, ct, st = np.cos(alpha), np.sin(alpha), np.cos(theta), np.sin(theta)
        pose = pose @ np.array(
            [[ct, -st, 0, a], [st * ca, ct * ca, -sa, -d * sa], [st * sa, ct * sa, ca, d * ca], [0, 0, 0, 1]]
        )
    tool = np.eye(4)
    tool[:3, :3] = rotation_matrix(np.array([[0, 0, -np.pi / 4]]))[0]
    tool[2, 3] = 0.107 + 0.1034
    return pose @ tool


def random_q(robot, rng, n, margin=0.1):
    return rng.uniform(robot.lower + margin, robot.upper - margin, (n, robot.dof))


def test_model_reads_urdf_and_limits(robot):
    assert robot.joint_names == tuple(f"panda_joint{i}" for i in range(1, 8))
    assert robot.max_velocity[0] == 2.175 and robot.max_acceleration[1] == 7.5 and robot.max_jerk[6] == 10000
    (gripper,) = robot.grippers
    assert gripper.joint == "panda_finger_joint1"
    assert gripper.position(0.5) == pytest.approx(0.02) and gripper.position(7.0) == pytest.approx(0.04)
    assert RobotModel(URDF.read_text(), "panda_hand_tcp", LIMITS).joint_names == robot.joint_names


def test_forward_is_the_published_dh(robot):
    for q in random_q(robot, np.random.default_rng(0), 50):
        np.testing.assert_allclose(robot.forward(q), dh_forward(q), atol=1e-9)


def test_jacobian_is_the_derivative(robot):
    rng = np.random.default_rng(1)
    for q in random_q(robot, rng, 10):
        qd = rng.normal(size=7)
        before, after = robot.forward(q - 1e-6 * qd), robot.forward(q + 1e-6 * qd)
        twist = robot.jacobian(q) @ qd
        np.testing.assert_allclose((after[:3, 3] - before[:3, 3]) / 2e-6, twist[:3], atol=1e-7)
        spin = rotation_vector((after[:3, :3] @ before[:3, :3].T)[None])[0] / 2e-6
        np.testing.assert_allclose(spin, twist[3:], atol=1e-6)
        assert robot.tool_speed(q[None], qd[None])[0] == pytest.approx(np.linalg.norm(twist[:3]))
        assert np.linalg.norm(twist[:3]) <= robot.lever @ np.abs(qd) + 1e-9


def test_rotations_round_trip():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(50, 3))
    vectors *= (rng.uniform(0, np.pi, 50) / np.linalg.norm(vectors, axis=1))[:, None]
    vectors[0], vectors[1] = 0.0, [0.0, np.pi - 1e-9, 0.0]
    np.testing.assert_allclose(rotation_vector(rotation_matrix(vectors)), vectors, atol=1e-6)
    quaternions = np.concatenate([np.sin(0.5) * np.eye(3), np.full((3, 1), np.cos(0.5))], axis=1)
    np.testing.assert_allclose(rotation_vector(quaternion_matrix(3.0 * quaternions)), np.eye(3), atol=1e-9)


def test_solve_follows_a_cartesian_sequence(robot):
    rng = np.random.default_rng(3)
    for _ in range(20):
        q0 = robot.rest + rng.uniform(-0.3, 0.3, 7)
        pose = robot.forward(q0)
        steps = np.arange(1, 17)[:, None]
        positions = pose[:3, 3] + steps * rng.uniform(-0.012, 0.012, 3)
        rotations = rotation_matrix(steps * rng.uniform(-0.04, 0.04, 3)) @ pose[:3, :3]
        result = robot.solve(positions, rotations, q0)
        assert result.position_error.max() < 5e-4 and result.rotation_error.max() < 5e-4
        for q, p in zip(result.q, positions, strict=True):
            np.testing.assert_allclose(robot.forward(q)[:3, 3], p, atol=5e-4)
        assert np.abs(np.diff(result.q, 2, axis=0)).max() < 0.05  # no jumps between rows


def test_solve_respects_joint_limits_and_reports_what_is_out_of_reach(robot):
    pose = robot.forward(robot.rest)
    positions = pose[:3, 3] + np.linspace(0.1, 1.5, 16)[:, None] * np.array([1.0, 0.0, 0.0])
    result = robot.solve(positions, np.repeat(pose[None, :3, :3], 16, 0), robot.rest)
    assert np.all(result.q >= robot.lower) and np.all(result.q <= robot.upper)
    assert result.position_error[0] < 1e-3 and result.position_error[-1] > 0.3


def test_posture_pulls_the_null_space_to_rest(robot):
    pose = robot.forward(robot.rest)
    null = np.linalg.svd(robot.jacobian(robot.rest))[2][-1]
    swung = robot.solve(pose[None, :3, 3], pose[None, :3, :3], robot.rest + 0.5 * null, IkSettings(posture=0.0))
    q = swung.q[-1]
    assert swung.position_error[0] < 1e-3
    distance = np.linalg.norm(q - robot.rest)
    assert distance > 0.3
    for _ in range(40):
        q = robot.solve(pose[None, :3, 3], pose[None, :3, :3], q).q[-1]
    assert np.linalg.norm(robot.forward(q)[:3, 3] - pose[:3, 3]) < 1e-3
    assert np.linalg.norm(q - robot.rest) < 0.1 * distance


@pytest.mark.parametrize(
    ("urdf", "kwargs", "word"),
    [
        ("<robot", {}, "not XML"),
        ("<!DOCTYPE x><robot/>", {}, "entities"),
        (None, {"tool": "nose"}, "no frame 'nose'"),
        (None, {"arm_joints": ["panda_joint1", "elbow"]}, "elbow"),
        (None, {"limits": MotionLimits({}, {}, 1.0)}, "no acceleration for panda_joint1"),
    ],
)
def test_errors_name_the_remedy(urdf, kwargs, word):
    with pytest.raises(RobotError, match=word):
        RobotModel(urdf or URDF, **{"tool": "panda_hand_tcp", "limits": LIMITS, **kwargs})
    with pytest.raises(FileNotFoundError, match="nowhere.urdf"):
        RobotModel("/nowhere.urdf", "panda_hand_tcp", LIMITS)


def test_threads_do_not_disturb_each_other(robot):
    """The interpreter changes threads between Pinocchio's calls: what one leaves for its next call stays its own."""
    rng = np.random.default_rng(5)
    paths = [random_q(robot, rng, 40) for _ in range(3)]
    expected = [(*robot.kinematics(q), robot.poses(q)[0], [robot.forward(row) for row in q]) for q in paths]
    disturbed, interval = [], sys.getswitchinterval()

    def work(q, wanted):
        for _ in range(60):
            got = (*robot.kinematics(q), robot.poses(q)[0], [robot.forward(row) for row in q])
            if not all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True)):
                disturbed.append(q)

    threads = [threading.Thread(target=work, args=case) for case in zip(paths, expected, strict=True)]
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not disturbed

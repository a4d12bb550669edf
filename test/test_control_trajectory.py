"""trajectory.refusal and sample against joint_trajectory_controller's rules; the simulated controller."""

from dataclasses import replace

import numpy as np
import pytest
import robots

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.joint_trajectory_controller import JointTrajectoryController
from vla_nodes.control.trajectory import Trajectory, refusal, sample

NAMES = ("a", "b")
GOOD = Trajectory(
    NAMES,
    np.array([0.1, 0.2, 0.4]),
    np.array([[0.0, 1.0], [0.5, 1.0], [1.0, 0.0]]),
    np.array([[0.0, 0.0], [3.0, -2.0], [0.0, 0.0]]),
    np.zeros((3, 2)),
    stamp=10.0,
)
NAN = np.array([[0.0, 1.0], [np.nan, 1.0], [1.0, 0.0]])


JOINTS = tuple("abcdefg")


@pytest.mark.parametrize(
    ("change", "now", "word"),
    [
        ({}, 10.3, None),
        ({"stamp": 0.0}, 1e9, None),  # stamp zero starts on receipt
        ({"velocities": None, "accelerations": None}, 10.3, None),
        ({"joint_names": ("b", "a")}, 10.3, None),
        ({}, 10.41, "past"),
        ({"joint_names": ()}, 10.0, "no joint names"),
        ({"joint_names": ("a",)}, 10.0, "partial"),
        ({"joint_names": ("a", "c")}, 10.0, "unknown joint c"),
        ({"joint_names": ("a", "a")}, 10.0, "twice"),
        ({"times": np.array([0.1, 0.1, 0.4])}, 10.0, "strictly increasing"),
        ({"times": np.array([])}, 10.0, "no points"),
        ({"times": np.array([0.1, 0.2])}, 10.0, "shape"),
        ({"times": np.array([0.1, 0.2, np.inf])}, 10.0, "non-finite"),
        ({"positions": np.zeros((3, 3))}, 10.0, "positions have shape"),
        ({"velocities": np.zeros((2, 2))}, 10.0, "velocities have shape"),
        ({"velocities": np.array([[0, 0], [0, 0], [0, 1e-6]])}, 10.0, "joint b, must be zero"),
        ({"velocities": np.array([[0, 0], [0, 0], [0, 1e-8]])}, 10.0, None),  # below float epsilon
        ({"positions": NAN}, 10.0, "non-finite positions"),
        ({"velocities": np.array([[0, 0], [np.inf, 0], [0, 0]])}, 10.0, "non-finite velocities"),
        ({"velocities": np.array([[0, 0], [0, 0], [0, np.nan]])}, 10.0, "must be zero"),
    ],
)
def test_refusal_restates_the_controller(change, now, word):
    reason = refusal(replace(GOOD, **change), NAMES, now)
    assert reason is None if word is None else word in reason


@pytest.mark.parametrize("fields", ["linear", "cubic", "quintic"])
def test_sample_passes_points_and_differentiates(fields):
    trajectory = {
        "linear": replace(GOOD, velocities=None, accelerations=None),
        "cubic": replace(GOOD, accelerations=None),
        "quintic": GOOD,
    }[fields]
    q, qd, qdd = sample(trajectory, trajectory.times)
    np.testing.assert_allclose(q, GOOD.positions, atol=1e-12)
    if fields != "linear":
        np.testing.assert_allclose(qd, GOOD.velocities, atol=1e-12)
    t, step = np.array([0.13, 0.25, 0.37]), 1e-6
    before, after = sample(trajectory, t - step), sample(trajectory, t + step)
    np.testing.assert_allclose((after[0] - before[0]) / (2 * step), sample(trajectory, t)[1], atol=1e-6)
    np.testing.assert_allclose((after[1] - before[1]) / (2 * step), sample(trajectory, t)[2], atol=1e-4)
    np.testing.assert_allclose(sample(trajectory, 9.0)[0], GOOD.positions[-1])
    assert not np.any(sample(trajectory, 9.0)[1])


def test_quintic_reproduces_a_quintic():
    poly = np.polynomial.Polynomial([0.3, -0.2, 0.5, 1.0, -2.0, 0.7])
    t = np.array([0.0, 0.3, 0.7])
    values = [poly.deriv(k)(t)[:, None] if k else poly(t)[:, None] for k in range(3)]
    q, qd, qdd = sample(Trajectory(("a",), t, *values), np.linspace(0, 0.69, 50))
    x = np.linspace(0, 0.69, 50)
    np.testing.assert_allclose(q[:, 0], poly(x), atol=1e-13)
    np.testing.assert_allclose(qd[:, 0], poly.deriv(1)(x), atol=1e-12)
    np.testing.assert_allclose(qdd[:, 0], poly.deriv(2)(x), atol=1e-11)


def test_controller_needs_a_state_then_holds():
    controller = JointTrajectoryController(NAMES)
    with pytest.raises(RuntimeError, match="hold"):
        controller.reference(0.0)
    controller.hold(np.array([0.1, 0.2]))
    q, qd = controller.reference(5.0)
    np.testing.assert_allclose(q, [0.1, 0.2])
    assert not qd.any()


def test_controller_past_stamp_starts_in_the_segment_containing_now():
    controller = JointTrajectoryController(NAMES)
    controller.hold(np.zeros(2))
    assert controller.accept(GOOD, 10.25, np.zeros(2), np.zeros(2)) is None
    np.testing.assert_allclose(controller.reference(10.25)[0], sample(GOOD, 0.25)[0], atol=1e-12)
    np.testing.assert_allclose(controller.reference(11.0)[0], GOOD.positions[-1])


@pytest.mark.parametrize("desired", [False, True])
def test_controller_before_the_first_point(desired):
    controller = JointTrajectoryController(NAMES, interpolate_from_desired_state=desired)
    controller.hold(np.array([0.3, 0.3]))
    measured = np.array([0.2, 0.4])
    assert controller.accept(replace(GOOD, stamp=0.0), 7.0, measured, np.zeros(2)) is None
    np.testing.assert_allclose(controller.reference(7.0)[0], [0.3, 0.3] if desired else measured)
    np.testing.assert_allclose(controller.reference(7.1)[0], GOOD.positions[0], atol=1e-9)


def test_controller_refusal_keeps_what_is_in_flight_and_order_is_by_name():
    controller = JointTrajectoryController(NAMES)
    controller.hold(np.zeros(2))
    swapped = Trajectory(("b", "a"), GOOD.times, GOOD.positions[:, ::-1], GOOD.velocities[:, ::-1], None, 10.0)
    assert controller.accept(swapped, 10.0, np.zeros(2), np.zeros(2)) is None
    expected = controller.reference(10.3)[0]
    assert "past" in controller.accept(replace(GOOD, positions=GOOD.positions + 1), 10.5, np.zeros(2), np.zeros(2))
    np.testing.assert_allclose(controller.reference(10.3)[0], expected)
    np.testing.assert_allclose(expected, sample(replace(GOOD, accelerations=None), 0.3)[0])


def test_controller_one_point_jumps_as_the_stock_one_does():
    controller = JointTrajectoryController(NAMES)
    controller.hold(np.zeros(2))
    jump = Trajectory(NAMES, np.array([0.0]), np.array([[1.0, 1.0]]))
    assert controller.accept(jump, 3.0, np.zeros(2), np.zeros(2)) is None
    np.testing.assert_allclose(controller.reference(3.0)[0], [1.0, 1.0])


@pytest.mark.parametrize(
    ("space", "shape", "word"),
    [
        ("ee_delta", (16, 7), None),
        ("ee_pose", (1, 8), None),
        ("joint_delta", (16, 8), None),
        ("joint_position", (16, 8), None),
        ("joint_position", (16, 7), "8 columns"),
        ("ee_delta", (16, 6), "7 columns"),
        ("ee_delta", (0, 7), "non-empty"),
        ("ee_delta", (7,), "H x D"),
        ("ee_delta", (10_000, 7), "exceed"),
    ],
)
def test_chunk_problem(space, shape, word):
    reason = ActionChunk(1.0, "x", 0.1, ActionSpace(space), np.full(shape, 0.5), robots.GRIPPER).problem(
        JOINTS, robots.GRIPPER
    )
    assert reason is None if word is None else word in reason


def test_chunk_problem_numbers():
    chunk = ActionChunk(1.0, "x", 0.1, ActionSpace.EE_DELTA, np.zeros((4, 7)), robots.GRIPPER)
    bad = chunk.actions.copy()
    bad[2, 3] = np.nan
    assert "1 of 28" in replace(chunk, actions=bad).problem(JOINTS, robots.GRIPPER)
    assert "period" in replace(chunk, period=0.0).problem(JOINTS, robots.GRIPPER)
    assert "stamp" in replace(chunk, stamp=np.inf).problem(JOINTS, robots.GRIPPER)

"""Conversions between the fields of ROS messages and the ROS-free types of control and pipeline.

Functions take any object with the fields of the ROS message, so that a node's message and one read from a bag go
through the same code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vla_nodes.control.chunk import MAX_COLUMNS, MAX_ROWS, ActionChunk, ActionSpace
from vla_nodes.control.trajectory import Trajectory
from vla_nodes.poses import matrix_from

if TYPE_CHECKING:
    from vla_nodes.control.robot import RobotModel
    from vla_nodes.policy.contract import Actions

MAX_POINTS = 4096
"""Most points of a JointTrajectory taken."""
MAX_REASON = 500
"""Most characters of a reason in a status."""


def seconds(stamp: Any) -> float:
    """Stamp or duration in s."""
    return stamp.sec + stamp.nanosec * 1e-9


def pose_matrix(message: Any) -> np.ndarray:
    """Pose to a (4, 4) matrix. ValueError: the quaternion is not of unit length (to 1 %), or a number is not finite."""
    p, o = message.position, message.orientation
    return matrix_from([p.x, p.y, p.z, o.x, o.y, o.z, o.w])


def trajectory_from(message: Any) -> Trajectory:
    """JointTrajectory to a Trajectory.

    Raises:
        ValueError: what a Trajectory cannot hold and the controller refuses as well: points of unequal length, a field
            given for some points only, efforts, or more than `MAX_POINTS` points.
    """
    points = message.points
    if len(points) > MAX_POINTS:
        raise ValueError(f"{len(points)} points, at most {MAX_POINTS} are accepted")
    if any(len(point.effort) for point in points):
        raise ValueError("effort given, but the controller has no effort interface")
    table = {}
    for field in ("positions", "velocities", "accelerations"):
        rows = [getattr(point, field) for point in points]
        lengths = {len(row) for row in rows}
        if len(lengths) > 1:
            raise ValueError(f"{field} have {min(lengths)} to {max(lengths)} values: every point needs one per joint")
        table[field] = np.array(rows, dtype=float).reshape(len(rows), -1) if lengths and lengths != {0} else None
    positions = table["positions"] if table["positions"] is not None else np.zeros((len(points), 0))
    return Trajectory(
        tuple(message.joint_names),
        np.array([seconds(point.time_from_start) for point in points]),
        positions,
        table["velocities"],
        table["accelerations"],
        seconds(message.header.stamp),
    )


def chunk_from(message: Any, robot: RobotModel) -> ActionChunk:
    """ActionChunk message to chunk, its columns in control's order. ValueError where it contradicts itself, or names a
    space that does not exist, or columns, grippers or a frame that are not this robot's. Names and frame may be left
    out where the space says them."""
    rows, columns = message.horizon, message.dim
    if not (1 <= rows <= MAX_ROWS and 1 <= columns <= MAX_COLUMNS):
        raise ValueError(f"chunk of {rows} x {columns} actions: 1 x 1 to {MAX_ROWS} x {MAX_COLUMNS} are accepted")
    if len(message.actions) != rows * columns:
        raise ValueError(f"chunk says {rows} x {columns} but carries {len(message.actions)} actions")
    try:
        space = ActionSpace(message.action_space)
    except ValueError:
        known = ", ".join(s.value for s in ActionSpace)
        raise ValueError(f"action_space {message.action_space[:40]!r} is none of {known}") from None
    names, grippers = tuple(message.names), tuple(message.grippers)
    if foreign := [name for name in grippers if name not in robot.gripper_names]:
        raise ValueError(f"no gripper {foreign[0][:40]!r}: the robot has {', '.join(robot.gripper_names) or 'none'}")
    expected = (*space.columns(robot.joint_names), *grippers)
    if not names and space.cartesian:
        names = expected
    if sorted(names) != sorted(expected):
        given = ", ".join(names)[:200] or "none"
        raise ValueError(f"{space.value} has the columns {', '.join(expected)}, each once; named are {given!r}")
    if len(names) != columns:
        raise ValueError(f"chunk of {columns} columns names {len(names)}: {', '.join(names)[:200]}")
    frame = message.header.frame_id
    if frame and space.cartesian and frame not in robot.base_frames:
        raise ValueError(f"chunk is in frame {frame[:40]!r}, the arm's base is {' or '.join(robot.base_frames)}")
    actions = np.frombuffer(message.actions, dtype=np.float32).astype(float).reshape(rows, columns)
    if names != expected:
        actions = actions[:, [names.index(name) for name in expected]]
    return ActionChunk(seconds(message.header.stamp), message.instruction, message.period, space, actions, grippers)


def chunk_fields(contract: Actions, instruction: str, actions: np.ndarray) -> dict[str, Any]:
    """Fields of the ActionChunk message, but header, for actions (H, D) of a policy with this contract; its actions are
    a flat float32 array."""
    rows = np.ascontiguousarray(actions, dtype=np.float32)
    return {
        "instruction": instruction,
        "period": contract.period,
        "action_space": contract.space,
        "names": list(contract.columns),
        "grippers": list(contract.grippers),
        "horizon": rows.shape[0],
        "dim": rows.shape[1],
        "actions": rows.reshape(-1),
    }


def status_fields(core: Any) -> dict[str, Any]:
    """Fields of PolicyStatus that a PolicyCore knows; "target" is (3,) m, "stamp" s or None before the first result."""
    output = core.output
    latency, p50, p99 = core.latencies()
    return {
        "state": int(core.state),
        "reason": core.reason[:MAX_REASON],
        "instruction": core.instruction,
        "primitive": "" if output is None else output.primitive,
        "grounding": 0.0 if output is None else float(output.feasibility),
        "target": np.full(3, np.nan) if output is None else np.asarray(output.target, dtype=float),
        "latency_ms": latency,
        "latency_p50_ms": p50,
        "latency_p99_ms": p99,
        "observation_age": core.age(),
        "ticks": core.ticks,
        "stamp": core.output_stamp,
    }

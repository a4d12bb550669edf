"""What messages say, in the cores' types, and what the cores say, in messages' fields.

Functions take any object with the fields of the ROS message, so that a node's message and one read from a bag go
through the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_nodes.control.chunk import MAX_COLUMNS, MAX_ROWS, ActionChunk, ActionSpace
from vla_nodes.control.trajectory import Trajectory

if TYPE_CHECKING:
    from vla_nodes.control.robot import RobotModel

MAX_POINTS = 4096
"""Most points of a JointTrajectory taken."""
MAX_REASON = 500
"""Most characters of a reason in a status."""
COLUMNS = {
    ActionSpace.EE_DELTA: ("dx", "dy", "dz", "rx", "ry", "rz", "gripper"),
    ActionSpace.EE_POSE: ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper"),
}


def seconds(stamp: Any) -> float:
    """Stamp or duration in s."""
    return stamp.sec + stamp.nanosec * 1e-9


def pose_matrix(message: Any) -> np.ndarray:
    """Pose to a (4, 4) matrix. ValueError if the quaternion is not of unit length (to 1 %) or something not finite."""
    p, o = message.position, message.orientation
    return matrix_from([p.x, p.y, p.z, o.x, o.y, o.z, o.w])


def matrix_from(values: Sequence[float]) -> np.ndarray:
    """x y z (m) qx qy qz qw to a (4, 4) matrix; ValueError as `pose_matrix`."""
    v = np.asarray(values, dtype=float)
    if v.shape != (7,):
        raise ValueError(f"a pose is 7 numbers x y z qx qy qz qw, got {v.size}")
    norm = np.linalg.norm(v[3:])
    if not np.isfinite(v).all() or abs(norm - 1) > 0.01:
        raise ValueError(f"pose {np.round(v, 4).tolist()} has no unit quaternion (qx qy qz qw of length {norm:.3g})")
    x, y, z, w = v[3:] / norm
    out = np.eye(4)
    out[:3, 3] = v[:3]
    out[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return out


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """(3, 3) rotation to (qx, qy, qz, qw), qw >= 0 (Shepperd's method: the largest component first)."""
    r = rotation
    squares = np.array([r[0, 0], r[1, 1], r[2, 2], np.trace(r)])
    i = int(np.argmax(squares))
    q = np.empty(4)
    if i == 3:
        q[:] = r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], 1 + squares[3]
    else:
        j, k = (i + 1) % 3, (i + 2) % 3
        q[i] = 1 + r[i, i] - r[j, j] - r[k, k]
        q[j] = r[j, i] + r[i, j]
        q[k] = r[k, i] + r[i, k]
        q[3] = r[k, j] - r[j, k]
    q /= np.linalg.norm(q)
    return -q if q[3] < 0 else q


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
    """ActionChunk message to chunk. ValueError where it contradicts itself, or names a space that does not exist, or
    columns or a frame that are not this robot's. Names and frame may be left out where the space says them."""
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
    names, expected = tuple(message.names), COLUMNS.get(space, (*robot.joint_names, "gripper"))
    if names != expected and (names or space not in COLUMNS):
        given = ", ".join(names)[:200] or "none"
        raise ValueError(f"{space.value} has the columns {', '.join(expected)}, in this order; named are {given!r}")
    frame = message.header.frame_id
    if frame and space in COLUMNS and frame not in robot.base_frames:
        raise ValueError(f"chunk is in frame {frame[:40]!r}, the arm's base is {' or '.join(robot.base_frames)}")
    actions = np.frombuffer(message.actions, dtype=np.float32).astype(float).reshape(rows, columns)
    return ActionChunk(seconds(message.header.stamp), message.instruction, message.period, space, actions)


def chunk_fields(config: Any, instruction: str, actions: np.ndarray) -> dict[str, Any]:
    """Fields of the ActionChunk message, but header, for actions (H, D) of a policy; its actions are a flat
    float32 array."""
    space = ActionSpace(config.action_space)
    rows = np.ascontiguousarray(actions, dtype=np.float32)
    return {
        "instruction": instruction,
        "period": config.period,
        "action_space": space.value,
        "names": list(COLUMNS.get(space, (*config.joint_names, "gripper"))),
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
        "grounding": 0.0 if output is None else float(output.grounding),
        "target": np.full(3, np.nan) if output is None else np.asarray(output.target, dtype=float),
        "latency_ms": latency,
        "latency_p50_ms": p50,
        "latency_p99_ms": p99,
        "observation_age": core.age(),
        "ticks": core.ticks,
        "stamp": core.output_stamp,
    }

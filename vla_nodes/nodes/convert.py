"""Messages to the cores' types and back. Arrays travel as array.array, which rclpy copies in one go."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import Pose
from sensor_msgs.msg import CameraInfo, Image
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vla_nodes.control.trajectory import Trajectory

MAX_POINTS = 4096
"""Most points of a JointTrajectory taken."""


def seconds(stamp: Time | Duration) -> float:
    """Stamp or duration in s."""
    return stamp.sec + stamp.nanosec * 1e-9


def to_time(t: float) -> Time:
    """s to a stamp, to the nearest nanosecond."""
    nanoseconds = round(t * 1e9)
    return Time(sec=nanoseconds // 1_000_000_000, nanosec=nanoseconds % 1_000_000_000)


def to_duration(t: float) -> Duration:
    nanoseconds = round(t * 1e9)
    return Duration(sec=nanoseconds // 1_000_000_000, nanosec=nanoseconds % 1_000_000_000)


def image(pixels: np.ndarray, encoding: str, stamp: Time, frame: str, step: int = 0, width: int = 0) -> Image:
    """(H, W[, C]) array, or flat bytes with `step` and `width`, to an Image."""
    data = array("B")
    if step:
        data.frombytes(pixels)
        height = len(data) // step
    else:
        pixels = np.ascontiguousarray(pixels)
        data.frombytes(memoryview(pixels).cast("B"))
        height, width, step = pixels.shape[0], pixels.shape[1], pixels.strides[0]
    message = Image(height=height, width=width, step=step, encoding=encoding, is_bigendian=0, data=data)
    message.header.stamp = stamp
    message.header.frame_id = frame
    return message


def camera_info(k: np.ndarray, width: int, height: int, stamp: Time, frame: str) -> CameraInfo:
    """CameraInfo of a rectified pinhole: k (3, 3), no distortion."""
    message = CameraInfo(width=width, height=height, distortion_model="plumb_bob", d=[0.0] * 5)
    message.k = k.reshape(9)
    message.r = np.eye(3).reshape(9)
    message.p = np.hstack([k, np.zeros((3, 1))]).reshape(12)
    message.header.stamp = stamp
    message.header.frame_id = frame
    return message


def pose(matrix: np.ndarray) -> Pose:
    """(4, 4) homogeneous matrix to a Pose."""
    message = Pose()
    p, o = message.position, message.orientation
    p.x, p.y, p.z = (float(v) for v in matrix[:3, 3])
    o.x, o.y, o.z, o.w = (float(v) for v in quaternion(matrix[:3, :3]))
    return message


def pose_matrix(message: Pose) -> np.ndarray:
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


def trajectory_message(trajectory: Trajectory) -> JointTrajectory:
    """Trajectory to a JointTrajectory."""
    message = JointTrajectory(joint_names=list(trajectory.joint_names))
    message.header.stamp = to_time(trajectory.stamp)
    fields = [("positions", trajectory.positions), ("velocities", trajectory.velocities)]
    fields.append(("accelerations", trajectory.accelerations))
    for index, t in enumerate(trajectory.times):
        point = JointTrajectoryPoint(time_from_start=to_duration(float(t)))
        for name, values in fields:
            if values is not None:
                setattr(point, name, array("d", values[index].tobytes()))
        message.points.append(point)
    return message


def trajectory_from(message: JointTrajectory) -> Trajectory:
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

"""The cores' types to messages; messages/convert.py is the way back. Arrays travel as array.array: rclpy copies those
in one go."""

from __future__ import annotations

from array import array

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import Pose
from sensor_msgs.msg import CameraInfo, Image
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vla_nodes.control.trajectory import Trajectory
from vla_nodes.msg import PolicyStatus
from vla_nodes.poses import quaternion


def to_time(t: float) -> Time:
    """s to a stamp, to the nearest nanosecond."""
    nanoseconds = round(t * 1e9)
    return Time(sec=nanoseconds // 1_000_000_000, nanosec=nanoseconds % 1_000_000_000)


def to_duration(t: float) -> Duration:
    nanoseconds = round(t * 1e9)
    return Duration(sec=nanoseconds // 1_000_000_000, nanosec=nanoseconds % 1_000_000_000)


def image(
    pixels: np.ndarray | memoryview, encoding: str, stamp: Time, frame: str, step: int = 0, width: int = 0
) -> Image:
    """(H, W[, C]) array, or flat bytes with `step` and `width`, to an Image."""
    data = array("B")
    if step:
        data.frombytes(pixels)
        height = len(data) // step
    else:
        whole = np.ascontiguousarray(pixels)
        data.frombytes(memoryview(whole).cast("B"))
        height, width, step = whole.shape[0], whole.shape[1], whole.strides[0]
    message = Image(height=height, width=width, step=step, encoding=encoding, is_bigendian=0, data=data)
    message.header.stamp = stamp
    message.header.frame_id = frame
    return message


def status_key(message: PolicyStatus) -> str:
    """The part of a vla/status that action_node acts upon, to compare what was sent with what was received."""
    return f"{message.state} {message.reason}"


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

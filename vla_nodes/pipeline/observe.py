"""From paired messages to what the policy sees: decoding, calibration, kinematics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vla_nodes.control.robot import RobotModel
from vla_nodes.messages.images import decode_color, decode_compressed_color, decode_compressed_depth, decode_depth
from vla_nodes.messages.sync import Pair

if TYPE_CHECKING:
    from vla_nodes.policy.runtime import Observation


def observation(pair: Pair, camera_pose: np.ndarray, robot: RobotModel) -> Observation:
    """The policy's view of one instant.

    Args:
        pair: Image (or CompressedImage) and CameraInfo messages, and joints in the order of the robot's, gripper last.
        camera_pose: (4, 4) colour optical frame in base.

    Raises:
        ValueError: an image that cannot be decoded, or a camera_info that does not fit it or is not calibrated.
    """
    from vla_nodes.policy.runtime import Observation  # torch takes seconds to import: only where it is used

    info, joints = pair.info, pair.joints
    rgb = color_pixels(pair.color)
    if (info.width, info.height) != (rgb.shape[1], rgb.shape[0]):
        raise ValueError(
            f"camera_info is for {info.width}x{info.height} pixels, the image has {rgb.shape[1]}x{rgb.shape[0]}"
        )
    intrinsics = np.asarray(info.k, dtype=float).reshape(3, 3)
    if not (intrinsics[0, 0] > 0 and intrinsics[1, 1] > 0):
        raise ValueError("camera_info has no focal length (k is zero): the camera is not calibrated")
    arm = robot.dof
    return Observation(
        stamp=pair.stamp,
        color=rgb if rgb.flags.writeable else rgb.copy(),  # torch warns of arrays that it could not write to
        depth=None if pair.depth is None else depth_metres(pair.depth),
        intrinsics=intrinsics,
        camera_pose=camera_pose,
        joint_positions=joints.position[:arm],
        joint_velocities=joints.velocity[:arm],
        gripper=float(robot.gripper.opening(joints.position[arm])),
        ee_pose=robot.forward(joints.position[:arm]),
    )


def color_pixels(message: Any) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an Image or a CompressedImage. ImageError names what is wrong with it."""
    m = message
    if not hasattr(m, "encoding"):
        return decode_compressed_color(m.data, m.format)
    return decode_color(m.data, m.height, m.width, m.step, m.encoding, m.is_bigendian)


def depth_metres(message: Any) -> np.ndarray:
    """(H, W) float32 m, 0 = no reading, of an Image or a compressedDepth CompressedImage. ImageError as above."""
    m = message
    if not hasattr(m, "encoding"):
        return decode_compressed_depth(m.data, m.format)
    return decode_depth(m.data, m.height, m.width, m.step, m.encoding, m.is_bigendian)

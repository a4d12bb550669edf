"""From paired messages to what the policy sees: decoding, calibration, kinematics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla_nodes.control.robot import RobotModel
from vla_nodes.messages.images import decode_color, decode_compressed_color, decode_compressed_depth, decode_depth
from vla_nodes.messages.sync import Frame, Pair
from vla_nodes.policy.processing import CameraImage, Observation


def observation(pair: Pair, camera_poses: Mapping[str, np.ndarray | None], robot: RobotModel) -> Observation:
    """The policy's view of one instant.

    Args:
        pair: Image (or CompressedImage) and CameraInfo messages, and joints in the order of the robot's: the arm's,
            then the grippers'.
        camera_poses: by camera, T_base_camera (4, 4) of its colour optical frame, None where its pose is not wanted.

    Raises:
        ValueError: an image that cannot be decoded, or a camera_info that does not fit it or is not calibrated.
    """
    joints, arm = pair.joints, robot.dof
    images = {}
    for name, frame in pair.frames.items():
        try:
            images[name] = camera_image(frame, camera_poses[name])
        except ValueError as error:
            raise ValueError(f"camera {name}: {error}" if len(pair.frames) > 1 else str(error)) from error
    openings = [float(g.opening(joints.position[arm + i])) for i, g in enumerate(robot.grippers)]
    return Observation(
        stamp=pair.stamp,
        cameras=images,
        joint_positions=joints.position[:arm],
        joint_velocities=joints.velocity[:arm],
        grippers=np.array(openings),
        tool_pose=robot.forward(joints.position[:arm]),
    )


def camera_image(frame: Frame, pose: np.ndarray | None) -> CameraImage:
    """One camera's messages, decoded; pose: T_base_camera. ValueError as `observation`."""
    rgb, intrinsics = color_pixels(frame.color), None
    if (info := frame.info) is not None:
        if (info.width, info.height) != (rgb.shape[1], rgb.shape[0]):
            raise ValueError(
                f"camera_info is for {info.width}x{info.height} pixels, the image has {rgb.shape[1]}x{rgb.shape[0]}"
            )
        intrinsics = np.asarray(info.k, dtype=float).reshape(3, 3)
        if not (intrinsics[0, 0] > 0 and intrinsics[1, 1] > 0):
            raise ValueError("camera_info has no focal length (k is zero): the camera is not calibrated")
    return CameraImage(
        color=rgb if rgb.flags.writeable else rgb.copy(),  # torch warns of arrays that it could not write to
        depth=None if frame.depth is None else depth_metres(frame.depth),
        intrinsics=intrinsics,
        pose=pose,
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

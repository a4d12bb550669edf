"""What a policy sees at one instant, and how its images come to the network's size.

No torch here: whoever prepares observations (nodes, replay, simulation, training data) starts without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass
class CameraImage:
    """One camera's share of an observation. What the contract does not ask of this camera may be None."""

    color: np.ndarray  # (H, W, 3) uint8 RGB
    depth: np.ndarray | None = None  # (H, W) float32 m, 0 or NaN invalid, aligned to colour
    intrinsics: np.ndarray | None = None  # (3, 3) K of the colour image
    pose: np.ndarray | None = None  # T_base_camera, (4, 4): the colour optical frame in the base frame


@dataclass
class Observation:
    """One instant of the robot, in the order of its contract."""

    stamp: float  # s, exposure time of the first camera's colour image
    cameras: dict[str, CameraImage]  # by the contract's names
    joint_positions: np.ndarray  # (J,) rad
    joint_velocities: np.ndarray  # (J,) rad/s
    grippers: np.ndarray  # (G,) openings, 0 closed .. 1 open
    tool_pose: np.ndarray  # T_base_tool, (4, 4)


def square(
    color: np.ndarray, depth: np.ndarray | None, intrinsics: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """The middle square of an image, resized to (size, size), as the network sees it; K (3, 3) float32 to match.

    Everything that feeds the network goes through here: nodes, replay, and the training data made from recordings.
    """
    height, width = color.shape[:2]
    intrinsics = np.array(intrinsics, np.float32)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if height != width:
        color = color[top : top + side, left : left + side]
        depth = None if depth is None else depth[top : top + side, left : left + side]
        intrinsics[0, 2] -= left
        intrinsics[1, 2] -= top
    if side != size:
        scale = size / side
        color = cv2.resize(color, (size, size), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        depth = None if depth is None else cv2.resize(depth, (size, size), interpolation=cv2.INTER_NEAREST)
        intrinsics[0, 2], intrinsics[1, 2] = ((intrinsics[i, 2] + 0.5) * scale - 0.5 for i in (0, 1))
        intrinsics[0, 0] *= scale
        intrinsics[1, 1] *= scale
    return color, depth, intrinsics

"""What a policy sees at one instant, and how it is brought to what the network takes.

No torch here: whoever prepares observations (nodes, replay, simulation, training data) starts without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np

from vla_nodes.policy.contract import Contract, StateVector

MAX_GAP = 0.5  # s between observations beyond which the change since the last one means nothing


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
    vectors: dict[str, np.ndarray] = field(default_factory=dict)  # further measurements, by the contract's names


class StateLayout:
    """Which state vectors a contract's tokens hold, and where.

    sizes: {token: numbers in it}, in the order in which the tokens enter the network; where: {vector: (token, first,
    behind the last)}.
    """

    def __init__(self, contract: Contract) -> None:
        self.vectors: dict[str, list[StateVector]] = {}
        self.where: dict[str, tuple[str, int, int]] = {}
        for vector in contract.state:
            self.vectors.setdefault(vector.token, []).append(vector)
        self.sizes = {token: sum(v.size for v in vectors) for token, vectors in self.vectors.items()}
        for token, vectors in self.vectors.items():
            first = 0
            for vector in vectors:
                self.where[vector.name] = (token, first, first + vector.size)
                first += vector.size

    def tokens(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{token: (..., size) float32} of {vector: (..., size)}, offset and scaled as the contract says.

        Raises:
            ValueError: a vector is missing, or of another size.
        """
        found = {}
        for token, vectors in self.vectors.items():
            parts = []
            for vector in vectors:
                if vector.name not in values:
                    raise ValueError(f"state vector {vector.name} is missing: the policy was trained with it")
                value = np.asarray(values[vector.name], np.float32)
                if value.shape[-1:] != (vector.size,):
                    raise ValueError(f"state vector {vector.name} has {value.shape[-1:]} numbers, not {vector.size}")
                parts.append((value - np.asarray(vector.offset, np.float32)) / np.asarray(vector.scale, np.float32))
            found[token] = np.concatenate(parts, -1)
        return found


def state_vectors(observation: Observation, previous: Observation | None) -> dict[str, np.ndarray]:
    """The vectors that a contract may name, of an observation and the one before it (None: nothing has moved)."""
    now, gap = observation, observation.stamp - previous.stamp if previous is not None else 0.0
    if previous is not None and 1e-3 < gap <= MAX_GAP:
        tool_velocity = (now.tool_pose[:3, 3] - previous.tool_pose[:3, 3]) / gap
        gripper_velocity = (np.asarray(now.grippers, float) - np.asarray(previous.grippers, float)) / gap
    else:
        tool_velocity, gripper_velocity = np.zeros(3), np.zeros(len(now.grippers))
    return {
        "joint_positions": now.joint_positions,
        "joint_velocities": now.joint_velocities,
        "gripper": now.grippers,
        "gripper_velocity": gripper_velocity,
        "tool_velocity": tool_velocity,
        **tool_vectors(now.tool_pose),
        **now.vectors,
    }


def tool_vectors(tool_pose: np.ndarray) -> dict[str, np.ndarray]:
    """tool_position (..., 3) and tool_rotation (..., 6), the first two columns of the rotation, of T_base_tool."""
    rotation = np.moveaxis(tool_pose[..., :3, :2], -1, -2)
    return {"tool_position": tool_pose[..., :3, 3], "tool_rotation": rotation.reshape(*rotation.shape[:-2], 6)}


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

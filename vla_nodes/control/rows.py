"""A chunk's rows as joint positions, whatever space the policy acts in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.inverse_kinematics import IkSettings
from vla_nodes.control.robot import RobotModel
from vla_nodes.poses import quaternion_matrix, rotation_matrix


@dataclass(frozen=True)
class JointRows:
    """q: (H, J) rad within the joint limits; tool: (H, 3) m, the tool's wanted positions in base; openings: (H, G) of
    the chunk's grippers, 0..1; clipped: how many rows asked for joints outside their limits; reachable: how many
    leading rows the arm can reach; short: m, position error of the first row beyond."""

    q: np.ndarray
    tool: np.ndarray
    openings: np.ndarray
    clipped: int
    reachable: int
    short: float


def tool_targets(chunk: ActionChunk, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wanted tool positions (H, 3) m and rotations (H, 3, 3) in base of an ee chunk; pose: (4, 4) at the stamp."""
    a = chunk.motion
    if chunk.action_space is ActionSpace.EE_POSE:
        return a[:, :3], quaternion_matrix(a[:, 3:7])
    positions = pose[:3, 3] + np.cumsum(a[:, :3], axis=0)
    rotations, reach = rotation_matrix(a[:, 3:6]), 1
    while reach < len(rotations):  # increments in base axes apply on the left; row k holds the last `reach` of them
        rotations[reach:] = rotations[reach:] @ rotations[:-reach]
        reach *= 2
    return positions, rotations @ pose[:3, :3]


def joint_rows(
    robot: RobotModel,
    chunk: ActionChunk,
    measured: np.ndarray,
    ik: IkSettings,
    unreachable: float,
    guess: np.ndarray | None,
) -> JointRows:
    """Rows in joint space for a chunk whose observation saw the joints at `measured` (J,).

    Args: guess: (H, J) or None, a first guess for the inverse kinematics; unreachable: m (and 5 times that in rad).
    """
    openings = np.minimum(np.maximum(chunk.openings, 0.0), 1.0)
    low, high = robot.lower + ik.margin, robot.upper - ik.margin
    if chunk.action_space in (ActionSpace.JOINT_DELTA, ActionSpace.JOINT_POSITION):
        q = chunk.motion
        if chunk.action_space is ActionSpace.JOINT_DELTA:
            q = measured + np.cumsum(q, axis=0)
        inside = np.clip(q, low, high)
        clipped = int(np.count_nonzero(np.any(np.abs(q - inside) > ik.margin, axis=1)))
        return JointRows(inside, robot.poses(inside)[0], openings, clipped, len(q), 0.0)
    positions, rotations = tool_targets(chunk, robot.forward(measured))
    result = robot.solve(positions, rotations, measured, ik, guess)
    far = np.maximum(result.position_error, result.rotation_error / 5.0) > unreachable
    reachable = int(np.argmax(far)) if far.any() else len(far)
    short = float(result.position_error[reachable]) if far.any() else 0.0
    at_limit = np.any((result.q <= low + 1e-9) | (result.q >= high - 1e-9), axis=1)
    clipped = int(np.count_nonzero(at_limit & (result.position_error > 1e-3)))
    return JointRows(result.q, positions, openings, clipped, reachable, short)

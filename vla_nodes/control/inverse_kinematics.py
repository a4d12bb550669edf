"""Inverse kinematics of a whole chunk at once: damped least squares on Pinocchio's Jacobians.

All H rows are refined together from the same seed (Newton steps with batched 6 x 6 solves), so the result is a
smooth function of the target row by row and costs a few hundred microseconds; a QP per row (pink) costs more than
the executor's whole budget. The equations, per row with error e = [p* - p; log(R* R^T)] in base axes:

    dq = J^T (J J^T + lambda^2 I)^-1 (e - J dq0) + dq0,     dq0 = posture - q

dq0 moves along the null space towards a posture that drifts from the seed to the rest pose (Siciliano et al.,
Robotics, 2009, section 3.5); lambda rises near singularities (Nakamura and Hanafusa, 1986). Joints at a limit that
would be pushed further are frozen for the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vla_nodes.control.robot import RobotModel


@dataclass(frozen=True)
class IkSettings:
    """iterations: most Newton steps; tolerance: m and rad at which they stop; damping, manipulability: lambda's
    largest value and the sqrt(det(J J^T)) below which it rises; posture: share of the way to the rest pose the
    null space covers over one chunk; margin: rad kept from joint limits; step: rad, largest joint step at a time."""

    iterations: int = 8
    tolerance: float = 3e-4
    damping: float = 0.08
    manipulability: float = 0.03
    posture: float = 0.1
    margin: float = 0.02
    step: float = 0.35


@dataclass(frozen=True)
class IkResult:
    """q: (H, J) rad; position_error: (H,) m; rotation_error: (H,) rad, what is left of each target."""

    q: np.ndarray
    position_error: np.ndarray
    rotation_error: np.ndarray


def solve(
    robot: RobotModel,
    positions: np.ndarray,
    rotations: np.ndarray,
    seed: np.ndarray,
    settings: IkSettings,
    guess: np.ndarray | None = None,
) -> IkResult:
    """Joint positions that bring the tool to each pose.

    Args: positions (H, 3) m and rotations (H, 3, 3) of the tool in base; seed: (J,) rad, where the sequence starts;
    guess: (H, J) rad, a first guess such as the previous chunk's solution (saves iterations).
    """
    rows = len(positions)
    low, high = robot.lower + settings.margin, robot.upper - settings.margin
    share = settings.posture * (np.arange(1, rows + 1) / rows)[:, None]
    posture = seed + share * (robot.rest - seed)
    same = guess is None  # all rows start at the seed: one evaluation serves them all
    q = np.minimum(np.maximum(np.repeat(seed[None], rows, axis=0) if same else guess, low), high)
    eye = np.eye(6)
    for iteration in range(settings.iterations + 1):
        p, r, jacobian = _repeat(robot.kinematics(q[:1]), rows) if same and not iteration else robot.kinematics(q)
        error = np.concatenate([positions - p, rotation_vector(rotations @ r.transpose(0, 2, 1))], axis=1)
        if iteration == settings.iterations or (iteration and np.abs(error).max() < settings.tolerance):
            break
        wanted = posture - q
        # A large error is approached in steps: a full Newton step from far away leaves the linear range.
        length = np.sqrt((error * error).sum(axis=1, keepdims=True))
        if length.max() > 0.6:
            error *= 0.6 / np.maximum(length, 0.6)
        dq = _step(jacobian, error, wanted, settings, eye)
        blocked = ((q <= low) & (dq < 0)) | ((q >= high) & (dq > 0))
        if blocked.any():
            free = ~blocked
            dq = _step(jacobian * free[:, None, :], error, wanted * free, settings, eye) * free
        largest = np.abs(dq).max(axis=1, keepdims=True)
        q = q + dq * np.minimum(1.0, settings.step / np.maximum(largest, 1e-9))
        q = np.minimum(np.maximum(q, low), high)
    squares = error * error
    return IkResult(q, np.sqrt(squares[:, :3].sum(axis=1)), np.sqrt(squares[:, 3:].sum(axis=1)))


def _step(
    jacobian: np.ndarray, error: np.ndarray, wanted: np.ndarray, settings: IkSettings, eye: np.ndarray
) -> np.ndarray:
    gram = jacobian @ jacobian.transpose(0, 2, 1)
    manipulability = np.sqrt(np.maximum(np.linalg.det(gram), 0.0))
    near = np.maximum(0.0, 1.0 - manipulability / settings.manipulability)
    gram = gram + (1e-8 + (settings.damping * near) ** 2)[:, None, None] * eye
    residual = error[:, :, None] - jacobian @ wanted[:, :, None]
    return wanted + (jacobian.transpose(0, 2, 1) @ np.linalg.solve(gram, residual))[:, :, 0]


def _repeat(arrays: tuple[np.ndarray, ...], rows: int) -> tuple[np.ndarray, ...]:
    return tuple(np.repeat(a, rows, axis=0) for a in arrays)


def rotation_vector(rotations: np.ndarray) -> np.ndarray:
    """Rotation vectors (H, 3) rad, 0..pi, of rotation matrices (H, 3, 3)."""
    r = rotations
    flat = r.reshape(-1, 9)
    axis = 0.5 * (flat[:, [7, 2, 3]] - flat[:, [5, 6, 1]])
    sine = np.sqrt((axis * axis).sum(axis=1))
    cosine = 0.5 * (flat[:, 0] + flat[:, 4] + flat[:, 8] - 1.0)
    angle = np.arctan2(sine, cosine)
    vector = axis * np.where(sine > 1e-7, angle / np.maximum(sine, 1e-7), 1.0)[:, None]
    for k in np.flatnonzero(cosine < -0.9999):  # near a half turn the skew part vanishes: use the symmetric part
        column = (r[k] + np.eye(3))[:, np.argmax(np.diag(r[k]))]
        direction = column / np.linalg.norm(column)
        vector[k] = angle[k] * (direction if direction @ axis[k] >= 0 else -direction)
    return vector


def rotation_matrix(vectors: np.ndarray) -> np.ndarray:
    """Rotation matrices (H, 3, 3) of rotation vectors (H, 3) rad (Rodrigues)."""
    angle = np.sqrt((vectors * vectors).sum(axis=1))
    unit = vectors / np.maximum(angle, 1e-12)[:, None]
    k = np.zeros((len(vectors), 9))
    k[:, [7, 2, 3]], k[:, [5, 6, 1]] = unit, -unit
    k = k.reshape(-1, 3, 3)
    return np.eye(3) + np.sin(angle)[:, None, None] * k + (1.0 - np.cos(angle))[:, None, None] * (k @ k)


def quaternion_matrix(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices (H, 3, 3) of quaternions (H, 4) x y z w; they are normalised first (must not be zero)."""
    x, y, z, w = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    return np.stack(
        [
            1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
            2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
            2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
        ],
        axis=1,
    ).reshape(-1, 3, 3)  # fmt: skip

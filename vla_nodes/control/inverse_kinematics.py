"""Inverse kinematics of a whole chunk at once: damped least squares on Pinocchio's Jacobians.

All H rows are refined together from the same seed (Newton steps with batched 6 x 6 inverses), so the result is a
smooth function of the target row by row and costs a few hundred microseconds; a QP per row (pink) costs more than
the executor's whole budget. The equations, per row with error e = [p* - p; log(R* R^T)] in base axes:

    dq = J^T (J J^T + lambda^2 I)^-1 (e - J dq0) + dq0,     dq0 = posture - q

dq0 moves along the null space towards a posture that drifts from the seed to the rest pose (Siciliano et al.,
Robotics, 2009, section 3.5); lambda rises as the smallest singular value of J falls (Maciejewski and Klein, 1988).
Joints at a limit that would be pushed further are frozen for the step. While steps converge well the inverse is
kept for the next one (chord steps): a Jacobian costs more than a pose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vla_nodes.poses import rotation_vector

if TYPE_CHECKING:
    from vla_nodes.control.robot import RobotModel


@dataclass(frozen=True)
class IkSettings:
    """iterations: most steps; tolerance: m and rad at which they stop; damping, singular: lambda's largest value and
    the singular value of J (m and rad per rad) below which it rises; posture: share of the way to the rest pose the
    null space covers over one chunk; margin: rad kept from joint limits; step: rad, largest joint step at a time."""

    iterations: int = 10
    tolerance: float = 3e-4
    damping: float = 0.08
    singular: float = 0.06
    posture: float = 0.1
    margin: float = 0.02
    step: float = 0.35


@dataclass(frozen=True)
class IkResult:
    """q: (H, J) rad; position_error: (H,) m; rotation_error: (H,) rad, what is left of each target: measured, or where
    the last step is known to be far within the tolerance, predicted from the one before."""

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
    q = np.minimum(np.maximum(np.repeat(seed[None], rows, axis=0) if guess is None else guess, low), high)
    before, largest = np.inf, np.inf
    inverse: np.ndarray | None = None
    jacobian: np.ndarray = np.empty(0)  # until the first iteration, which is always fresh
    for iteration in range(settings.iterations + 1):
        fresh = inverse is None or largest > 0.25 * before
        if not fresh:
            p, r = robot.poses(q)
        elif same and not iteration:
            p, r, jacobian = _repeat(robot.kinematics(q[:1]), rows)
        else:
            p, r, jacobian = robot.kinematics(q)
        error = np.empty((rows, 6))
        np.subtract(positions, p, out=error[:, :3])
        error[:, 3:] = rotation_vector(rotations @ r.transpose(0, 2, 1))
        before, largest = largest, float(np.abs(error).max())
        if iteration == settings.iterations or (iteration and largest < settings.tolerance):
            break
        wanted = posture - q
        # A large error is approached in steps: a full Newton step from far away leaves the linear range.
        if largest > 0.3:
            length = np.sqrt((error * error).sum(axis=1, keepdims=True))
            error *= 0.6 / np.maximum(length, 0.6)
        if fresh or inverse is None:
            inverse = _inverse(jacobian, settings)
        dq = _step(jacobian, inverse, error, wanted)
        below, above = q <= low, q >= high
        if below.any() or above.any():
            blocked = (below & (dq < 0)) | (above & (dq > 0))
            if blocked.any():
                free = ~blocked
                kept = jacobian * free[:, None, :]
                dq = _step(kept, _inverse(kept, settings), error, wanted * free) * free
                largest = np.inf  # the kept inverse does not know what is blocked
        length = np.abs(dq)
        if length.max() > settings.step:
            dq *= np.minimum(1.0, settings.step / np.maximum(length.max(axis=1, keepdims=True), 1e-9))
        q = np.minimum(np.maximum(q + dq, low), high)
        # Steps that converge this well leave at most largest * (largest / before) to the next one.
        if not fresh and 16.0 * largest * largest < settings.tolerance * before:
            error *= largest / before
            break
    lengths = np.sqrt((error * error).reshape(-1, 2, 3).sum(axis=2))
    return IkResult(q, lengths[:, 0], lengths[:, 1])


_TINY = 1e-8 * np.eye(6)


def _inverse(jacobian: np.ndarray, settings: IkSettings) -> np.ndarray:
    """J^T (J J^T + lambda^2 I)^-1, (H, J, 6)."""
    transposed = jacobian.transpose(0, 2, 1)
    gram = jacobian @ transposed
    gram += _TINY
    inverse = np.linalg.inv(gram)
    # The trace is the sum of 1 / sigma^2: at least that of the smallest, at most six of it.
    smallest = 1.0 / np.sqrt(np.maximum(inverse.reshape(-1, 36)[:, ::7].sum(axis=1), 1e-12))
    if smallest.min() < settings.singular:
        near = settings.damping * np.maximum(0.0, 1.0 - smallest / settings.singular)
        inverse = np.linalg.inv(gram + (near * near)[:, None, None] * np.eye(6))
    return transposed @ inverse


def _step(jacobian: np.ndarray, inverse: np.ndarray, error: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    residual = error[:, :, None] - jacobian @ wanted[:, :, None]
    return wanted + (inverse @ residual)[:, :, 0]


def _repeat(arrays: tuple[np.ndarray, ...], rows: int) -> tuple[np.ndarray, ...]:
    return tuple(np.repeat(a, rows, axis=0) for a in arrays)

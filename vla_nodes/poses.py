"""Rotations and poses: rotation matrices, rotation vectors, quaternions (x y z w, as ROS has them), (4, 4) matrices.

The one home of these formulas. scipy's Rotation has most of them; for these few lines a robot need not install scipy.
A pose T_a_b is that of frame b in frame a: p_a = T_a_b p_b.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A flat 3 x 3 matrix times _SKEW: its skew part's vector; half of its trace. A vector times _CROSS: its cross product.
_SKEW = np.zeros((9, 4))
_SKEW[[7, 2, 3], [0, 1, 2]], _SKEW[[5, 6, 1], [0, 1, 2]], _SKEW[[0, 4, 8], 3] = 0.5, -0.5, 0.5
_CROSS = np.zeros((3, 9))
_CROSS[[0, 1, 2], [7, 2, 3]], _CROSS[[0, 1, 2], [5, 6, 1]] = 1.0, -1.0
_EYE = np.eye(3)


def rotation_vector(rotations: np.ndarray) -> np.ndarray:
    """Rotation vectors (H, 3) rad, 0..pi, of rotation matrices (H, 3, 3)."""
    r = rotations
    parts = r.reshape(-1, 9) @ _SKEW
    axis, cosine = parts[:, :3], parts[:, 3] - 0.5
    squared = (axis * axis).sum(axis=1)
    if cosine.min(initial=1.0) > 0.98:  # asin(x)/x to 1e-6
        return axis * (1.0 + squared * (1 / 6 + squared * (3 / 40 + squared * (15 / 336))))[:, None]
    sine = np.sqrt(squared)
    angle = np.arctan2(sine, cosine)
    vector = axis * np.where(sine > 1e-7, angle / np.maximum(sine, 1e-7), 1.0)[:, None]
    if cosine.min(initial=1.0) > -0.9999:
        return vector
    for k in np.flatnonzero(cosine <= -0.9999):  # near a half turn the skew part vanishes: use the symmetric part
        column = (r[k] + np.eye(3))[:, np.argmax(np.diag(r[k]))]
        direction = column / np.linalg.norm(column)
        vector[k] = angle[k] * (direction if direction @ axis[k] >= 0 else -direction)
    return vector


def rotation_matrix(vectors: np.ndarray) -> np.ndarray:
    """Rotation matrices (H, 3, 3) of rotation vectors (H, 3) rad (Rodrigues)."""
    angle = np.sqrt((vectors * vectors).sum(axis=1))
    k = ((vectors / np.maximum(angle, 1e-12)[:, None]) @ _CROSS).reshape(-1, 3, 3)
    angle = angle[:, None, None]
    return _EYE + np.sin(angle) * k + (1.0 - np.cos(angle)) * (k @ k)


def quaternion_matrix(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices (H, 3, 3) of quaternions (H, 4) x y z w; they are normalised first (must not be zero)."""
    return _unit_quaternion_matrix(quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True))


def _unit_quaternion_matrix(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of unit quaternions (..., 4) x y z w."""
    x, y, z, w = np.moveaxis(quaternions, -1, 0)
    elements = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return np.stack(elements, axis=-1).reshape(*quaternions.shape[:-1], 3, 3)


def matrix_from(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """x y z (m) qx qy qz qw to a (4, 4) matrix; ValueError if the quaternion is not of unit length (to 1 %) or
    something not finite."""
    v = np.asarray(values, dtype=float)
    if v.shape != (7,):
        raise ValueError(f"a pose is 7 numbers x y z qx qy qz qw, got {v.size}")
    norm = np.linalg.norm(v[3:])
    if not np.isfinite(v).all() or abs(norm - 1) > 0.01:
        raise ValueError(f"pose {np.round(v, 4).tolist()} has no unit quaternion (qx qy qz qw of length {norm:.3g})")
    out = np.eye(4)
    out[:3, 3] = v[:3]
    out[:3, :3] = _unit_quaternion_matrix(v[3:] / norm)
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


def between(q0: np.ndarray, q1: np.ndarray, share: float) -> np.ndarray:
    """The unit quaternion (4,) that is `share` of the shortest turn from q0 (share 0) to q1 (share 1)."""
    q1 = -q1 if q0 @ q1 < 0 else q1
    angle = np.arccos(np.clip(q0 @ q1, -1.0, 1.0))
    if angle < 1e-6:
        q = (1 - share) * q0 + share * q1
    else:
        q = (np.sin((1 - share) * angle) * q0 + np.sin(share * angle) * q1) / np.sin(angle)
    return q / np.linalg.norm(q)


def pose_rows(poses: np.ndarray) -> np.ndarray:
    """(T, 4, 4) poses to (T, 7) x y z qx qy qz qw; signs run on from row to row, so that no component jumps.

    The quaternion is the dominant eigenvector of Bar-Itzhack's matrix (J. Guidance 23(6), 2000): no special cases.
    """
    r = np.asarray(poses, np.float64)[:, :3, :3]
    k = np.empty((len(r), 4, 4))
    k[:, :3, :3] = r + r.transpose(0, 2, 1) - np.trace(r, axis1=1, axis2=2)[:, None, None] * np.eye(3)
    k[:, 3, :3] = k[:, :3, 3] = np.stack(
        [r[:, 2, 1] - r[:, 1, 2], r[:, 0, 2] - r[:, 2, 0], r[:, 1, 0] - r[:, 0, 1]], axis=1
    )
    k[:, 3, 3] = np.trace(r, axis1=1, axis2=2)
    q = np.linalg.eigh(k)[1][:, :, -1]
    q[0] *= 1.0 if q[0, np.argmax(np.abs(q[0]))] > 0 else -1.0
    flips = np.sign((q[1:] * q[:-1]).sum(axis=1))
    q[1:] *= np.cumprod(np.where(flips == 0, 1.0, flips))[:, None]
    return np.hstack([np.asarray(poses, np.float64)[:, :3, 3], q])

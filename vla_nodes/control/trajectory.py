"""ROS-free twin of `trajectory_msgs/JointTrajectory`, with joint_trajectory_controller's rules.

`refusal` restates `validate_trajectory_msg` and `sample` restates `Trajectory::sample` of ros2_controllers (branch
jazzy), so that every core, test and the simulated controller agree with the stock controller on what is accepted
and on what the robot does with it. Source: https://github.com/ros-controls/ros2_controllers, jazzy,
joint_trajectory_controller/src/{joint_trajectory_controller,trajectory}.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# joint_trajectory_controller compares the last velocity with std::numeric_limits<float>::epsilon().
END_VELOCITY_EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Trajectory:
    """N timed points for J joints.

    joint_names: J names; times: (N,) s, time_from_start; positions: (N, J) rad (m for fingers);
    velocities, accelerations: (N, J) or None where the message leaves the field empty;
    stamp: s on the ROS clock at which times are zero, 0 = start on receipt.
    """

    joint_names: tuple[str, ...]
    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray | None = None
    accelerations: np.ndarray | None = None
    stamp: float = 0.0

    @property
    def end(self) -> float:
        """Absolute time of the last point, s (meaningful with a stamp)."""
        return self.stamp + float(self.times[-1])

    def derivatives(self) -> tuple[np.ndarray, np.ndarray]:
        """Velocities and accelerations (N, J), both of which every arm motion of ours has. ValueError without one."""
        if self.velocities is None or self.accelerations is None:
            raise ValueError("a trajectory without velocities or accelerations is no quintic")
        return self.velocities, self.accelerations


def refusal(trajectory: Trajectory, joint_names: Sequence[str], now: float) -> str | None:
    """Why joint_trajectory_controller (Jazzy, default parameters) refuses `trajectory`, or None.

    Defaults assumed: allow_partial_joints_goal false, allow_nonzero_velocity_at_trajectory_end false,
    allow_integration_in_goal_trajectories false. Two checks are ours: a joint named twice (the controller would
    silently use one of the two) and non-finite numbers (the controller would pass them to the motors).

    Args: joint_names: the controller's joints, any order; now: s on the ROS clock.
    """
    names = trajectory.joint_names
    if not names:
        return "no joint names"
    if len(names) != len(joint_names):
        return f"{len(names)} joints named, the controller has {len(joint_names)} and takes no partial goals"
    times = np.asarray(trajectory.times)
    positions = np.asarray(trajectory.positions)
    if times.ndim != 1 or times.size == 0 or positions.size == 0:
        return "trajectory has no points"
    velocities = trajectory.velocities
    if velocities is not None and len(velocities):
        last = np.atleast_1d(np.asarray(velocities)[-1])
        moving = np.flatnonzero(~(np.abs(last) <= END_VELOCITY_EPSILON))
        if moving.size:
            joint = names[moving[0]] if moving[0] < len(names) else f"number {moving[0]}"
            return f"velocity of the last point is {last[moving[0]]:.6g} at joint {joint}, must be zero"
    if not (np.all(np.isfinite(times)) and np.isfinite(trajectory.stamp)):
        return "non-finite time"
    if trajectory.stamp != 0.0 and trajectory.stamp + times[-1] < now:
        return f"trajectory ended {now - trajectory.stamp - times[-1]:.3f} s in the past"
    unknown = [name for name in names if name not in joint_names]
    if unknown:
        return f"unknown joint {unknown[0]}, the controller has {', '.join(joint_names)}"
    if len(set(names)) != len(names):
        return f"joint {next(n for n in names if names.count(n) > 1)} is named twice"
    backward = np.flatnonzero(np.diff(times) <= 0.0)
    if backward.size:
        i = int(backward[0])
        return f"times not strictly increasing between points {i} ({times[i]:.9g} s) and {i + 1} ({times[i + 1]:.9g} s)"
    for field in ("positions", "velocities", "accelerations"):
        value = getattr(trajectory, field)
        if value is None and field != "positions":
            continue
        value = np.asarray(value)
        if value.shape != (times.size, len(names)):
            return f"{field} have shape {value.shape}, expected {(times.size, len(names))}"
        if not np.all(np.isfinite(value)):
            return f"non-finite {field}"
    return None


def sample(trajectory: Trajectory, times: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position, velocity and acceleration as the controller interpolates them.

    Quintic where positions, velocities and accelerations are given, cubic with positions and velocities, else
    linear. After the last point it holds that point at rest; before the first it holds the first point at rest
    (the controller interpolates there from its own state, see control/joint_trajectory_controller.py).

    Args: times: (T,) or scalar, s since the trajectory's start (time_from_start).
    Returns: three arrays (T, J), or (J,) for a scalar.
    """
    scalar = isinstance(times, float) or np.ndim(times) == 0
    knots = trajectory.times
    quintic = trajectory.accelerations is not None and trajectory.velocities is not None
    if scalar and quintic and knots[0] <= times < knots[-1]:
        return _quintic_at(trajectory, float(times))
    t = np.atleast_1d(np.asarray(times, dtype=float))
    if len(knots) == 1:
        q = np.repeat(trajectory.positions[:1], len(t), axis=0)
        out = q, np.zeros_like(q), np.zeros_like(q)
    else:
        i = np.minimum(np.maximum(knots.searchsorted(t, side="right") - 1, 0), len(knots) - 2)
        if quintic:
            out = _quintic(trajectory, t, i)
        else:
            out = interpolate(t - knots[i], knots[i + 1] - knots[i], *_rows(trajectory, i), *_rows(trajectory, i + 1))
        outside = (t >= knots[-1]) | (t < knots[0])
        if outside.any():
            held = np.where((t >= knots[-1])[:, None], trajectory.positions[-1], trajectory.positions[0])
            out[0][outside], out[1][outside], out[2][outside] = held[outside], 0.0, 0.0
    return (out[0][0], out[1][0], out[2][0]) if scalar else out


# Rows: coefficients of u^0..u^5; columns: p1 - p0, v0 h, v1 h, a0 h^2, a1 h^2 of a segment of length h, u = t/h.
_HERMITE = np.array(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.5, 0.0],
        [10.0, -6.0, -4.0, -1.5, 0.5],
        [-15.0, 8.0, 7.0, 1.5, -1.0],
        [6.0, -3.0, -3.0, -0.5, 0.5],
    ]
)
_POWERS = np.arange(6)
_FIRST = np.zeros((6, 5))
_FIRST[:5] = _HERMITE[1:] * _POWERS[1:, None]
_SECOND = np.zeros((6, 5))
_SECOND[:5] = _FIRST[1:] * _POWERS[1:, None]
_THIRD = np.zeros((6, 5))
_THIRD[:5] = _SECOND[1:] * _POWERS[1:, None]
_WEIGHTS = np.concatenate([_HERMITE, _FIRST, _SECOND], axis=1)  # (6, 15)
_ALL_WEIGHTS = np.concatenate([_WEIGHTS, _THIRD], axis=1).reshape(6, 4, 5)


def quintic_weights(u: np.ndarray) -> np.ndarray:
    """(U, 4, 5): what a quintic over a time h takes of p1 - p0, v0 h, v1 h, a0 h^2, a1 h^2 at u = t/h (U,) for its
    position less p0 and its first three derivatives times h, h^2, h^3."""
    return np.tensordot(u[:, None] ** _POWERS, _ALL_WEIGHTS, axes=1)


def _quintic(trajectory: Trajectory, t: np.ndarray, i: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`interpolate` for quintic segments i (T,) at t (T,), as one small matrix product per instant: it is what the
    executor spends most of its time in."""
    p, knots = trajectory.positions, trajectory.times
    v, a = trajectory.derivatives()
    k = i + 1
    start = knots[i]
    h = (knots[k] - start)[:, None]
    u = (t - start)[:, None] / h
    p0 = p[i]
    data = np.empty((len(t), 5, p.shape[1]))
    data[:, 0] = p[k] - p0
    data[:, 1] = v[i] * h
    data[:, 2] = v[k] * h
    h2 = h * h
    data[:, 3] = a[i] * h2
    data[:, 4] = a[k] * h2
    powers = np.empty((len(t), 6))
    powers[:, :1], powers[:, 1:] = 1.0, u
    np.multiply.accumulate(powers, axis=1, out=powers)
    out = (powers @ _WEIGHTS).reshape(-1, 3, 5) @ data
    return p0 + out[:, 0], out[:, 1] / h, out[:, 2] / h2


def _quintic_at(trajectory: Trajectory, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_quintic` for one instant within the trajectory: three arrays (J,)."""
    p, knots = trajectory.positions, trajectory.times
    v, a = trajectory.derivatives()
    i = int(knots.searchsorted(t, side="right")) - 1
    h = float(knots[i + 1] - knots[i])
    u = (t - float(knots[i])) / h
    weights = (np.array([1.0, u, u**2, u**3, u**4, u**5]) @ _WEIGHTS).reshape(3, 5)
    k, p0, h2 = i + 2, p[i], h * h
    data = np.empty((5, p.shape[1]))
    np.subtract(p[i + 1], p0, out=data[0])
    np.multiply(v[i:k], h, out=data[1:3])
    np.multiply(a[i:k], h2, out=data[3:])
    out = weights @ data
    return p0 + out[0], out[1] / h, out[2] / h2


def interpolate(
    t: np.ndarray,
    duration: np.ndarray,
    p0: np.ndarray,
    v0: np.ndarray | None,
    a0: np.ndarray | None,
    p1: np.ndarray,
    v1: np.ndarray | None,
    a1: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One polynomial per row: `Trajectory::interpolate_between_points`.

    Args: t, duration: (T,) s into the segment and its length; p, v, a: (T, J) at its ends, None where not given.
    Returns: position, velocity, acceleration, each (T, J).
    """
    t, h = t[:, None], duration[:, None]
    d = p1 - p0
    if v0 is None or v1 is None:
        velocity = d / h
        return p0 + t * velocity, velocity, np.zeros_like(velocity)
    # Coefficients in u = t/h rather than t: powers of a short segment's length would lose digits.
    u, v0, v1 = t / h, v0 * h, v1 * h
    if a0 is None or a1 is None:
        c2, c3 = 3 * d - 2 * v0 - v1, v0 + v1 - 2 * d
        return (
            p0 + u * (v0 + u * (c2 + u * c3)),
            (v0 + u * (2 * c2 + u * 3 * c3)) / h,
            (2 * c2 + u * 6 * c3) / h**2,
        )
    a0, a1 = a0 * h * h, a1 * h * h
    c2 = 0.5 * a0
    c3 = 10 * d - 6 * v0 - 4 * v1 - 1.5 * a0 + 0.5 * a1
    c4 = -15 * d + 8 * v0 + 7 * v1 + 1.5 * a0 - a1
    c5 = 6 * d - 3 * (v0 + v1) - 0.5 * (a0 - a1)
    return (
        p0 + u * (v0 + u * (c2 + u * (c3 + u * (c4 + u * c5)))),
        (v0 + u * (2 * c2 + u * (3 * c3 + u * (4 * c4 + u * 5 * c5)))) / h,
        (2 * c2 + u * (6 * c3 + u * (12 * c4 + u * 20 * c5))) / h**2,
    )


def reordered(trajectory: Trajectory, joint_names: Sequence[str]) -> Trajectory:
    """The same trajectory with its columns in the order of `joint_names` (names must match as sets)."""
    if tuple(joint_names) == trajectory.joint_names:
        return trajectory
    columns = [trajectory.joint_names.index(name) for name in joint_names]
    p, v, a = _rows(trajectory, (slice(None), columns))
    return Trajectory(tuple(joint_names), trajectory.times, p, v, a, trajectory.stamp)


def _rows(trajectory: Trajectory, index: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """What `index` takes of the positions, velocities and accelerations, None for a field that is not given."""
    v, a = trajectory.velocities, trajectory.accelerations
    return trajectory.positions[index], None if v is None else v[index], None if a is None else a[index]

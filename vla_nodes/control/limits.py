"""Motion limits, and the proof that a quintic trajectory keeps them.

Between two knots a quintic's velocity, acceleration and jerk are polynomials of degree 4, 3 and 2. A polynomial lies
within the convex hull of its Bernstein coefficients (Farouki, "The Bernstein polynomial basis", CAGD 2012), so a
bound on the coefficients bounds every instant between the knots, not only sampled ones. The bound is a little
conservative, never optimistic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from vla_nodes.control.trajectory import Trajectory, sample

if TYPE_CHECKING:
    from vla_nodes.control.robot import RobotModel


OUTSIDE = 0.05  # rad, farther than that outside of its limits no joint is moved
ROUNDING = 1e-12  # rad
REACH = 3  # segments either side of a knot that a Jacobian there stands for
TOOL_PERIOD = 1.0 / 32.0  # s between the instants at which the tool's speed is evaluated


@dataclass(frozen=True)
class Limits:
    """What published trajectories must keep: (J,) each in rad, rad/s, rad/s^2, rad/s^3; tool_speed in m/s."""

    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    tool_speed: float

    @cached_property
    def rates(self) -> np.ndarray:
        """(3, J): velocity, acceleration and jerk."""
        return np.array([self.velocity, self.acceleration, self.jerk])

    def around(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position limits (J,), (J,) for a motion that starts at q (J,): a joint measured a little outside of its
        limits may come back in, and go no farther out."""
        if (q >= self.lower).all() and (q <= self.upper).all():
            return self.lower, self.upper
        return (
            np.where(q > self.lower - OUTSIDE, np.minimum(self.lower, q), self.lower),
            np.where(q < self.upper + OUTSIDE, np.maximum(self.upper, q), self.upper),
        )

    @classmethod
    def scaled(cls, robot: RobotModel, velocity: float, acceleration: float, jerk: float, tool_speed: float) -> Limits:
        """The robot's limits times the given scales (0..1]; tool_speed in m/s, capped by the robot's own."""
        for name, scale in (("velocity", velocity), ("acceleration", acceleration), ("jerk", jerk)):
            if not 0.0 < scale <= 1.0:
                raise ValueError(f"{name}_scale must be above 0 and at most 1, got {scale}")
        if not tool_speed > 0.0:
            raise ValueError(f"tool_speed must be above 0 m/s, got {tool_speed}")
        return cls(
            robot.lower,
            robot.upper,
            robot.max_velocity * velocity,
            robot.max_acceleration * acceleration,
            robot.max_jerk * jerk,
            min(tool_speed, robot.max_tool_speed),
        )


@dataclass(frozen=True)
class Bounds:
    """Over a trajectory: low, high: (J,) of the knots only; rates: (3, J) largest velocity, acceleration and jerk;
    lengths: (N - 1,) s of the segments; velocity_per_segment (N - 1, J); hull (5, N - 1, J): velocities whose convex
    combinations the trajectory's are."""

    low: np.ndarray
    high: np.ndarray
    rates: np.ndarray
    lengths: np.ndarray
    velocity_per_segment: np.ndarray
    hull: np.ndarray

    @property
    def velocity(self) -> np.ndarray:
        """(J,)"""
        return self.rates[0]

    @property
    def acceleration(self) -> np.ndarray:
        """(J,)"""
        return self.rates[1]

    @property
    def jerk(self) -> np.ndarray:
        """(J,)"""
        return self.rates[2]


def bounds(trajectory: Trajectory, start: int = 0) -> Bounds:
    """Rigorous bounds of a quintic trajectory from knot `start` on."""
    t = trajectory.times[start:]
    lengths = t[1:] - t[:-1]
    h = lengths[:, None]
    p, v, a = (x[start:] for x in (trajectory.positions, *trajectory.derivatives()))
    joints = p.shape[1]
    data = np.empty((5, len(h), joints))
    np.subtract(p[1:], p[:-1], out=data[0])
    data[0] /= h
    data[1], data[2] = v[:-1], v[1:]
    np.multiply(a[:-1], h, out=data[3])
    np.multiply(a[1:], h, out=data[4])
    hull = (_HULL @ data.reshape(5, -1)).reshape(12, len(h), joints)
    velocity, acceleration, jerk = hull[:5], hull[5:9], hull[9:]
    acceleration /= h
    jerk /= h * h
    sizes = np.abs(hull)
    segment = np.maximum.reduce(sizes[:5], axis=0)
    # Peaks over all coefficients and knots: flattened, because numpy reduces one long axis much faster than two.
    rates = np.empty((3, joints))
    np.maximum.reduce(segment, axis=0, out=rates[0])
    np.maximum.reduce(sizes[5:9].reshape(-1, joints), axis=0, out=rates[1])
    rates[2] = _quadratic_peak(jerk, np.maximum.reduce(sizes[9:], axis=1))
    return Bounds(np.minimum.reduce(p), np.maximum.reduce(p), rates, lengths, segment, velocity)


def _hull() -> np.ndarray:
    """(12, 5): Bernstein coefficients of a quintic's velocity (5), acceleration (4) and jerk (3) over a time of 1 s,
    from (p1 - p0) / h, v0, v1, a0 h and a1 h."""
    distance, v0, v1, a0, a1 = np.eye(5)
    second, fourth = v0 + a0 / 4, v1 - a1 / 4
    velocity = np.array([v0, second, 5 * distance - (v0 + second + fourth + v1), fourth, v1])
    acceleration = 4 * np.diff(velocity, axis=0)
    return np.concatenate([velocity, acceleration, 3 * np.diff(acceleration, axis=0)])


_HULL = _hull()


def _quadratic_peak(jerk: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Exact largest |value| per joint of quadratics given by Bernstein coefficients (3, N, J), of which `largest`
    (3, J) are the largest sizes."""
    first, middle, last = largest
    ends = np.maximum(first, last)
    if (middle <= ends).all():
        return ends  # within the hull of the coefficients, and the ends are on it
    b0, b1, b2 = jerk
    fall = b0 - b1
    curvature = fall - b1 + b2
    with np.errstate(divide="ignore", invalid="ignore"):
        u = fall / curvature
        peak = np.where((u > 0.0) & (u < 1.0), np.abs(b0 - fall * u), 0.0)
    return np.maximum(ends, peak.max(axis=0))


def excess(trajectory: Trajectory, limits: Limits, robot: RobotModel, start: int = 0) -> tuple[float, str]:
    """How far a quintic trajectory is from its limits: the largest ratio value/limit, and whose it is.

    A ratio <= 1 proves that position, velocity, acceleration and jerk limits hold at every instant from knot
    `start` on. Position counts as ratio inf when outside. The tool's speed is bounded too;
    where its bound does not prove enough it is evaluated every TOOL_PERIOD, with 2 % kept for the instants between.
    """
    b = bounds(trajectory, start)
    shares = b.rates / limits.rates
    if not math.isfinite(float((shares.sum(axis=0) + b.low + b.high).sum())):
        return np.inf, "non-finite trajectory"  # NaN would compare as within any limit
    lower, upper = limits.around(trajectory.positions[start])
    # Between its knots a joint is no farther from the nearer one than it moves in half of the time.
    away = 0.5 * float(b.lengths.max()) * b.velocity
    if ((b.low - away < lower) | (b.high + away > upper)).any():
        low, high = _positions(trajectory, b, start)
        outside = (b.low < lower) | (b.high > upper) | (low < lower - ROUNDING) | (high > upper + ROUNDING)
        if outside.any():
            return np.inf, f"position of {trajectory.joint_names[int(np.argmax(outside))]}"
    kind, j = divmod(int(shares.argmax()), shares.shape[1])
    worst = float(shares[kind, j])
    whose = f"{('velocity', 'acceleration', 'jerk')[kind]} of {trajectory.joint_names[j]}"
    if worst > 1.0:
        return worst, whose
    levered = b.velocity_per_segment @ robot.lever
    fast = np.flatnonzero(levered > limits.tool_speed)
    if fast.size and _tool_speed(trajectory, b, robot, start, levered, fast) > 0.98 * limits.tool_speed:
        h = b.lengths[fast]
        if h.max() <= TOOL_PERIOD * (1.0 + 1e-9):  # the knots are close enough
            q, qd = trajectory.positions[fast + start], trajectory.derivatives()[0][fast + start]
        else:
            parts = np.ceil(h / TOOL_PERIOD - 1e-9).astype(int)  # instants per segment
            offset = np.concatenate([np.arange(n) / n for n in parts]) * np.repeat(h, parts)
            q, qd, _ = sample(trajectory, np.repeat(trajectory.times[fast + start], parts) + offset)
        ratio = float(robot.tool_speed(q, qd).max()) / (0.98 * limits.tool_speed)
        if ratio > worst:
            worst, whose = ratio, "tool speed"
    return worst, whose


def _positions(trajectory: Trajectory, b: Bounds, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest positions (J,): their Bernstein coefficients are the running sums of the velocity's, h/5
    apart (the sixth is the next knot)."""
    p, h = trajectory.positions[start:-1], b.lengths[:, None]
    position = np.add.accumulate(b.hull, axis=0) * (h / 5) + p
    return (np.minimum(position.min(axis=(0, 1)), b.low), np.maximum(position.max(axis=(0, 1)), b.high))


def _tool_speed(
    trajectory: Trajectory, b: Bounds, robot: RobotModel, start: int, levered: np.ndarray, fast: np.ndarray
) -> float:
    """An upper bound (m/s) of the tool's speed on segments `fast` and those around them: Jacobians J_c at every
    2 * REACH-th knot on the segments around it,

    |J(q) q'| <= |J_c q'| + |J(q) - J_c| |q'|,  the first at most that of the hull of q', the second at most the lever
    of each joint times how far the joints are from the knot.

    Args: levered: (N - 1,) m/s, velocity_per_segment times the levers.
    """
    segments, each = b.hull.shape[1], 2 * REACH
    groups = -(-segments // each)
    near = np.flatnonzero(np.bincount(fast // each))
    jacobians = robot.kinematics(trajectory.positions[np.minimum(start + REACH + each * near, start + segments)])[2]
    hull, moved, crude = np.zeros((5, groups * each, len(robot.lever))), *np.zeros((2, groups * each))
    hull[:, :segments], crude[:segments] = b.hull, levered
    np.multiply(b.velocity_per_segment.sum(axis=1), b.lengths, out=moved[:segments])
    hull = hull.reshape(5, groups, each, -1)[:, near].transpose(1, 2, 0, 3).reshape(len(near), each * 5, -1)
    speed = hull @ jacobians[:, :3].transpose(0, 2, 1)  # (G, each * 5, 3)
    speed = np.sqrt((speed * speed).sum(axis=2)).reshape(len(near), each, 5).max(axis=2)
    # How far the joints are from the knot at most, on either side of it.
    away = moved.reshape(groups, 2, REACH)[near].sum(axis=2).max(axis=1)
    return float((speed + crude.reshape(groups, each)[near] * away[:, None]).max())

"""Motion limits, and the proof that a quintic trajectory keeps them.

Between two knots a quintic's velocity, acceleration and jerk are polynomials of degree 4, 3 and 2. A polynomial lies
within the convex hull of its Bernstein coefficients (Farouki, "The Bernstein polynomial basis", CAGD 2012), so a
bound on the coefficients bounds every instant between the knots, not only sampled ones. The bound is a little
conservative, never optimistic.
"""

from __future__ import annotations

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
        return (
            np.where(q > self.lower - OUTSIDE, np.minimum(self.lower, q), self.lower),
            np.where(q < self.upper + OUTSIDE, np.maximum(self.upper, q), self.upper),
        )

    @classmethod
    def scaled(
        cls, robot: RobotModel, velocity: float, acceleration: float, jerk: float, tool_speed: float
    ) -> Limits:
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
    """Largest value per joint (J,) over a trajectory; low, high: of the knots only; velocity_per_segment (N - 1, J);
    hull (5, N - 1, J): velocities whose convex combinations the trajectory's are."""

    low: np.ndarray
    high: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    velocity_per_segment: np.ndarray
    hull: np.ndarray


def bounds(trajectory: Trajectory, start: int = 0) -> Bounds:
    """Rigorous bounds of a quintic trajectory from knot `start` on."""
    t = trajectory.times[start:]
    h = (t[1:] - t[:-1])[:, None]
    p, v, a = (x[start:] for x in (trajectory.positions, trajectory.velocities, trajectory.accelerations))
    quarter, ends = h / 4, a * 0.25
    velocity = np.empty((5, len(h), p.shape[1]))
    velocity[0], velocity[4] = v[:-1], v[1:]
    velocity[1], velocity[3] = v[:-1] + ends[:-1] * h, v[1:] - ends[1:] * h
    velocity[2] = 5.0 * (p[1:] - p[:-1]) / h - (velocity[0] + velocity[1] + velocity[3] + velocity[4])
    acceleration = (velocity[1:] - velocity[:-1]) / quarter
    jerk = (acceleration[1:] - acceleration[:-1]) / (h / 3)
    # Peaks over all coefficients and knots: flattened, because numpy reduces one long axis much faster than two.
    joints = p.shape[1]
    segment = np.abs(velocity).max(axis=0)
    return Bounds(
        p.min(axis=0),
        p.max(axis=0),
        segment.max(axis=0),
        np.abs(acceleration).reshape(-1, joints).max(axis=0),
        _quadratic_peak(jerk),
        segment,
        velocity,
    )


def _quadratic_peak(jerk: np.ndarray) -> np.ndarray:
    """Exact largest |value| per joint of quadratics given by Bernstein coefficients (3, N, J)."""
    b0, b1, b2 = jerk
    ends = np.maximum(np.abs(b0), np.abs(b2)).max(axis=0)
    if (np.abs(b1).max(axis=0) <= ends).all():
        return ends  # within the hull of the coefficients, and the ends are on it
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
    ratio = np.array([b.velocity, b.acceleration, b.jerk]) / limits.rates
    if not (np.isfinite(ratio).all() and np.isfinite(b.low).all() and np.isfinite(b.high).all()):
        return np.inf, "non-finite trajectory"  # NaN would compare as within any limit
    lower, upper = limits.around(trajectory.positions[start])
    outside = (b.low < lower) | (b.high > upper)
    # Between its knots a joint is no farther from the nearer one than it moves in half of the time.
    away = 0.5 * float(np.diff(trajectory.times[start:]).max()) * b.velocity
    if not outside.any() and ((b.low - away < lower) | (b.high + away > upper)).any():
        low, high = _positions(trajectory, b, start)
        outside = (low < lower - ROUNDING) | (high > upper + ROUNDING)
    if outside.any():
        return np.inf, f"position of {trajectory.joint_names[int(np.argmax(outside))]}"
    kind, j = divmod(int(ratio.argmax()), ratio.shape[1])
    worst = float(ratio[kind, j])
    whose = f"{('velocity', 'acceleration', 'jerk')[kind]} of {trajectory.joint_names[j]}"
    if worst > 1.0:
        return worst, whose
    fast = np.flatnonzero(b.velocity_per_segment @ robot.lever > limits.tool_speed)
    if fast.size and _tool_speed(trajectory, b, robot, start) > 0.98 * limits.tool_speed:
        h = trajectory.times[fast + start + 1] - trajectory.times[fast + start]
        if h.max() <= TOOL_PERIOD * (1.0 + 1e-9):  # the knots are close enough
            q, qd = trajectory.positions[fast + start], trajectory.velocities[fast + start]
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
    p, h = trajectory.positions[start:-1], np.diff(trajectory.times[start:])[:, None]
    position = np.add.accumulate(b.hull, axis=0) * (h / 5) + p
    return (np.minimum(position.min(axis=(0, 1)), b.low), np.maximum(position.max(axis=(0, 1)), b.high))


def _tool_speed(trajectory: Trajectory, b: Bounds, robot: RobotModel, start: int) -> float:
    """An upper bound (m/s) of the tool's speed: Jacobians J_c at every 2 * REACH-th knot on the segments around it,

    |J(q) q'| <= |J_c q'| + |J(q) - J_c| |q'|,  the first at most that of the hull of q', the second at most the lever
    of each joint times how far the joints are from the knot.
    """
    segments = b.hull.shape[1]
    middle = np.minimum(start + np.arange(REACH, segments + REACH, 2 * REACH), start + segments)
    jacobians = robot.kinematics(trajectory.positions[middle])[2][:, :3]
    of = np.arange(segments) // (2 * REACH)
    hull = jacobians[of] @ b.hull.transpose(1, 2, 0)  # (N - 1, 3, 5)
    moved = np.zeros(2 * REACH * len(middle))
    moved[:segments] = b.velocity_per_segment.sum(axis=1) * np.diff(trajectory.times[start:])
    halves = moved.reshape(-1, REACH).sum(axis=1)  # how far the joints are from the knot at most, either side of it
    away = np.repeat(np.maximum(halves[::2], halves[1::2]), 2 * REACH)[:segments]
    return float((np.sqrt((hull * hull).sum(axis=1)).max(axis=1) + (b.velocity_per_segment @ robot.lever) * away).max())

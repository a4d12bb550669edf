"""The gripper's channel: opening fractions of a chunk to a rate-limited trajectory of one joint.

Cubic (positions and velocities): a finger needs no acceleration limit, but never exceeds its speed, never leaves its
range and ends at rest. Slopes are harmonic means of the neighbouring secants, so the cubic is monotone between
knots (Fritsch and Butland, SIAM J. Sci. Stat. Comput. 5, 1984).
"""

from __future__ import annotations

import math

import numpy as np

from vla_nodes.control.path import TimeLaw
from vla_nodes.control.robot import Gripper
from vla_nodes.control.splice import hold, with_prefix
from vla_nodes.control.trajectory import Trajectory

SETTLED = 1e-6  # m: where the finger counts as arrived
MAX_KNOTS = 2000


def state(base: Trajectory, at: float) -> tuple[float, float]:
    """Position (m) and velocity (m/s) of one joint at `at` s, absolute, as `sample` has it: without its arrays."""
    times, velocities = base.times, base.velocities
    assert velocities is not None  # every motion of ours has them
    t = at - base.stamp
    if not times[0] <= t < times[-1]:
        return float(base.positions[0 if t < times[0] else -1, 0]), 0.0
    i = int(times.searchsorted(t, side="right")) - 1
    h = float(times[i + 1] - times[i])
    u = (t - float(times[i])) / h
    p0, p1 = base.positions[i : i + 2, 0].tolist()
    v0, v1 = (x * h for x in velocities[i : i + 2, 0].tolist())
    c2, c3 = 3.0 * (p1 - p0) - 2.0 * v0 - v1, v0 + v1 - 2.0 * (p1 - p0)
    return p0 + u * (v0 + u * (c2 + u * c3)), (v0 + u * (2.0 * c2 + u * 3.0 * c3)) / h


def settled(base: Trajectory, begin: float, targets: np.ndarray) -> bool:
    """Whether the base is at rest from `begin` on, where all targets (N,) m are."""
    return begin >= base.end and float(np.abs(targets - base.positions[-1, 0]).max()) <= SETTLED


def follow(
    gripper: Gripper, base: Trajectory, begin: float, times: np.ndarray, targets: np.ndarray, knot: float
) -> Trajectory:
    """From the base's state at `begin` towards `targets` (N,) m, wanted at `times` (N,) s after begin; then rest.

    Returns: a trajectory stamped `begin` on a grid of `knot` seconds.
    """
    p, v = state(base, begin)
    step = gripper.speed * knot / 1.5  # a monotone cubic's speed peaks at 1.5 times its secant's
    wanted = np.interp(knot * np.arange(1, math.ceil(times[-1] / knot) + 2), times, targets)
    moving = np.flatnonzero(np.abs(wanted - wanted[-1]) > SETTLED)
    wanted = wanted[: moving[-1] + 2 if moving.size else 1].tolist()  # what stays constant needs no points

    def secant(k: int, position: float) -> float:
        d = min(max(wanted[min(k, len(wanted) - 1)] - position, -step), step)
        return d if abs(d) > SETTLED else 0.0

    positions, slopes, m = [p], [v], v * knot
    for k in range(MAX_KNOTS):
        d = secant(k, p)
        if k >= len(wanted) and d == 0.0 and m == 0.0:
            break
        if d * m < 0.0 or abs(m) > 3.0 * abs(d):
            d, m = m / 3.0, 0.0  # moving the other way, or too fast: the shortest monotone cubic to a halt
        else:
            after = secant(k + 1, p + d)
            m = 2.0 * d * after / (d + after) if d * after > 0.0 else 0.0
        p += d
        positions.append(p)
        slopes.append(m / knot)
    if len(positions) == 1:
        positions.append(p)
        slopes.append(0.0)
    slopes[-1] = 0.0
    column = np.array(positions)[:, None]
    return Trajectory(base.joint_names, knot * np.arange(len(column)), column, np.array(slopes)[:, None], None, begin)


class GripperChannel:
    """The gripper's motion in flight, one per executor."""

    AGAIN = 1.0  # s after which a gripper that has nothing to do is told so again

    def __init__(self, gripper: Gripper, knot: float) -> None:
        self._gripper, self._knot = gripper, knot
        self._plan: Trajectory | None = None
        self._measured: float | None = None
        self._said = -math.inf  # when anything was sent last

    def observe(self, position: float) -> None:
        """The measured joint position, m or rad."""
        if math.isfinite(position):
            self._measured = position

    def submit(
        self, period: float, opening: np.ndarray, now: float, begin: float, law: TimeLaw, t0: float
    ) -> Trajectory | None:
        """The trajectory for a chunk's openings (H,), along the arm's time law, which starts t0 s after `begin`; None
        where the gripper rests where it is wanted and has been told so."""
        gripper, knot, base = self._gripper, self._knot, self._plan
        # Joined where the motion in flight has a knot: in the middle of its last segment the finger is too fast for the
        # distance left to be covered in a whole one, and would leave its range.
        law_begin, begin = begin + t0, math.ceil(begin / knot - 1e-6) * knot
        t0 = law_begin - begin
        if base is None:
            # Without a measured finger the first wanted opening is where it starts; a real one is measured.
            position = gripper.position(opening[0]) if self._measured is None else self._measured
            low, high = sorted((gripper.closed, gripper.open))
            position = float(np.clip(position, low, high))
            base = hold((gripper.joint,), np.array([position]), begin - 1.0, knot)
        wanted = gripper.position(opening)
        if settled(base, begin, wanted) and begin < self._said + self.AGAIN:
            return None
        self._said = begin
        t = np.arange(0.0, t0 + law.duration + knot, knot)
        s = law.evaluate(np.maximum(t - t0, 0.0))[0]
        targets = np.interp(s, period * np.arange(1, len(opening) + 1), wanted)
        self._plan = with_prefix(base, now, follow(gripper, base, begin, t, targets, knot), knot)
        return self._plan

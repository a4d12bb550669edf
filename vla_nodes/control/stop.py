"""Stops along the path in flight; off it, and approaches, with ruckig (Berscheid and Kroeger, RSS 2021)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import ruckig

from vla_nodes.control.limits import Limits, excess
from vla_nodes.control.splice import hold, knot_grid, slow_along
from vla_nodes.control.trajectory import Trajectory, sample

if TYPE_CHECKING:
    from vla_nodes.control.robot import RobotModel

# ruckig's jerk is piecewise constant and switches between our knots. The quintic through the knots has as its jerk
# the least-squares quadratic of that step function, which overshoots a single step by half; so ruckig gets less, and
# never so much that it ramps its acceleration up within fewer than RAMP knots, which a quintic would overshoot.
JERK_SHARE = 0.45
ACCELERATION_SHARE = 0.85
RAMP = 1.5


def _limited(
    names: tuple[str, ...], limits: Limits, q: np.ndarray, qd: np.ndarray, qdd: np.ndarray, knot: float
) -> ruckig.InputParameter:
    request = ruckig.InputParameter(len(names))
    request.current_position = q.tolist()
    request.current_velocity = qd.tolist()
    request.current_acceleration = qdd.tolist()
    request.target_velocity = [0.0] * len(names)
    request.target_acceleration = [0.0] * len(names)
    request.max_velocity = (0.97 * limits.velocity).tolist()
    acceleration = ACCELERATION_SHARE * limits.acceleration
    request.max_acceleration = acceleration.tolist()
    request.max_jerk = np.minimum(JERK_SHARE * limits.jerk, acceleration / (RAMP * knot)).tolist()
    return request


def _sampled(names: tuple[str, ...], motion: ruckig.Trajectory, begin: float, knot: float) -> Trajectory:
    t = knot_grid(knot, [(motion.duration, 1)])
    q, qd, qdd = (np.array(x) for x in zip(*(motion.at_time(min(x, motion.duration)) for x in t), strict=True))
    # Where the last knot lies past the end, rest has been reached: positions stay, derivatives are zero.
    over = t >= motion.duration
    qd[over], qdd[over] = 0.0, 0.0
    return Trajectory(names, t, q, qd, qdd, begin)


def fastest_stop(
    names: tuple[str, ...], limits: Limits, q: np.ndarray, qd: np.ndarray, qdd: np.ndarray, begin: float, knot: float
) -> Trajectory | None:
    """Every joint to rest as fast as its limits allow, from state q, qd, qdd (J,) at `begin`; leaves the path.

    Returns None if ruckig finds no solution.
    """
    request = _limited(names, limits, q, qd, qdd, knot)
    request.control_interface = ruckig.ControlInterface.Velocity
    request.synchronization = ruckig.Synchronization.No
    motion = ruckig.Trajectory(len(names))
    if ruckig.Ruckig(len(names)).calculate(request, motion) < 0:
        return None
    return _sampled(names, motion, begin, knot)


def come_to_rest(
    base: Trajectory, begin: float, limits: Limits, robot: RobotModel, knot: float, longest: float | None
) -> Trajectory:
    """To rest from the base's state at `begin`, within limits: along its path if that takes no more than `longest` s
    (None: no longer than leaving it takes, to a knot), else off it, else as the base does itself."""
    state, remaining = sample(base, begin - base.stamp), base.end - begin
    speed = np.abs(state[1])

    def off_path() -> Trajectory | None:
        fast = fastest_stop(base.joint_names, limits, *state, begin, knot)
        good = fast is not None and fast.times[-1] < remaining and excess(fast, limits, robot)[0] <= 1.0
        return fast if good else None

    fast = None
    if longest is None:
        fast = off_path()
        longest = remaining if fast is None else float(fast.times[-1]) + knot
    duration = max(2 * knot, float((1.7 * speed / limits.acceleration).max()),
                   math.sqrt(float((8.0 * speed / limits.jerk).max())))  # fmt: skip
    while duration <= longest and duration < remaining:
        slowed = slow_along(base, begin, duration, knot)
        if excess(slowed, limits, robot)[0] <= 1.0:
            return slowed
        duration *= 1.2
    if fast is None and remaining > longest:
        fast = off_path()
    if fast is not None:
        return fast
    if remaining <= 1e-9:
        return hold(base.joint_names, base.positions[-1], begin, knot)
    later = base.stamp + base.times > begin + 1e-9
    velocities, accelerations = base.derivatives()
    return Trajectory(
        base.joint_names,
        np.concatenate([[0.0], base.stamp + base.times[later] - begin]),
        np.concatenate([state[0][None], base.positions[later]]),
        np.concatenate([state[1][None], velocities[later]]),
        np.concatenate([state[2][None], accelerations[later]]),
        begin,
    )


def approach(
    names: tuple[str, ...],
    limits: Limits,
    q: np.ndarray,
    qd: np.ndarray,
    qdd: np.ndarray,
    target: np.ndarray,
    begin: float,
    knot: float,
    slower: float = 1.0,
) -> Trajectory | None:
    """To rest at `target` (J,), all joints arriving together, at most at 1 / `slower` (<= 1) of the speed limits."""
    request = _limited(names, limits, q, qd, qdd, knot)
    request.target_position = np.clip(target, limits.lower, limits.upper).tolist()
    request.max_velocity = [x / slower for x in request.max_velocity]
    request.synchronization = ruckig.Synchronization.Time
    motion = ruckig.Trajectory(len(names))
    if ruckig.Ruckig(len(names)).calculate(request, motion) < 0:
        return None
    return _sampled(names, motion, begin, knot)

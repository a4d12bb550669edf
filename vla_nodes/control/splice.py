"""From a reference in flight onto a new chunk's path: C2 blend on a fixed grid of knots.

    q(t) = (1 - w(t)) base(t) + w(t) path(s(t)),    w = 10u^3 - 15u^4 + 6u^5,    u = (t - t0) / T

w and its first two derivatives vanish at t0, so position, velocity and acceleration are those of the base there
whatever the path is; at t0 + T they are the path's. Knots carry analytic derivatives and lie on multiples of one
period that is a power of two seconds: their times are exact in binary and in nanoseconds, and the knots two
successive trajectories share are the same numbers.
"""

from __future__ import annotations

import math

import numpy as np

from vla_nodes.control.path import ChunkPath, TimeLaw
from vla_nodes.control.trajectory import Trajectory, sample

MAX_KNOTS = 400


def power_of_two_below(x: float) -> int:
    """Largest power of two not above x, at least 1."""
    return 1 << max(int(math.floor(math.log2(max(x, 1.0)))), 0)


def knot_grid(knot: float, fine: float, coarse: float, duration: float) -> np.ndarray:
    """Times (N,) from 0 to at least `duration`: fine-spaced up to `fine` seconds, then `coarse` knots apart.

    Args: knot: s, grid period; coarse: how much slower than nominal the rest runs (>= 1), where fewer knots do.
    """
    first = power_of_two_below(fine / (32 * knot))
    step = max(power_of_two_below(coarse), first, power_of_two_below(duration / (MAX_KNOTS * knot) * 4))
    n = max(math.ceil(fine / (knot * first) - 1e-9), 1) * first
    n = -(-n // step) * step if step > first else n
    rest = max(math.ceil((duration - n * knot) / (step * knot) - 1e-9), 0)
    ticks = np.concatenate([np.arange(0, n + 1, first), n + step * np.arange(1, rest + 1)])
    return ticks * knot


def blend_onto_path(
    base: Trajectory, begin: float, path: ChunkPath, law: TimeLaw, blend_start: float, blend: float, knot: float
) -> Trajectory:
    """Leave `base` from begin + blend_start on and be on the path `blend` seconds later, ending at rest.

    Args: begin: s, absolute, a multiple of `knot`; blend_start, blend: s, multiples do not matter.
    Returns: a quintic trajectory stamped `begin`, first point the base's own state there.
    """
    # With a coarse grid in the part where the law is slow the path is still resolved as finely as nominally.
    t = knot_grid(knot, blend_start + blend, 1.0 / law.rate, max(blend_start + law.duration, blend_start + blend))
    b, bd, bdd = sample(base, begin - base.stamp + t)
    s, ds, dds = law.evaluate(np.maximum(t - blend_start, 0.0))
    p, p1, p2 = path.evaluate(s)
    n, nd, ndd = p, p1 * ds[:, None], p2 * (ds * ds)[:, None] + p1 * dds[:, None]
    u = np.clip((t - blend_start) / blend, 0.0, 1.0)[:, None]
    w = u**3 * (10.0 - 15.0 * u + 6.0 * u * u)
    dw = 30.0 * (u * (1.0 - u)) ** 2 / blend
    ddw = 60.0 * u * (1.0 - u) * (1.0 - 2.0 * u) / blend**2
    d, dd = n - b, nd - bd
    q, qd, qdd = b + w * d, bd + dw * d + w * dd, bdd + ddw * d + 2.0 * dw * dd + w * (ndd - bdd)
    q[-1], qd[-1], qdd[-1] = path.points[-1], 0.0, 0.0
    return Trajectory(base.joint_names, t, q, qd, qdd, begin)


def slow_along(base: Trajectory, begin: float, duration: float, knot: float) -> Trajectory:
    """Come to rest along the base's own path: base(tau(t)), tau' falling from 1 to 0 over `duration` seconds.

    tau' = 1 - (3u^2 - 2u^3): C2 with the base at begin, and no deviation from the planned path at all.
    """
    t = knot_grid(knot, duration, 1.0, duration)
    u = np.clip(t / duration, 0.0, 1.0)
    tau = duration * (u - u**3 + 0.5 * u**4)
    rate = (1.0 - u * u * (3.0 - 2.0 * u))[:, None]
    slowing = (-6.0 / duration * u * (1.0 - u))[:, None]
    b, bd, bdd = sample(base, begin - base.stamp + tau)
    q, qd, qdd = b, bd * rate, bdd * rate**2 + bd * slowing
    qd[-1], qdd[-1] = 0.0, 0.0
    return Trajectory(base.joint_names, t, q, qd, qdd, begin)


def with_prefix(base: Trajectory, now: float, after: Trajectory, knot: float, history: int = 2) -> Trajectory:
    """`after` preceded by the base's own motion from `history` knots before now.

    A receiver that gets the message at any time before after.stamp is then on the reference it is already
    following, whatever `interpolate_from_desired_state` says and however late the message is.
    """
    first = math.floor(now / knot) - history
    count = round(after.stamp / knot) - first
    t = knot * np.arange(count)
    begin = first * knot
    q, qd, qdd = sample(base, begin - base.stamp + t)
    return Trajectory(
        after.joint_names,
        np.concatenate([t, count * knot + after.times]),
        np.concatenate([q, after.positions]),
        np.concatenate([qd, after.velocities]),
        None if after.accelerations is None else np.concatenate([qdd, after.accelerations]),
        begin,
    )


def hold(joint_names: tuple[str, ...], q: np.ndarray, begin: float, knot: float) -> Trajectory:
    """Rest at q (J,) from `begin` on."""
    zero = np.zeros((2, len(q)))
    return Trajectory(joint_names, np.array([0.0, knot]), np.stack([q, q]), zero, zero.copy(), begin)

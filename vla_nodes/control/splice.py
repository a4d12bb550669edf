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

RESOLVE = 32  # knots a long section is resolved with
PER_ROW = 1.25  # knots a row of the chunk gets at least


def power_of_two_below(x: float) -> int:
    """Largest power of two not above x, at least 1."""
    return 1 << max(int(math.floor(math.log2(max(x, 1.0)))), 0)


def knot_grid(knot: float, sections: list[tuple[float, int]]) -> np.ndarray:
    """Times (N,) from 0, all multiples of `knot`.

    Args: sections: (end, step) in order: up to `end` seconds a point every `step` knots; the last end is reached or
    passed by less than a knot.
    """
    ticks, at = [], 0
    for end, step in sections:
        until = max(math.ceil(end / knot - 1e-9), 0)
        if until > at:
            ticks.append(np.arange(at, until, step))
            at = until
    return np.concatenate([*ticks, [max(at, 1)]]) * knot


def blend_onto_path(
    base: Trajectory, begin: float, path: ChunkPath, law: TimeLaw, blend: float, knot: float
) -> Trajectory:
    """Leave `base` from begin on and be on the path `blend` seconds later, ending at rest.

    Args: begin: s, absolute, a multiple of `knot`; blend: s.
    Returns: a quintic trajectory stamped `begin`, first point the base's own state there.
    """
    lasts = max(law.duration, blend)
    moving = max(min(base.end - begin, blend), 0.0)
    # Where time is stretched the same path needs no more knots than at the policy's pace.
    slow = power_of_two_below(path.period / (PER_ROW * law.rate * knot))
    t = knot_grid(knot, [
        (moving, power_of_two_below(moving / (2 * RESOLVE * knot))),
        (blend, min(power_of_two_below(blend / (RESOLVE * knot)), slow)),
        (lasts - law.tail, slow),
        (lasts, min(power_of_two_below(law.tail / (RESOLVE * knot)), slow)),
    ])  # fmt: skip
    b, bd, bdd = sample(base, begin - base.stamp + t)
    s, ds, dds = law.evaluate(t)
    p, p1, p2 = path.evaluate(s)
    n, nd, ndd = p, p1 * ds[:, None], p2 * (ds * ds)[:, None] + p1 * dds[:, None]
    u = np.minimum(t / blend, 1.0)[:, None]
    uv = u * (1.0 - u)
    w = u * u * u * (10.0 - 15.0 * u + 6.0 * u * u)
    dw = (30.0 / blend) * (uv * uv)
    ddw = (60.0 / blend**2) * uv * (1.0 - 2.0 * u)
    d, dd = n - b, nd - bd
    q, qd, qdd = b + w * d, bd + dw * d + w * dd, bdd + ddw * d + 2.0 * dw * dd + w * (ndd - bdd)
    q[-1], qd[-1], qdd[-1] = path.points[-1], 0.0, 0.0
    return Trajectory(base.joint_names, t, q, qd, qdd, begin)


def slow_along(base: Trajectory, begin: float, duration: float, knot: float) -> Trajectory:
    """Come to rest along the base's own path: base(tau(t)), tau' falling from 1 to 0 over `duration` seconds.

    tau' = 1 - (3u^2 - 2u^3): C2 with the base at begin, and no deviation from the planned path at all.
    """
    t = knot_grid(knot, [(duration, power_of_two_below(duration / (RESOLVE * knot)))])
    u = np.minimum(t / duration, 1.0)
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
    following, whatever `interpolate_from_desired_state` says and however late the message is. The base's own knots
    are kept (part of a quintic is the same quintic), so nothing between them changes either.
    """
    end = after.stamp - base.stamp  # all times below count from the base's start, exact multiples of a knot
    first = max((math.floor(now / knot) - history) * knot - base.stamp, float(base.times[0]))
    first = min(first, end - knot)
    q, qd, qdd = sample(base, first)
    i, k = (int(base.times.searchsorted(x)) for x in (first + 1e-9, end - 1e-9))
    return Trajectory(
        after.joint_names,
        np.concatenate([[0.0], base.times[i:k] - first, end - first + after.times]),
        np.concatenate([q[None], base.positions[i:k], after.positions]),
        np.concatenate([qd[None], base.velocities[i:k], after.velocities]),
        None
        if after.accelerations is None
        else np.concatenate([qdd[None], base.accelerations[i:k], after.accelerations]),
        base.stamp + first,
    )


def joined(first: Trajectory, after: Trajectory) -> Trajectory:
    """`first` up to the stamp of `after`, which must be its end, then `after`."""
    return Trajectory(
        first.joint_names,
        np.concatenate([first.times[:-1], after.stamp - first.stamp + after.times]),
        np.concatenate([first.positions[:-1], after.positions]),
        np.concatenate([first.velocities[:-1], after.velocities]),
        np.concatenate([first.accelerations[:-1], after.accelerations]),
        first.stamp,
    )


def hold(joint_names: tuple[str, ...], q: np.ndarray, begin: float, knot: float) -> Trajectory:
    """Rest at q (J,) from `begin` on."""
    zero = np.zeros((2, len(q)))
    return Trajectory(joint_names, np.array([0.0, knot]), np.stack([q, q]), zero, zero.copy(), begin)

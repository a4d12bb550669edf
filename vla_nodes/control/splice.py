"""From a reference in flight onto a new chunk's path: one quintic per joint.

    q(t), t in 0..T:  q, q', q'' at 0 are the reference's, at T those of path(s(t)), degree 5

Position, velocity and acceleration are continuous at both ends whatever the path is. T is the shortest of the
candidates that keeps the limits, so the arm is on its path as soon as it may be; and a quintic's remainder is a
quintic: a new splice onto an unchanged path arrives when the old one would have, however often it is repeated. (A
blend (1 - w) old + w new starts from w = 0 at every chunk and lets an arm that is behind fall further behind.)
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from vla_nodes.control.limits import ROUNDING, Limits
from vla_nodes.control.path import ChunkPath, TimeLaw
from vla_nodes.control.trajectory import Trajectory, quintic_weights, sample

RESOLVE = 32  # knots a stop along the plan is resolved with
SPACING = 0.06  # s between knots at most, roughly, where the path is followed
TAIL_KNOTS = 8  # knots the final deceleration has at least
_LOOK = np.linspace(0.0, 1.0, 11)  # where on a candidate the limits are looked at
_LOOKS = quintic_weights(_LOOK).transpose(1, 0, 2).reshape(-1, 5)  # positions, then velocities, then ...
_NOW = np.zeros(1)
# Times, over that of the path's end, at which an arm that is behind may arrive there. They are close to each other at
# first: an arm that takes a tenth longer than it needs, chunk after chunk, makes up for little.
_LATER = np.concatenate([1.03 ** np.arange(1, 25), 1.03**24 * 1.6 ** np.arange(1, 4)])
_APART = 1.1  # one candidate's time over the one before


def power_of_two_below(x: float) -> int:
    """Largest power of two not above x, at least 1."""
    return 1 << max(int(math.floor(math.log2(max(x, 1.0)))), 0)


def knot_grid(knot: float, sections: list[tuple[float, int]]) -> np.ndarray:
    """Times (N,) from 0, all multiples of `knot`.

    Args: sections: (end, step) in order: up to `end` seconds a point every `step` knots; the last end is reached or
    passed by less than a knot. There are two points at least, for a motion that takes no time too.
    """
    ticks, at = [], 0
    for end, step in sections:
        until = max(math.ceil(end / knot - 1e-9), 1)
        if until > at:
            ticks.append(np.arange(at, until, step))
            at = until
    return np.concatenate([*ticks, [at]]) * knot


def instants(path: ChunkPath, law: TimeLaw) -> np.ndarray:
    """Times (N,) s since the law's start at which a trajectory along `path` has its knots, the last at rest.

    At a constant rate they are where the spline's pieces meet: a piece is a cubic, which a quintic through its ends
    with their derivatives is, exactly.
    """
    parts = max(1, math.ceil(path.period / (law.rate * SPACING) - 1e-6))
    step = path.period / parts
    first, last = math.floor(law.start / step + 0.3) + 1, (law.start + law.rate * law.cruise) / step - 0.3
    cruise = (step * np.arange(first, math.floor(last) + 1) - law.start) / law.rate
    count = max(TAIL_KNOTS, math.ceil(law.tail / (0.5 * SPACING)))
    tail = law.cruise + law.tail * (np.arange(count + 1) / count)
    tail[-1] = law.duration
    return np.concatenate([cruise, tail])


def join_path(
    names: tuple[str, ...],
    begin: float,
    state: tuple[np.ndarray, np.ndarray, np.ndarray],
    path: ChunkPath,
    law: TimeLaw,
    limits: Limits,
    shortest: float,
    share: float,
) -> tuple[Trajectory, float, tuple[float, float]] | None:
    """From a state q, q', q'' (J,) at `begin` onto the path, and along it to rest.

    Args: shortest: s, least time until on the path; share: of the limits, that getting there may ask for.
    Returns: a quintic trajectory stamped `begin`, the time (s) after which it is on the path, and what it bridges (how
    far the path is at begin, rad and rad/s, at the policy's pace); None if there is none within the limits.
    """
    t = instants(path, law)
    t = np.concatenate([_NOW, t[t.searchsorted(shortest) :], max(law.duration, shortest) * _LATER])
    followed = len(t) - len(_LATER)  # later than the path's end: to where it ends
    chosen, least = [], 1e-6
    for i, x in enumerate(t.tolist()):
        if x >= least or i >= followed:
            chosen.append(i)
            least = _APART * x
    s, ds, dds = law.evaluate(t)
    along = path.evaluate(s)  # (3, T, J): position, and its derivatives first by s, then by time
    motion = np.array(state)  # (3, J)
    gap, gap_velocity = np.abs(along[:2, 0] - motion[:2]).max(axis=1).tolist()
    ds = ds[:, None]
    along[2] *= ds * ds
    along[2] += along[1] * dds[:, None]
    along[1] *= ds
    scale = np.empty((4, len(chosen), 1))  # h^0 .. h^3
    scale[0], scale[1:] = 1.0, t[chosen, None]
    np.multiply.accumulate(scale, axis=0, out=scale)
    data = np.empty((5, len(chosen), motion.shape[1]))
    data[::2] = along[:, chosen]
    data[0] -= motion[0]
    data[2::2] *= scale[1:3]
    np.multiply(motion[1:, None], scale[1:3], out=data[1::2])
    looks = (_LOOKS @ data.reshape(5, -1)).reshape(4, len(_LOOK), *data.shape[1:])
    lowest, highest = limits.around(motion[0])
    looks[0] += motion[0] - 0.5 * (lowest + highest)
    most = share * limits.rates
    # An arm that is faster than its share, or speeds up more, need not stop for that: it may go on, not beyond.
    most[:2] = np.maximum(most[:2], (1.0 + ROUNDING) * np.abs(motion[1:]))
    most = most[:, None] * scale[1:]
    inside = np.maximum.reduce(np.abs(looks, out=looks), axis=1)  # (4, C, J)
    good = (inside[0] <= 0.5 * (highest - lowest) + ROUNDING) & (inside[1:] <= most).all(axis=0)
    good = good.all(axis=1)
    best = int(good.argmax())
    if not good[best]:
        return None
    k = chosen[best]
    over, end = float(t[k]), max(followed, k + 1)
    u, weights = _parts(max(4, math.ceil(over / (1.5 * SPACING))))
    out = np.empty((3, 1 + len(u) + end - k, motion.shape[1]))
    out[:, 0] = motion
    np.divide(weights @ data[:, best], scale[:3, best, None], out=out[:, 1 : 1 + len(u)])
    out[0, 1 : 1 + len(u)] += motion[0]
    out[:, 1 + len(u) :] = along[:, k:end]
    out[0, -1], out[1:, -1] = path.points[-1], 0.0
    times = np.concatenate([_NOW, over * u, t[k:end]])
    return Trajectory(names, times, out[0], out[1], out[2], begin), over, (gap, gap_velocity)


@lru_cache(maxsize=128)
def _parts(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Fractions u (count - 1,) that divide a quintic into equal parts, and its weights there (3, count - 1, 5)."""
    u = np.arange(1, count) / count
    return u, quintic_weights(u)[:, :3].transpose(1, 0, 2).copy()


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


def clear_of_knots(base: Trajectory, at: float, knot: float, earlier: bool = False) -> float:
    """`at`, absolute s, moved on (or back) by eighths of a knot until no point of `base` is so near that the segment
    between them would be distorted by a message's whole nanoseconds."""
    step, near = (-0.125 if earlier else 0.125) * knot, knot / 16
    while True:
        away = np.abs(base.times - (at - base.stamp))
        if not ((away > 1e-9) & (away < near)).any():
            return at
        at += step


def with_prefix(base: Trajectory, now: float, after: Trajectory, knot: float, history: int = 2) -> Trajectory:
    """`after` preceded by the base's own motion from `history` knots before now.

    A receiver that gets the message at any time before after.stamp is then on the reference it is already
    following, whatever `interpolate_from_desired_state` says and however late the message is. The base's own knots
    are kept (part of a quintic is the same quintic), so nothing between them changes either.
    """
    end = after.stamp - base.stamp  # all times below count from the base's start, exact multiples of a knot
    first = min((math.floor(now / knot) - history) * knot - base.stamp, end - knot)
    first = max(clear_of_knots(base, base.stamp + first, knot, earlier=True) - base.stamp, float(base.times[0]))
    q, qd, qdd = sample(base, first)
    assert base.velocities is not None and after.velocities is not None  # every motion of ours has them
    i, k = (int(base.times.searchsorted(x)) for x in (first + 1e-9, end - 1e-9))
    accelerations = None  # a gripper's have none
    if after.accelerations is not None and base.accelerations is not None:
        accelerations = np.concatenate([qdd[None], base.accelerations[i:k], after.accelerations])
    return Trajectory(
        after.joint_names,
        np.concatenate([[0.0], base.times[i:k] - first, end - first + after.times]),
        np.concatenate([q[None], base.positions[i:k], after.positions]),
        np.concatenate([qd[None], base.velocities[i:k], after.velocities]),
        accelerations,
        base.stamp + first,
    )


def joined(first: Trajectory, after: Trajectory) -> Trajectory:
    """`first` up to the stamp of `after`, which must be its end, then `after`."""
    (v, a), (v_after, a_after) = first.derivatives(), after.derivatives()
    return Trajectory(
        first.joint_names,
        np.concatenate([first.times[:-1], after.stamp - first.stamp + after.times]),
        np.concatenate([first.positions[:-1], after.positions]),
        np.concatenate([v[:-1], v_after]),
        np.concatenate([a[:-1], a_after]),
        first.stamp,
    )


def hold(joint_names: tuple[str, ...], q: np.ndarray, begin: float, knot: float) -> Trajectory:
    """Rest at q (J,) from `begin` on."""
    zero = np.zeros((2, len(q)))
    return Trajectory(joint_names, np.array([0.0, knot]), np.stack([q, q]), zero, zero.copy(), begin)

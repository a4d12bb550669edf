"""A chunk as a smooth path in joint space, and the law that says where on it to be when.

The path is a uniform cubic B-spline whose control points are the chunk's rows: it is C2, never leaves the rows'
convex hull (so it keeps joint limits wherever the rows do), and its derivatives are bounded by the rows'
differences (de Boor, A Practical Guide to Splines, ch. XI). It departs from a row by at most a sixth of the row's
second difference, which is what takes a policy's row-to-row noise out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

# Between two rows a distance u in 0..1 apart the spline is a cubic in u: what position, first and second derivative
# (axis 1, in rows) take of the row before, the step to the next, and how the step changes at either row (axis 2), by
# power of u (axis 0). It is the B-spline's weights on four control points, collected.
_SPLINE = np.array(
    [
        [[1.0, 0.0, 1 / 6, 0.0], [0.0, 1.0, -1 / 2, 0.0], [0.0, 0.0, 1.0, 0.0]],
        [[0.0, 1.0, -1 / 2, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, -1.0, 1.0]],
        [[0.0, 0.0, 1 / 2, 0.0], [0.0, 0.0, -1 / 2, 1 / 2], [0.0, 0.0, 0.0, 0.0]],
        [[0.0, 0.0, -1 / 6, 1 / 6], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
    ]
)


@dataclass(frozen=True)
class ChunkPath:
    """points: (H + 1, J) rad, the measured pose at the stamp followed by the rows; period: s between them.

    The parameter s is nominal time since the chunk's stamp, s: 0 at the stamp, H * period at the last row.
    """

    points: np.ndarray
    period: float

    @property
    def length(self) -> float:
        """s of the last row."""
        return (len(self.points) - 1) * self.period

    def evaluate(self, s: np.ndarray) -> np.ndarray:
        """Position and its first and second derivative in s, (3, T, J), at s (T,) clipped to 0..length."""
        pieces, weights = self._pieces
        x = np.minimum(np.maximum(s, 0.0), self.length) / self.period
        i = np.minimum(x.astype(int), len(pieces) - 1)
        powers = np.empty((len(x), 4))
        powers[:, 0], powers[:, 1:] = 1.0, (x - i)[:, None]
        np.multiply.accumulate(powers, axis=1, out=powers)
        return ((powers @ weights).reshape(-1, 3, 4) @ pieces[i]).transpose(1, 0, 2)

    @cached_property
    def _pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """(H, 4, J): what _SPLINE weighs, and its weights (4, 12) in seconds."""
        steps, bends, _ = self._differences
        pieces = np.empty((len(self.points) - 1, 4, self.points.shape[1]))
        pieces[:, 0], pieces[:, 1], pieces[:, 2], pieces[:, 3] = self.points[:-1], steps[1:-1], bends[:-2], bends[1:-1]
        rate = 1.0 / self.period
        return pieces, (_SPLINE * np.array([[1.0], [rate], [rate * rate]])).reshape(4, 12)

    @cached_property
    def _differences(self) -> np.ndarray:
        """(3, H + 2, J): first, second (H + 1 of them) and third (H) differences of the control points."""
        c = self.points
        differences = np.zeros((3, len(c) + 1, c.shape[1]))
        steps, bends, turns = differences
        np.subtract(c[1:], c[:-1], out=steps[1:-1])
        # One control point past either end, in line, makes the spline start and end exactly on the first and last.
        steps[0], steps[-1] = steps[1], steps[-2]
        np.subtract(steps[1:], steps[:-1], out=bends[:-1])
        np.subtract(bends[1:-1], bends[:-2], out=turns[:-2])
        return differences

    def derivative_bounds(self, s: float) -> np.ndarray:
        """Upper bounds (3, J) of |d/ds|, |d2/ds2|, |d3/ds3| from s to the end: derivatives of a B-spline are convex
        combinations of its control points' differences."""
        i = max(min(int(s / self.period), len(self.points) - 2), 0)
        period = self.period
        bounds = np.maximum.reduce(np.abs(self._differences[:, i:]), axis=1)
        return bounds / np.array([[period], [period**2], [period**3]])


@dataclass(frozen=True)
class TimeLaw:
    """s(t): constant rate `rate` from s = start, slowing to rest at s = end over the last `tail` seconds.

    rate 1 is the policy's own pace; below 1 the same path takes longer. In the tail the rate falls as
    1 - (3u^2 - 2u^3), so s is C2 throughout and the path is never left.
    """

    start: float
    end: float
    rate: float
    tail: float

    @property
    def cruise(self) -> float:
        """Seconds at constant rate before the tail."""
        return max((self.end - self.start) / self.rate - 0.5 * self.tail, 0.0)

    @property
    def duration(self) -> float:
        """Seconds from start to rest."""
        return self.cruise + self.tail

    def evaluate(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """s and its first and second time derivative, (T,) each, at t (T,) s since the law's start."""
        cruise, rate, tail = self.cruise, self.rate, self.tail
        u = np.minimum(np.maximum((t - cruise) / tail, 0.0), 1.0)
        uu = u * u
        s = self.start + rate * (np.minimum(t, cruise) + tail * (u - uu * u * (1.0 - 0.5 * u)))
        return s, rate - rate * (uu * (3.0 - 2.0 * u)), (-6.0 * rate / tail) * (u - uu)


# Of c = (the path's own acceleration at full rate) / (what is allowed), 0..STEADY: the factor g(c) by which rest takes
# longer than rate * p' / allowed, the largest over the tail of 6u(1-u) / (1 - c f^2), f = 1 - 3u^2 + 2u^3.
STEADY = 0.85  # share of the acceleration that the path may take at a constant rate; the rest is for slowing down
_U = np.linspace(0.0, 1.0, 201)
_F2 = (1.0 - _U * _U * (3.0 - 2.0 * _U)) ** 2
_C = np.linspace(0.0, STEADY, 32)
_SLOWING = (6.0 * _U * (1.0 - _U) / (1.0 - _C[:, None] * _F2)).max(axis=1)


def time_law(
    path: ChunkPath,
    start: float,
    rates: np.ndarray,
    fastest: float = 1.0,
    shortest_tail: float = 0.2,
) -> TimeLaw:
    """The fastest law, at most `fastest` times the policy's pace, whose motion along `path` keeps the limits.

    Args: rates: (3, J), the most velocity, acceleration and jerk.
    Bounds the chain rule q' = p's', q'' = p''s'^2 + p's'', q''' = p'''s'^3 + 3p''s's'' + p's''' with the spline's
    derivative bounds: STEADY of the acceleration for the path's own, half of the jerk.
    """
    bounds = path.derivative_bounds(start)
    shares = bounds / rates
    # Reciprocal rates: how many times too fast the policy's pace is.
    slow1, slow2, slow3 = shares.max(axis=1).tolist()
    rate = 1.0 / max(slow1, math.sqrt(slow2 / STEADY), (2.0 * slow3) ** (1.0 / 3.0), 1.0 / fastest)
    speeding, bending = bounds[0] / rates[1], shares[1]  # p' and p'' in units of the acceleration, and of the jerk:
    jerk1, jerk2 = (bounds[:2] / rates[2]).max(axis=1).tolist()
    left = max(path.length - start, 0.0)
    for _ in range(20):
        slowing = np.interp(bending * (rate * rate), _C, _SLOWING)
        tail = max(
            shortest_tail,
            rate * float((slowing * speeding).max()),
            math.sqrt(24.0 * rate * jerk1),
            18.0 * rate * rate * jerk2,
        )
        if rate * tail * 0.5 <= left + 1e-12:
            break
        rate = 0.98 * min(rate, 2.0 * left / tail)  # too little path left to stop on: approach it slower
    return TimeLaw(start, path.length, rate, min(tail, 2.0 * left / rate) if rate > 0 else tail)


SMOOTHED = 0.45  # s, wavelength below which a motion is a policy's noise rather than its intention


def smoothed(points: np.ndarray, period: float, most: float) -> np.ndarray:
    """Points (N, J) with what is faster than SMOOTHED taken out, none moved by more than `most` (rad); ends stay.

    Least squares with a penalty on third differences (Whittaker, Proc. Edinburgh Math. Soc. 41, 1923), drawn back
    towards the points where it would move one of them farther: noise goes, corners stay.
    """
    if len(points) < 5 or most <= 0.0:
        return points
    change = _smoother(len(points), round(period, 4)) @ points
    farthest = float(np.abs(change).max())
    return points + change * min(1.0, most / max(farthest, 1e-12))


@lru_cache(maxsize=16)
def _smoother(count: int, period: float) -> np.ndarray:
    """(N, N): from points to how far smoothing moves them."""
    third = np.diff(np.eye(count), 3, axis=0)
    # A wave of wavelength L is halved where its third difference, (2 sin(pi period / L))^3, squared times this is 1.
    strength = min((2.0 * math.sin(min(math.pi * period / SMOOTHED, 1.5))) ** -6.0, 1e4)
    weight = np.eye(count)
    weight[0, 0] = weight[-1, -1] = 1e9
    return np.linalg.solve(weight + strength * third.T @ third, weight) - np.eye(count)

"""How far the reference has fallen behind the policy's pace: a delay that a new chunk need not catch up with."""

from __future__ import annotations

import numpy as np

from vla_nodes.control.path import TimeLaw


class Lag:
    """Seconds of nominal progress lost up to a time, as a piecewise linear function; only differences mean anything.

    Args: resting: whether time at rest counts as lost (settings at_rest "path"); keep: s of the past that is kept.
    """

    def __init__(self, resting: bool, keep: float) -> None:
        self._resting, self._keep = resting, keep
        self._steps: list[tuple[float, float]] = []

    def between(self, start: float, end: float) -> float:
        """Seconds lost from `start` to `end`, absolute times."""
        return self._at(end) - self._at(start)

    def follow(self, begin: float, t0: float, law: TimeLaw) -> None:
        """From `begin` on the reference stops for t0 s, then follows `law`."""
        lag = self._at(begin)
        kept = [x for x in self._steps if begin - self._keep < x[0] < begin]
        steps = [(begin, lag), (begin + t0, lag + t0)] if t0 > 0.0 else [(begin, lag)]
        lag += t0
        begin += t0
        if not self._resting:
            steps.append((begin + law.duration, lag + (1.0 - law.rate) * law.duration))
        else:
            for u in (0.0, 0.25, 0.5, 0.75, 1.0):
                t = law.cruise + u * law.tail
                steps.append((begin + t, lag + t - float(law.evaluate(np.array([t]))[0][0] - law.start)))
        self._steps = kept + steps

    def _at(self, t: float) -> float:
        rest = 1.0 if self._resting else 0.0
        if not self._steps:
            return rest * t
        first, last = self._steps[0], self._steps[-1]
        if t >= last[0]:
            return last[1] + rest * (t - last[0])
        if t <= first[0]:
            return first[1] - rest * (first[0] - t)
        for (t0, l0), (t1, l1) in zip(self._steps, self._steps[1:], strict=False):
            if t0 <= t <= t1:
                return l1 if t1 - t0 < 1e-9 else l0 + (l1 - l0) * (t - t0) / (t1 - t0)
        raise AssertionError("lag breakpoints are sorted")

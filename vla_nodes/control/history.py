"""The last measured joints, by time."""

from __future__ import annotations

from collections import deque

import numpy as np


class JointHistory:
    """Measured joint positions of the last `keep` seconds, interpolated between measurements. A measurement older than
    all of them begins anew: the clock they were stamped by was wrong, or was set back.

    Args: joints: J; keep: s; gap: s, how far from an asked time the nearest measurement may be.
    """

    def __init__(self, joints: int, keep: float, gap: float) -> None:
        self._shape, self._keep, self._gap = (joints,), keep, gap
        self._seen: deque[tuple[float, np.ndarray]] = deque()

    @property
    def latest(self) -> np.ndarray | None:
        """(J,) rad, None before the first measurement."""
        return self._seen[-1][1] if self._seen else None

    def observe(self, stamp: float, q: np.ndarray, qd: np.ndarray) -> bool:
        """Positions and velocities (J,) at `stamp`, s. Returns whether they were used: a measurement that is not
        finite, of another size or not later than the last one is ignored."""
        if self._seen and self._seen[-1][0] - self._keep <= stamp <= self._seen[-1][0]:
            return False
        q, qd = np.array(q, dtype=float), np.asarray(qd, dtype=float)
        if q.shape != self._shape or qd.shape != self._shape or not (np.isfinite(q).all() and np.isfinite(qd).all()):
            return False
        if self._seen and stamp < self._seen[-1][0]:
            self._seen.clear()
        self._seen.append((stamp, q))
        while self._seen[0][0] < stamp - self._keep:
            self._seen.popleft()
        return True

    def at(self, stamp: float) -> np.ndarray | None:
        """Joints (J,) rad at `stamp`; None if nothing was measured near it."""
        later = None
        for entry in reversed(self._seen):
            if entry[0] <= stamp:
                if later is None:
                    return entry[1] if stamp - entry[0] <= self._gap else None
                if min(stamp - entry[0], later[0] - stamp) > self._gap:
                    return None
                u = (stamp - entry[0]) / (later[0] - entry[0])
                return entry[1] + u * (later[1] - entry[1])
            later = entry
        return later[1] if later is not None and later[0] - stamp <= self._gap else None

    def clear(self) -> None:
        """Forget everything."""
        self._seen.clear()

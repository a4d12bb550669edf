"""Pushes on what a demonstration executes, never on the label: the data then hold mistakes and their mending."""

from __future__ import annotations

import numpy as np


class Disturbance:
    """For one episode, some of which stay undisturbed."""

    def __init__(self, rng: np.random.Generator, period: float) -> None:
        """``period``: s between two rows of a chunk."""
        self.rng, self.period = rng, period
        self.level = rng.choice([0.0, 0.5, 1.0], p=[0.25, 0.4, 0.35])
        self._until, self._push = 0.0, np.zeros(3)

    def __call__(self, chunk: np.ndarray, now: float) -> np.ndarray:
        """chunk (H, 7) of ee_delta rows as planned at ``now`` s; returns the one to execute."""
        disturbed = chunk.copy()
        if now > self._until:
            self._push = np.zeros(3)
            if self.rng.random() < 0.07 * self.level:
                self._until = now + self.rng.uniform(0.2, 0.7)
                self._push = self.rng.normal(0, 0.10, 3) * [1, 1, 0.7]  # m/s
        disturbed[:, :3] += self._push * self.period + self.rng.normal(0, 0.012, 3) * self.period * self.level
        if self.rng.random() < 0.004 * self.level:
            disturbed[:, 6] = 1.0 - disturbed[:, 6]
        return disturbed

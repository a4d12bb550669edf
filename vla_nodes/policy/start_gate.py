"""When a policy starts to move, when it gives up, and when a step of an instruction is done.

The network gives probabilities at every observation; the thresholds that make decisions of them belong to its weights
and come with its contract.
"""

from __future__ import annotations

import numpy as np

from vla_nodes.policy.contract import Thresholds


class StartGate:
    """Starts only on what is seen and understood, gives up on what is lost, counts steps done."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.reset()

    def reset(self) -> None:
        """Nothing has been decided yet."""
        self.started: bool | None = None  # None: still looking
        self._seen: list[float] = []
        self._lost = self._done = 0

    def start(self) -> None:
        """Go on without a decision, for one who knows that the step can be done."""
        self.started = True

    def judge(self, feasibility: float, grippers: np.ndarray, instruction: str) -> str:
        """Why to hold still, or "".

        Args:
            feasibility: 0..1, that all the instruction names is in view and can be done.
            grippers: openings 0..1; one that holds something may hide what it holds.
        """
        t = self.thresholds
        self._seen.append(feasibility)
        if self.started is None:
            if len(self._seen) < t.start_observations:
                return "looking for what the instruction names"
            self.started = float(np.mean(self._seen[-t.start_observations :])) >= t.start
        if not self.started:
            recent = float(np.mean(self._seen[-t.lost_observations :]))
            if len(self._seen) >= t.lost_observations and recent >= t.start_late:
                self.started = True
                return ""
            named = f'what "{instruction}" names'
            return f"{named} is not in view, or it is nothing this policy can do (certainty {recent:.2f})"
        low, high = t.holding
        holding = bool(np.any((low < np.asarray(grippers)) & (np.asarray(grippers) < high)))
        self._lost = self._lost + 1 if feasibility < t.lost and not holding else 0
        if self._lost >= t.lost_observations:
            self.started, self._seen = False, []
            return f'lost sight of what "{instruction}" names'
        self._seen.clear()
        return ""

    def step_done(self, done: float, moving: bool, more: bool) -> bool:
        """Whether the step under way is done and the next begins, from the probability 0..1 that it is done."""
        t = self.thresholds
        self._done = self._done + 1 if done > t.done and moving else 0
        if not more or self._done < t.done_observations:
            return False
        self._done = self._lost = 0
        return True

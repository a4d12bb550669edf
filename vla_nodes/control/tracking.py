"""Does the arm follow its reference, and if not: which of the two left the other?

A reference that was moved away from an arm which stayed behind (a contact, a brake, a speed slider) presses on, and has
to be let go. An arm that left a reference which stayed (a wrong zero, sag, a joint that wraps, a push) must not be
followed: its error is an offset, and a reference moved by it moves the arm by as much again, without end.
"""

from __future__ import annotations

import numpy as np


class Tracking:
    """Compares the measured joints with their reference, look by look."""

    def __init__(self, joint_names: tuple[str, ...], tolerance: float, time: float) -> None:
        """tolerance: rad, error of a joint that counts; time: s, how long it must last."""
        self._names, self._tolerance, self._time = joint_names, tolerance, time
        self.reset()

    def reset(self) -> None:
        """There is a new reference, or none: forget the old one."""
        self.problem = ""  # which joint is how far away, or "" if all are where they should be
        self._since: float | None = None
        # Where reference and arm were when they last agreed, for each joint (NaN: they never did).
        self._reference, self._measured = np.full((2, len(self._names)), np.nan)
        self.abandoned = np.zeros(len(self._names), dtype=bool)

    def look(self, reference: np.ndarray, measured: np.ndarray, steady: float) -> bool:
        """Whether the error has lasted too long. reference, measured: (J,) rad at one instant; steady: s.

        `problem` then says what is wrong, and `abandoned` (J,) which joints the reference itself left.
        """
        error = np.abs(reference - measured)
        agree = error <= self._tolerance
        self._reference[agree], self._measured[agree] = reference[agree], measured[agree]
        self.abandoned = ~agree & (np.abs(reference - self._reference) > np.abs(measured - self._measured))
        if agree.all():
            self.problem, self._since = "", None
            return False
        j = int(error.argmax())
        self.problem = f"{self._names[j]} is {error[j]:.3f} rad from its reference, {self._tolerance} rad is allowed"
        if self._since is None:
            self._since = steady
        return steady - self._since >= self._time

"""The action chunk: what a policy asks for, and against which observation (see ActionChunk.msg)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

MAX_ROWS = 512  # bounds on what is taken from outside
MAX_COLUMNS = 64
MAX_VALUE = 1e3  # m, rad: far beyond any arm, small enough for the arithmetic


class ActionSpace(str, Enum):
    """Meaning of the columns of a chunk that move the arm."""

    EE_DELTA = "ee_delta"  # dx dy dz (m), rotation vector (rad), base axes, one period; cumulative from the stamp
    EE_POSE = "ee_pose"  # x y z (m), qx qy qz qw, of the tool in base
    JOINT_DELTA = "joint_delta"  # rad per period, robot joint order; cumulative from the stamp
    JOINT_POSITION = "joint_position"  # rad, robot joint order

    @property
    def cartesian(self) -> bool:
        """Whether the columns are of the tool, in the base frame, and not of the joints."""
        return self.value in CARTESIAN

    def columns(self, joints: Sequence[str]) -> tuple[str, ...]:
        """Names of the columns, in the order in which control takes them, for an arm with these joints."""
        return CARTESIAN.get(self.value, tuple(joints))


CARTESIAN = {"ee_delta": ("dx", "dy", "dz", "rx", "ry", "rz"), "ee_pose": ("x", "y", "z", "qx", "qy", "qz", "qw")}


@dataclass(frozen=True)
class ActionChunk:
    """H future actions; row k is what is to be reached at stamp + (k + 1) * period.

    stamp: s, exposure time of the observation the chunk was computed from; instruction: what it serves;
    period: s between rows; actions: (H, D) float64: the arm's motion, in the columns of `action_space`, then for each
    of `grippers` (names of the robot's) its opening fraction, absolute, 0 closed .. 1 open. A message's columns may
    stand in another order (messages/convert.py sorts them).
    """

    stamp: float
    instruction: str
    period: float
    action_space: ActionSpace
    actions: np.ndarray
    grippers: tuple[str, ...] = ()

    @property
    def motion(self) -> np.ndarray:
        """(H, D - G): the columns that move the arm."""
        return self.actions[:, : self.actions.shape[1] - len(self.grippers)]

    @property
    def openings(self) -> np.ndarray:
        """(H, G) opening fractions in the order of `grippers`, as asked for (not clipped)."""
        return self.actions[:, self.actions.shape[1] - len(self.grippers) :]

    def problem(self, joints: Sequence[str], grippers: Sequence[str] = ()) -> str | None:
        """Why this chunk is unusable for an arm with these joints and grippers (names), whatever their state, or
        None."""
        actions = self.actions
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.size == 0:
            return f"actions must be a non-empty H x D array, got shape {np.shape(actions)}"
        if actions.shape[0] > MAX_ROWS or actions.shape[1] > MAX_COLUMNS:
            return f"actions of shape {actions.shape} exceed {MAX_ROWS} x {MAX_COLUMNS}"
        if foreign := [name for name in self.grippers if name not in grippers]:
            return f"no gripper {foreign[0][:40]!r}: the robot has {', '.join(grippers) or 'none'}"
        if len(set(self.grippers)) != len(self.grippers):
            return f"a gripper stands twice in {', '.join(self.grippers)}"
        arm = len(self.action_space.columns(joints))
        if actions.shape[1] != arm + len(self.grippers):
            return (
                f"{self.action_space.value} for {len(joints)} joints and {len(self.grippers)} grippers has "
                f"{arm + len(self.grippers)} columns, got {actions.shape[1]}"
            )
        if not math.isfinite(self.stamp) or not 1e-3 <= self.period <= 2.0:
            return f"stamp {self.stamp} or period {self.period} s is not usable (period 0.001 to 2 s)"
        largest = float(np.abs(actions).max())  # NaN where there is one
        if not largest <= MAX_VALUE:
            if not math.isfinite(largest):
                return f"{np.count_nonzero(~np.isfinite(actions))} of {actions.size} actions are NaN or infinite"
            return f"an action of {largest:.3g} is no position, angle or opening"
        if self.action_space is ActionSpace.EE_POSE and np.linalg.norm(actions[:, 3:7], axis=1).min() < 1e-3:
            return "quaternion of length zero"
        return None

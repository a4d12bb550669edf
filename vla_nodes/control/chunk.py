"""The action chunk: what a policy asks for, and against which observation (see ActionChunk.msg)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np

MAX_ROWS = 512  # bounds on what is taken from outside
MAX_COLUMNS = 64
MAX_VALUE = 1e3  # m, rad: far beyond any arm, small enough for the arithmetic


class ActionSpace(str, Enum):
    """Meaning of the columns of a chunk; the gripper (opening fraction 0 closed .. 1 open) is always the last."""

    EE_DELTA = "ee_delta"  # dx dy dz (m), rotation vector (rad), base axes, one period; cumulative from the stamp
    EE_POSE = "ee_pose"  # x y z (m), qx qy qz qw, of the tool in base
    JOINT_DELTA = "joint_delta"  # rad per period, robot joint order; cumulative from the stamp
    JOINT_POSITION = "joint_position"  # rad, robot joint order

    def columns(self, joints: int) -> int:
        """Width D of a chunk for an arm with `joints` joints, gripper included."""
        return {"ee_delta": 7, "ee_pose": 8}.get(self.value, joints + 1)


@dataclass(frozen=True)
class ActionChunk:
    """H future actions; row k is what is to be reached at stamp + (k + 1) * period.

    stamp: s, exposure time of the observation the chunk was computed from; instruction: what it serves;
    period: s between rows; actions: (H, D) float64, columns as `action_space` says.
    """

    stamp: float
    instruction: str
    period: float
    action_space: ActionSpace
    actions: np.ndarray

    def problem(self, joints: int) -> str | None:
        """Why this chunk is unusable for an arm with `joints` joints, whatever the robot's state, or None."""
        actions = self.actions
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.size == 0:
            return f"actions must be a non-empty H x D array, got shape {np.shape(actions)}"
        if actions.shape[0] > MAX_ROWS or actions.shape[1] > MAX_COLUMNS:
            return f"actions of shape {actions.shape} exceed {MAX_ROWS} x {MAX_COLUMNS}"
        expected = self.action_space.columns(joints)
        if actions.shape[1] != expected:
            return (
                f"{self.action_space.value} for {joints} joints has {expected} columns (gripper last), "
                f"got {actions.shape[1]}"
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

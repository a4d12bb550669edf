"""What the arm did next, as the chunk a policy should have given: recorded joints to ee_delta rows.

Row k of the chunk at stamp t is the tool's increment from t + k period to t + (k + 1) period (base axes, as
control/chunk.py has it), the first one from the tool pose measured at t; the last column is the gripper opening that
was wanted then.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from vla_nodes.control.robot import RobotModel
from vla_nodes.poses import rotation_vector

MAX_GAP = 0.2  # s between joint samples beyond which the motion in between is not known, as in messages/joints.py
REST_SPEED = 0.01  # m/s of the tool under which the arm rests
REST_TIME = 0.3  # s
STROKE = 0.05  # change of the opening (share of full) that is a motion of the gripper and no noise


@dataclass
class Track:
    """Joints over time, in order of stamp. `command` rows are what the controller was to follow, NaN where unknown."""

    stamps: list[float] = field(default_factory=list)
    q: list[np.ndarray] = field(default_factory=list)
    command: list[np.ndarray] = field(default_factory=list)
    opening: list[float] = field(default_factory=list)
    wanted: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.stamps)

    def add(self, stamp: float, q: np.ndarray, command: np.ndarray, opening: float, wanted: float) -> None:
        self.stamps.append(stamp)
        self.q.append(q)
        self.command.append(command)
        self.opening.append(opening)
        self.wanted.append(wanted)


def last_direction(opening: np.ndarray) -> np.ndarray:
    """The opening wanted, guessed from the one measured (N,): 1 after it last opened, 0 after it last closed.

    A gripper that holds something stands half open, and yet the command is "close": where it went last says so.
    Before the first motion: 1 if more than half open.
    """
    out = np.empty(len(opening))
    state = 1.0 if len(opening) and opening[0] > 0.5 else 0.0
    extreme = opening[0] if len(opening) else 0.0
    for i, value in enumerate(opening):
        extreme = max(extreme, value) if state else min(extreme, value)
        if abs(value - extreme) > STROKE:
            state, extreme = 1.0 - state, value
        out[i] = state
    return out


def chunks(
    track: Track, stamps: np.ndarray, robot: RobotModel, horizon: int, period: float, commanded: bool
) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Actions (T, horizon, 7) float32 for observations at `stamps` (T,), which of them are usable (T,), and why not.

    Args: commanded: rows lead to where the controller was told to go, else to where the arm went.

    After the last sample the arm counts as standing still if it rested there; otherwise nothing is known of what
    followed, and the observations that would need it are not usable.
    """
    why: Counter[str] = Counter()
    count = len(stamps)
    if len(track) < 2:
        why["no joint_states around it"] += count
        return np.zeros((count, horizon, 7), np.float32), np.zeros(count, bool), why
    times = np.array(track.stamps)
    q = np.array(track.q)
    path = np.where(np.isnan(command := np.array(track.command)), q, command) if commanded else q
    opening = np.array(track.opening)
    wanted = np.where(np.isnan(told := np.array(track.wanted)), last_direction(opening), told)

    ahead = stamps[:, None] + period * np.arange(1, horizon + 1)
    known = (stamps >= times[0]) & (stamps <= times[-1])
    why["no joint_states around it"] += int(count - known.sum())
    if not _rests(times, q, opening, robot):
        past_end = known & (ahead[:, -1] > times[-1])
        why["the recording ends in motion: what followed is not known"] += int(past_end.sum())
        known &= ~past_end
    holes = times[:-1][np.diff(times) > MAX_GAP]  # the start of each hole
    ends = times[1:][np.diff(times) > MAX_GAP]
    torn = known & ((stamps[:, None] < ends) & (ahead[:, -1:] > holes)).any(axis=1)
    why["joint_states have a gap in what followed"] += int(torn.sum())
    known &= ~torn

    def at(rows: np.ndarray, when: np.ndarray) -> np.ndarray:
        return np.stack([np.interp(when, times, column) for column in rows.T], axis=-1)

    start, start_turn, _ = robot.kinematics(at(q, stamps))
    places, turns, _ = robot.kinematics(at(path, ahead.reshape(-1)))
    places = np.concatenate([start[:, None], places.reshape(count, horizon, 3)], axis=1)
    turns = np.concatenate([start_turn[:, None], turns.reshape(count, horizon, 3, 3)], axis=1)
    actions = np.empty((count, horizon, 7), np.float32)
    actions[..., :3] = np.diff(places, axis=1)
    steps = turns[:, 1:] @ turns[:, :-1].transpose(0, 1, 3, 2)
    actions[..., 3:6] = rotation_vector(steps.reshape(-1, 3, 3)).reshape(count, horizon, 3)
    latest = np.clip(np.searchsorted(times, ahead + 1e-9, side="right") - 1, 0, len(times) - 1)
    actions[..., 6] = wanted[latest]
    return actions, known, +why


def _rests(times: np.ndarray, q: np.ndarray, opening: np.ndarray, robot: RobotModel) -> bool:
    """Whether the arm and the gripper stand still at the end."""
    last = times >= times[-1] - REST_TIME
    if last.sum() < 2:
        return False
    places, _, _ = robot.kinematics(q[last])
    moved = float(np.linalg.norm(places - places[-1], axis=1).max())  # not the path: encoders are never quite still
    return moved / REST_TIME < REST_SPEED and float(np.ptp(opening[last])) < STROKE

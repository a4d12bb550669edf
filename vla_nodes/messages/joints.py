"""Joint states by name, and their history by stamp, without ROS.

joint_state_broadcaster promises no order of joints and may leave velocities out (ros2_controllers userdoc), and a robot
may name its joints otherwise than the checkpoint: everything that reads joint_states maps by name here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_JOINTS = 256
"""Largest joint_states message taken, in joints."""


class JointStatesError(ValueError):
    """A joint_states message that cannot be used; the text names the joints and the remedy."""


@dataclass(frozen=True)
class JointSample:
    """Positions and velocities of the joints at one time, in the order that was asked for."""

    stamp: float
    """s"""
    position: np.ndarray
    """(J,) rad, or m for fingers"""
    velocity: np.ndarray
    """(J,) rad/s or m/s"""


def parse_joint_map(entries: Sequence[str], joint_names: Sequence[str]) -> dict[str, str]:
    """`["joint1:left_joint1", ...]` (ours:robot's) to {ours: robot's}; joints not listed keep their name.

    Raises:
        JointStatesError: an entry that is no pair, or that names a joint we do not have.
    """
    mapping = {name: name for name in joint_names}
    for entry in entries:
        ours, colon, theirs = entry.partition(":")
        if not entry:
            continue  # an empty list cannot be written in a ROS params file, [''] can
        if not colon or not theirs.strip():
            raise JointStatesError(f"joint_map entry '{entry}' is not of the form 'our_joint:robot_joint'")
        if ours.strip() not in mapping:
            raise JointStatesError(f"joint_map names '{ours.strip()}', which is none of {', '.join(joint_names)}")
        mapping[ours.strip()] = theirs.strip()
    return mapping


class JointReader:
    """Picks given joints out of joint_states messages, whatever their order."""

    def __init__(self, joint_names: Sequence[str], mapping: dict[str, str] | None = None) -> None:
        self.joint_names = tuple(joint_names)
        self._wanted = tuple((mapping or {}).get(name, name) for name in self.joint_names)
        self._seen: tuple[str, ...] | None = None
        self._index = np.zeros(0, dtype=int)

    def read(
        self, names: Sequence[str], position: Sequence[float], velocity: Sequence[float] = ()
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(J,) positions and (J,) velocities (None if the message has none) in the order of `joint_names`.

        Raises:
            JointStatesError: joints missing, arrays of unequal length, values not finite, or too many joints.
        """
        names = tuple(names)
        if names != self._seen:
            if len(names) > MAX_JOINTS:
                raise JointStatesError(f"joint_states has {len(names)} joints, at most {MAX_JOINTS} are accepted")
            missing = [name for name in self._wanted if name not in names]
            if missing:
                found = ", ".join(names[:12]) or "none"
                raise JointStatesError(
                    f"joint_states lacks {', '.join(missing)} (it has {found}): "
                    "remap joint_states to the arm's, or set parameter joint_map"
                )
            double = [name for name in self._wanted if names.count(name) > 1]
            if double:
                raise JointStatesError(f"joint_states names {', '.join(double)} more than once: which is it?")
            self._index = np.array([names.index(name) for name in self._wanted], dtype=int)
            self._seen = names
        if len(position) != len(names):
            raise JointStatesError(f"joint_states has {len(names)} names but {len(position)} positions")
        q = np.asarray(position, dtype=float)[self._index]
        if not np.isfinite(q).all():
            raise JointStatesError(
                f"joint_states position of {self._wanted[int(np.argmin(np.isfinite(q)))]} is not finite"
            )
        if len(velocity) == 0:
            return q, None
        if len(velocity) != len(names):
            raise JointStatesError(f"joint_states has {len(names)} names but {len(velocity)} velocities")
        qd = np.asarray(velocity, dtype=float)[self._index]
        # Drivers that cannot measure a velocity send NaN: that is "none", not an error.
        return q, (qd if np.isfinite(qd).all() else None)


class JointInput:
    """The joint_states of one robot, read by name; `problem` says what is wrong with the newest."""

    def __init__(self, joint_names: Sequence[str], joint_map: Sequence[str]) -> None:
        """joint_map: pairs as `parse_joint_map` takes them. Raises JointStatesError."""
        mapping = parse_joint_map(joint_map, joint_names)
        self.robot_names = tuple(mapping[name] for name in joint_names)
        self.problem = ""
        """What is wrong with the newest message, or ''."""
        self._reader = JointReader(joint_names, mapping)

    def read(
        self, names: Sequence[str], position: Sequence[float], velocity: Sequence[float] = ()
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """As `JointReader.read`, but None where that raises."""
        try:
            joints = self._reader.read(names, position, velocity)
        except JointStatesError as error:
            self.problem = str(error)
            return None
        self.problem = ""
        return joints


class JointHistory:
    """The last second or so of joint samples, interpolated linearly at any stamp between two of them."""

    def __init__(self, span: float = 2.0, max_gap: float = 0.2, limit: int = 2048) -> None:
        """span: s kept; max_gap: s between two samples beyond which nothing is interpolated; limit: samples kept."""
        self.span = span
        self.max_gap = max_gap
        self._samples: deque[JointSample] = deque(maxlen=limit)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def newest(self) -> JointSample | None:
        return self._samples[-1] if self._samples else None

    def clear(self) -> None:
        self._samples.clear()

    def add(self, stamp: float, position: np.ndarray, velocity: np.ndarray | None) -> bool:
        """Append a sample; False if it is not newer than the newest. A missing velocity follows from the positions."""
        last = self.newest
        if last is not None and stamp <= last.stamp:
            return False
        if velocity is None:
            velocity = np.zeros_like(position) if last is None else (position - last.position) / (stamp - last.stamp)
        self._samples.append(JointSample(stamp, position, velocity))
        while self._samples[0].stamp < stamp - self.span:
            self._samples.popleft()
        return True

    def at(self, stamp: float) -> JointSample | None:
        """Joints at `stamp`, or None where no two samples at most `max_gap` apart enclose it."""
        index = bisect_left(self._samples, stamp, key=lambda sample: sample.stamp)
        if index == len(self._samples):
            return None
        after = self._samples[index]
        if after.stamp == stamp:
            return after
        if index == 0:
            return None
        before = self._samples[index - 1]
        gap = after.stamp - before.stamp
        if gap > self.max_gap:
            return None
        w = (stamp - before.stamp) / gap
        return JointSample(
            stamp,
            (1 - w) * before.position + w * after.position,
            (1 - w) * before.velocity + w * after.velocity,
        )

"""Pairs colour, depth, camera_info and joint states of one instant, newest first, without ROS.

The policy wants the newest complete observation, never a queue of old ones: only a few messages per stream are kept, a
new complete set supersedes every older message, and each message that was not used is counted with the reason.
Stamps are exposure times; drivers with aligned depth give colour, depth and both camera_infos the same one
(RealSense `enable_sync`), others differ by up to `slop`. Joints are interpolated at the colour stamp.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_nodes.messages.joints import JointHistory, JointSample

KEEP = 4
"""Messages kept per image stream: enough for the other stream of the same frame to be that many frames late."""


@dataclass(frozen=True)
class Pair:
    """One complete observation; colour, depth and info are whatever was given to `add` (not yet decoded)."""

    stamp: float
    """s, of the colour image; never rewritten"""
    color: Any
    depth: Any | None
    info: Any
    joints: JointSample
    depth_skew: float
    """s, depth stamp minus colour stamp"""


@dataclass(order=True)
class _Item:
    stamp: float
    payload: Any = None

    __hash__ = None  # type: ignore[assignment]


class ObservationSync:
    """Latest-only pairing. Not thread-safe: one thread adds and takes (a node's executor)."""

    def __init__(
        self,
        slop: float = 0.02,
        use_depth: bool = True,
        info_max_age: float = 1.0,
        joint_gap: float = 0.2,
        jump_back: float = 0.5,
    ) -> None:
        """
        Args:
            slop: s, largest |depth stamp - colour stamp|.
            use_depth: False for a policy without depth; depth is then neither awaited nor kept.
            info_max_age: s, largest distance of the camera_info used. A calibration changes rarely, so a lost
                camera_info message does not cost the frame.
            joint_gap: s, joint samples further apart are not interpolated.
            jump_back: s, a stamp this far behind the newest of its stream means that the clock was set back (a bag that
                loops, a simulator that was reset): everything kept is of another time and is dropped.
        """
        self.slop = slop
        self.use_depth = use_depth
        self.info_max_age = info_max_age
        self.jump_back = jump_back
        self.joints = JointHistory(max_gap=joint_gap)
        self.dropped: Counter[str] = Counter()
        self.jumps = 0
        self.taken = 0
        self._streams: dict[str, list[_Item]] = {"color": [], "depth": [], "info": []}
        self._last_stamp = -np.inf

    def clear(self) -> None:
        """Forget all messages (not the counts)."""
        for stream in self._streams.values():
            stream.clear()
        self.joints.clear()
        self._last_stamp = -np.inf

    def add_color(self, stamp: float, payload: Any) -> None:
        self._add("color", stamp, payload)

    def add_depth(self, stamp: float, payload: Any) -> None:
        if self.use_depth:
            self._add("depth", stamp, payload)

    def add_info(self, stamp: float, payload: Any) -> None:
        self._add("info", stamp, payload)

    def add_joints(self, stamp: float, position: np.ndarray, velocity: np.ndarray | None) -> None:
        """(J,) positions and velocities in the reader's order, see `messages.joints.JointReader`."""
        newest = self.joints.newest
        if newest is not None and stamp < newest.stamp - self.jump_back:
            self._jump()
        if not self.joints.add(stamp, position, velocity):
            self.dropped["joints: out of order"] += 1

    def newest(self, stream: str) -> float | None:
        """Stamp of the newest message of "color", "depth" or "info", or None."""
        items = self._streams[stream]
        return items[-1].stamp if items else None

    def take(self) -> Pair | None:
        """The newest complete observation newer than the last taken, or None. All older messages are dropped."""
        colors = self._streams["color"]
        for index in range(len(colors) - 1, -1, -1):
            pair = self._complete(colors[index])
            if pair is not None:
                self._supersede(index, pair)
                return pair
        return None

    def why_not(self) -> str:
        """One line for the operator: what the newest colour image lacks. Empty if nothing is lacking."""
        colors = self._streams["color"]
        if not colors:
            return "no colour image" if self._last_stamp == -np.inf else "no new colour image"
        item = colors[-1]
        if self.use_depth and self._nearest("depth", item.stamp, self.slop) is None:
            newest = self.newest("depth")
            if newest is None:
                return "no depth image" if self._last_stamp == -np.inf else "no new depth image"
            offset = f"{newest - item.stamp:+.3f} s"
            return f"no depth image within {self.slop * 1e3:.0f} ms of the colour image (newest {offset})"
        if self._nearest("info", item.stamp, self.info_max_age) is None:
            return "no camera_info"
        if self.joints.at(item.stamp) is None:
            newest = self.joints.newest
            if newest is None:
                return "no joint_states"
            return f"no joint_states around the image's stamp (newest {newest.stamp - item.stamp:+.3f} s)"
        return ""

    def _add(self, name: str, stamp: float, payload: Any) -> None:
        stream = self._streams[name]
        newest = max(stream[-1].stamp if stream else -np.inf, self._last_stamp if name == "color" else -np.inf)
        if stamp < newest - self.jump_back:
            self._jump()
        elif name == "color" and stamp <= self._last_stamp:
            self.dropped["color: older than what was used"] += 1
            return
        if any(item.stamp == stamp for item in stream):
            self.dropped[f"{name}: stamp repeated"] += 1
            return
        insort(stream, _Item(stamp, payload), key=lambda item: item.stamp)
        if len(stream) > KEEP:
            del stream[0]
            self.dropped[f"{name}: never completed" if name == "color" else f"{name}: unused"] += 1

    def _complete(self, color: _Item) -> Pair | None:
        depth = self._nearest("depth", color.stamp, self.slop) if self.use_depth else None
        info = self._nearest("info", color.stamp, self.info_max_age)
        if info is None or (self.use_depth and depth is None):
            return None
        joints = self.joints.at(color.stamp)
        if joints is None:
            return None
        if depth is None:
            return Pair(color.stamp, color.payload, None, info.payload, joints, 0.0)
        return Pair(color.stamp, color.payload, depth.payload, info.payload, joints, depth.stamp - color.stamp)

    def _nearest(self, name: str, stamp: float, tolerance: float) -> _Item | None:
        stream = self._streams[name]
        index = bisect_left(stream, stamp, key=lambda item: item.stamp)
        near = min(stream[max(index - 1, 0) : index + 1], key=lambda item: abs(item.stamp - stamp), default=None)
        # The tolerance is compared with a nanosecond's grace: stamps are floats of nanosecond integers.
        return near if near is not None and abs(near.stamp - stamp) <= tolerance + 1e-9 else None

    def _supersede(self, index: int, pair: Pair) -> None:
        """Forget the colour taken and all that is older; what was never used is counted."""
        if index:
            self.dropped["color: superseded"] += index
        del self._streams["color"][: index + 1]
        depths = self._streams["depth"]
        depths[:] = [item for item in depths if item.stamp > pair.stamp + pair.depth_skew + 1e-12]
        infos = self._streams["info"]
        infos[:] = [item for item in infos if item.stamp >= pair.stamp] or infos[-1:]
        self._last_stamp = pair.stamp
        self.taken += 1

    def _jump(self) -> None:
        self.clear()
        self.jumps += 1
        self.dropped["all: clock set back"] += 1

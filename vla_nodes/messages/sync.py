"""Pairs the images of all cameras, their camera_infos and the joint states of one instant, newest first, without ROS.

The policy wants the newest complete observation, never a queue of old ones: only a few messages per stream are kept, a
new complete set supersedes every older message, and each message that was not used is counted with the reason.
Stamps are exposure times. The first camera's colour image leads: every other camera's colour image is the nearest to
it, and each camera's depth the nearest to its own colour image, both within `slop` (drivers with aligned depth give
colour, depth and both camera_infos one stamp, such as RealSense with `enable_sync`). Joints are interpolated at the
leading stamp.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_nodes.messages.joints import JointHistory, JointSample

KEEP = 4
"""Messages kept per image stream: enough for the other stream of the same frame to be that many frames late."""


@dataclass(frozen=True)
class CameraStreams:
    """What is awaited of one camera beside its colour images."""

    name: str = "camera"
    depth: bool = True
    info: bool = True  # camera_info


@dataclass(frozen=True)
class Frame:
    """What one camera saw; colour, depth and info are whatever was given to `add` (not yet decoded)."""

    stamp: float
    """s, of the colour image; never rewritten"""
    color: Any
    depth: Any | None = None
    info: Any | None = None
    depth_skew: float = 0.0
    """s, depth stamp minus colour stamp"""


@dataclass(frozen=True)
class Pair:
    """One complete observation."""

    frames: dict[str, Frame]
    """by camera, in the order given to ObservationSync"""
    joints: JointSample

    @property
    def first(self) -> Frame:
        """The leading camera's."""
        return next(iter(self.frames.values()))

    @property
    def stamp(self) -> float:
        """s, of the leading camera's colour image."""
        return self.first.stamp


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
        cameras: Sequence[CameraStreams] = (CameraStreams(),),
        info_max_age: float = 1.0,
        joint_gap: float = 0.2,
        jump_back: float = 0.5,
    ) -> None:
        """
        Args:
            slop: s, largest difference of two images' stamps in one observation, see the module's docstring.
            cameras: the first one leads. What is not awaited of one is not kept either.
            info_max_age: s, largest distance of the camera_info used. A calibration changes rarely, so a lost
                camera_info message does not cost the frame.
            joint_gap: s, joint samples further apart are not interpolated.
            jump_back: s, a stamp this far behind the newest of its stream means that the clock was set back (a bag that
                loops, a simulator that was reset): everything kept is of another time and is dropped.
        """
        self.slop = slop
        self.cameras = {camera.name: camera for camera in cameras}
        self._leader = cameras[0].name
        self.info_max_age = info_max_age
        self.jump_back = jump_back
        self.joints = JointHistory(max_gap=joint_gap)
        self.dropped: Counter[str] = Counter()
        self.jumps = 0
        self.taken = 0
        self._streams: dict[tuple[str, str], list[_Item]] = {
            (name, kind): [] for name in self.cameras for kind in ("color", "depth", "info")
        }
        self._last_stamp = -np.inf

    def clear(self) -> None:
        """Forget all messages (not the counts)."""
        for stream in self._streams.values():
            stream.clear()
        self.joints.clear()
        self._last_stamp = -np.inf

    def add_color(self, stamp: float, payload: Any, camera: str = "") -> None:
        """camera: its name; "": the leading one, here and below."""
        self._add(camera or self._leader, "color", stamp, payload)

    def add_depth(self, stamp: float, payload: Any, camera: str = "") -> None:
        if self.cameras[camera or self._leader].depth:
            self._add(camera or self._leader, "depth", stamp, payload)

    def add_info(self, stamp: float, payload: Any, camera: str = "") -> None:
        if self.cameras[camera or self._leader].info:
            self._add(camera or self._leader, "info", stamp, payload)

    def add_joints(self, stamp: float, position: np.ndarray, velocity: np.ndarray | None) -> None:
        """(J,) positions and velocities in the reader's order, see `messages.joints.JointReader`."""
        newest = self.joints.newest
        if newest is not None and stamp < newest.stamp - self.jump_back:
            self._jump()
        if not self.joints.add(stamp, position, velocity):
            self.dropped["joints: out of order"] += 1

    def newest(self, stream: str, camera: str = "") -> float | None:
        """Stamp of the newest message of "color", "depth" or "info", or None."""
        items = self._streams[camera or self._leader, stream]
        return items[-1].stamp if items else None

    def take(self) -> Pair | None:
        """The newest complete observation newer than the last taken, or None. All older messages are dropped."""
        colors = self._streams[self._leader, "color"]
        for index in range(len(colors) - 1, -1, -1):
            pair = self._complete(colors[index])
            if pair is not None:
                self._supersede(pair)
                return pair
        return None

    def why_not(self) -> str:
        """One line for the operator: what the newest leading colour image lacks. Empty if nothing is lacking."""
        colors = self._streams[self._leader, "color"]
        if not colors:
            return f"no {self._new}{self._of(self._leader)}colour image"
        for name in self.cameras:
            if why := self._lacking(name, colors[-1]):
                return why
        stamp = colors[-1].stamp
        if self.joints.at(stamp) is None:
            newest = self.joints.newest
            if newest is None:
                return "no joint_states"
            return f"no joint_states around the image's stamp (newest {newest.stamp - stamp:+.3f} s)"
        return ""

    def unused_images(self) -> int:
        """Colour images that came and were not used."""
        return sum(count for reason, count in self.dropped.items() if reason.partition(":")[0].endswith("color"))

    def _lacking(self, camera: str, lead: _Item) -> str:
        """What one camera lacks for an observation at the leading colour image."""
        color, of = lead, self._of(camera)
        if camera != self._leader:
            found = self._nearest(camera, "color", lead.stamp, self.slop)
            if found is None:
                newest, leading = self.newest("color", camera), f"the {self._of(self._leader)}colour image"
                return self._apart(f"{of}colour image", newest, lead.stamp, leading)
            color = found
        if self.cameras[camera].depth and self._nearest(camera, "depth", color.stamp, self.slop) is None:
            newest = self.newest("depth", camera)
            return self._apart(f"{of}depth image", newest, color.stamp, "the colour image")
        if self.cameras[camera].info and self._nearest(camera, "info", color.stamp, self.info_max_age) is None:
            return f"no {of}camera_info"
        return ""

    def _apart(self, what: str, newest: float | None, stamp: float, other: str) -> str:
        if newest is None:
            return f"no {self._new}{what}"
        return f"no {what} within {self.slop * 1e3:.0f} ms of {other} (newest {newest - stamp:+.3f} s)"

    @property
    def _new(self) -> str:
        return "" if self._last_stamp == -np.inf else "new "

    def _of(self, camera: str) -> str:
        """A camera's name, where there are several."""
        return f"{camera} " if len(self.cameras) > 1 else ""

    def _add(self, camera: str, kind: str, stamp: float, payload: Any) -> None:
        stream, leading = self._streams[camera, kind], (camera, kind) == (self._leader, "color")
        newest = max(stream[-1].stamp if stream else -np.inf, self._last_stamp if leading else -np.inf)
        label = f"{self._of(camera)}{kind}"
        if stamp < newest - self.jump_back:
            self._jump()
        elif leading and stamp <= self._last_stamp:
            self.dropped[f"{label}: older than what was used"] += 1
            return
        if any(item.stamp == stamp for item in stream):
            self.dropped[f"{label}: stamp repeated"] += 1
            return
        insort(stream, _Item(stamp, payload), key=lambda item: item.stamp)
        if len(stream) > KEEP:
            del stream[0]
            self.dropped[f"{label}: never completed" if kind == "color" else f"{label}: unused"] += 1

    def _complete(self, lead: _Item) -> Pair | None:
        frames = {}
        for name in self.cameras:
            color = lead if name == self._leader else self._nearest(name, "color", lead.stamp, self.slop)
            frame = None if color is None else self._frame(self.cameras[name], color)
            if frame is None:
                return None
            frames[name] = frame
        joints = self.joints.at(lead.stamp)
        return None if joints is None else Pair(frames, joints)

    def _frame(self, camera: CameraStreams, color: _Item) -> Frame | None:
        depth = self._nearest(camera.name, "depth", color.stamp, self.slop) if camera.depth else None
        info = self._nearest(camera.name, "info", color.stamp, self.info_max_age) if camera.info else None
        if (camera.depth and depth is None) or (camera.info and info is None):
            return None
        return Frame(
            color.stamp,
            color.payload,
            None if depth is None else depth.payload,
            None if info is None else info.payload,
            0.0 if depth is None else depth.stamp - color.stamp,
        )

    def _nearest(self, camera: str, kind: str, stamp: float, tolerance: float) -> _Item | None:
        stream = self._streams[camera, kind]
        index = bisect_left(stream, stamp, key=lambda item: item.stamp)
        near = min(stream[max(index - 1, 0) : index + 1], key=lambda item: abs(item.stamp - stamp), default=None)
        # The tolerance is compared with a nanosecond's grace: stamps are floats of nanosecond integers.
        return near if near is not None and abs(near.stamp - stamp) <= tolerance + 1e-9 else None

    def _supersede(self, pair: Pair) -> None:
        """Forget the images taken and all that is older; colour images that were never used are counted."""
        for name, frame in pair.frames.items():
            colors = self._streams[name, "color"]
            older = sum(item.stamp < frame.stamp for item in colors)
            if older:
                self.dropped[f"{self._of(name)}color: superseded"] += older
            del colors[: older + 1]
            depths = self._streams[name, "depth"]
            depths[:] = [item for item in depths if item.stamp > frame.stamp + frame.depth_skew + 1e-12]
            infos = self._streams[name, "info"]
            infos[:] = [item for item in infos if item.stamp >= frame.stamp] or infos[-1:]
        self._last_stamp = pair.stamp
        self.taken += 1

    def _jump(self) -> None:
        self.clear()
        self.jumps += 1
        self.dropped["all: clock set back"] += 1

"""Where the camera stands when an image is taken: the pose of its colour optical frame in the robot's base.

From one of three sources: "topic" (<camera>/pose, the latest), "parameter" (a calibration that is written down), or
"tf" (/tf and /tf_static, at the image's stamp, through however many frames the camera is mounted). The same code on
the robot and in replay.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_nodes.messages.convert import pose_matrix, seconds
from vla_nodes.poses import between, matrix_from

SOURCES = ("topic", "parameter", "tf")
KEEP = 10.0
"""s of /tf that are kept, as tf2 does."""
LAG = 1.0
"""s that the newest transform may be older than an image. Up to there a moving camera is taken where it last was."""
MAX_FRAMES = 1000
"""Most frames remembered, and most in a chain."""


class CameraPose:
    """Takes messages, gives poses; `problem` says why there is none."""

    def __init__(self, source: str, base: str, written: Sequence[float] = (), camera: str = "camera") -> None:
        """base: frame that poses are in; written: x y z (m) qx qy qz qw for source "parameter"; camera: its name, which
        its topics and, where its images name none, its frame begin with. Raises ValueError."""
        self.source, self._base, self._camera = source, base, camera
        self._matrix = matrix_from(written) if source == "parameter" else None
        self._transforms = Transforms()
        self.problem = {"topic": f"no {camera}/pose so far", "tf": "no /tf so far"}.get(source, "")

    def pose(self, message: Any) -> str:
        """A PoseStamped of <camera>/pose. Returns "" or why it cannot be used."""
        self._matrix, self.problem = None, ""
        if message.header.frame_id != self._base:
            self.problem = (
                f"{self._camera}/pose is in frame '{message.header.frame_id}', the robot's base is '{self._base}'"
            )
        else:
            try:
                self._matrix = pose_matrix(message.pose)
            except ValueError as error:
                self.problem = f"{self._camera}/pose: {error}"
        return self.problem

    def transforms(self, message: Any, static: bool) -> None:
        """A TFMessage of /tf, or of /tf_static."""
        self._transforms.add(message.transforms, static)

    def at(self, stamp: float, frame: str) -> np.ndarray | None:
        """T_base_camera (4, 4) for an image of frame `frame` at `stamp` [s], or None; then `problem` says why."""
        if self.source == "tf":
            frame = frame or f"{self._camera}_color_optical_frame"
            try:
                self._matrix, self.problem = self._transforms.find(self._base, frame, stamp), ""
            except LookupError as error:
                self._matrix, self.problem = None, str(error)
        return self._matrix

    def clear(self) -> None:
        """The clock was set back: forget every transform that changes with time."""
        self._transforms.forget_moving()


@dataclass
class _Link:
    """Pose of a frame in its parent over time: entries (s, (3,) m, (4,) x y z w). A static one has one entry."""

    parent: str
    static: bool
    entries: list[tuple[float, np.ndarray, np.ndarray]] = field(default_factory=list)

    def at(self, stamp: float) -> np.ndarray:
        """(4, 4) at a time: linear in position and spherical in rotation between the two nearest entries."""
        k = bisect_right(self.entries, stamp, key=lambda entry: entry[0])
        (t0, p0, q0), (t1, p1, q1) = self.entries[max(0, k - 1)], self.entries[min(k, len(self.entries) - 1)]
        share = 0.0 if self.static or t1 <= t0 else (stamp - t0) / (t1 - t0)
        return matrix_from([*((1 - share) * p0 + share * p1), *between(q0, q1, share)])


class Transforms:
    """The transforms received on /tf and /tf_static. One that is no rigid motion is ignored."""

    def __init__(self) -> None:
        self._links: dict[str, _Link] = {}

    def add(self, transforms: Sequence[Any], static: bool) -> None:
        """TransformStamped messages."""
        for message in transforms:
            child, parent = message.child_frame_id.lstrip("/"), message.header.frame_id.lstrip("/")
            p, o = message.transform.translation, message.transform.rotation
            values = np.array([p.x, p.y, p.z, o.x, o.y, o.z, o.w])
            try:
                matrix_from(values)
            except ValueError:
                continue
            link = self._links.get(child)
            if link is None or link.parent != parent or link.static != static:
                if len(self._links) >= MAX_FRAMES and link is None:
                    continue
                link = self._links[child] = _Link(parent, static)
            stamp, turn = seconds(message.header.stamp), values[3:] / np.linalg.norm(values[3:])
            if static:
                link.entries.clear()
            elif any(entry[0] == stamp for entry in link.entries[-2:]):
                continue
            insort(link.entries, (stamp, values[:3], turn), key=lambda entry: entry[0])
            while link.entries[0][0] < link.entries[-1][0] - KEEP:
                del link.entries[0]

    def find(self, base: str, frame: str, stamp: float) -> np.ndarray:
        """(4, 4) of `frame` in `base` at `stamp`, s; LookupError of one line."""
        up, down = self._chain(frame), self._chain(base)
        common = next((name for name in up if name in down), None)
        if common is None:
            known = ", ".join(sorted(self._links)[:8]) or "none"
            raise LookupError(f"/tf does not connect {base} and {frame} (frames: {known})")
        up, down = up[: up.index(common)], down[: down.index(common)]
        moving = [name for name in (*up, *down) if not self._links[name].static]
        when = stamp
        for name in moving:
            entries = self._links[name].entries
            if entries[-1][0] < stamp - LAG:
                raise LookupError(f"/tf of {name} is {stamp - entries[-1][0]:.1f} s older than the image")
            if entries[0][0] > stamp:
                raise LookupError(f"/tf of {name} begins {entries[0][0] - stamp:.3f} s after the image")
            when = min(when, entries[-1][0])
        return np.linalg.inv(self._along(down, when)) @ self._along(up, when)

    def forget_moving(self) -> None:
        self._links = {name: link for name, link in self._links.items() if link.static}

    def _chain(self, frame: str) -> list[str]:
        """The frame and its ancestors up to the root; where the frames form a loop, each of them once."""
        chain = [frame.lstrip("/")]
        while (link := self._links.get(chain[-1])) is not None and link.parent not in chain:
            chain.append(link.parent)
        return chain

    def _along(self, chain: Sequence[str], stamp: float) -> np.ndarray:
        matrix = np.eye(4)
        for name in chain:
            matrix = self._links[name].at(stamp) @ matrix
        return matrix

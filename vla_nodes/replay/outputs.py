"""Where the results of a replay go: to several places at once, into numbers, into a bag."""

from __future__ import annotations

import shutil
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from vla_nodes.control.trajectory import Trajectory
from vla_nodes.pipeline.action_core import Answer
from vla_nodes.pipeline.policy_core import first_line
from vla_nodes.replay.open_loop import Sink, Step
from vla_nodes.rosbag.read import Bag
from vla_nodes.rosbag.timeline import Event

KEEP = 2048
"""Points of a curve that are kept: memory does not grow with the recording."""
SEAM = ("gap", "gap_velocity", "seam_position", "seam_velocity", "latency", "stretched", "starved")
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
COPIED = (
    "sensor_msgs/msg/JointState", "sensor_msgs/msg/CameraInfo", "std_msgs/msg/String", "geometry_msgs/msg/PoseStamped",
    "trajectory_msgs/msg/JointTrajectory", "vla_nodes/msg/ActionChunk", "vla_nodes/msg/PolicyStatus",
    "tf2_msgs/msg/TFMessage",
)  # fmt: skip
"""Recorded types that are small and belong beside the results."""
MAX_COPIED = 64
PREFIX = "/replay"
MARK = ("made_by", "vla_nodes replay")


class Fan(Sink):
    """Passes every result on to each of several sinks."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        for name in ("message", "step", "chunk", "answer", "status", "commanded", "measured", "problem"):
            setattr(self, name, self._to([getattr(sink, name) for sink in sinks]))

    @staticmethod
    def _to(methods: list) -> Any:
        def call(*arguments: Any) -> None:
            for method in methods:
                method(*arguments)

        return call


class Curve:
    """A curve of bounded size: every n-th point of what was added, n doubling as it fills."""

    def __init__(self, peak: bool = False) -> None:
        """peak: keep of n points the largest by amount (errors), else the first (positions)."""
        self._peak, self._stride, self._skip = peak, 1, 0
        self._points: list[tuple[float, Any]] = []

    def add(self, t: float, value: Any) -> None:
        if self._skip == 0:
            self._points.append((t, value))
        elif self._peak:
            last, held = self._points[-1]
            self._points[-1] = (last, np.where(np.abs(value) > np.abs(held), value, held))
        self._skip = (self._skip + 1) % self._stride
        if len(self._points) >= 2 * KEEP:
            self._halve()

    def _halve(self) -> None:
        pairs = zip(self._points[::2], self._points[1::2], strict=False)
        if self._peak:
            self._points = [(t, np.where(np.abs(b) > np.abs(a), b, a)) for (t, a), (_, b) in pairs]
        else:
            self._points = self._points[::2]
        self._stride *= 2
        self._skip = 0

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Times (N,) and values (N, ...)."""
        if not self._points:
            return np.zeros(0), np.zeros(0)
        t, values = zip(*self._points, strict=True)
        return np.array(t), np.array(values, dtype=float)


class Numbers(Sink):
    """Counts, spreads and curves of one replay; `origin` is the bag time (ns) that curves begin at."""

    def __init__(self, joint_names: Sequence[str]) -> None:
        self.joint_names = tuple(joint_names)
        n = len(self.joint_names)
        self.origin: int | None = None
        self.end = 0
        self.messages: Counter[str] = Counter()
        self.steps = self.failed = self.published = self.carried = 0
        self.failure = ""
        self.holds: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.primitives: Counter[str] = Counter()
        self.clipped = self.dropped_rows = 0
        self.seam = {name: array("d") for name in SEAM}
        self.wall: dict[str, array] = {}
        self.problems: list[str] = []
        self.error_sum, self.error_max, self.error_count = np.zeros(n), np.zeros(n), 0
        self.error_at = [0] * n
        self.curves = {
            "commanded": Curve(), "measured": Curve(), "error": Curve(peak=True), "grounding": Curve(),
            "gap": Curve(peak=True), "left": Curve(peak=True), "state": Curve(),
        }  # fmt: skip

    def _t(self, now: int) -> float:
        if self.origin is None:
            self.origin = now
        self.end = max(self.end, now)
        return (now - self.origin) * 1e-9

    def message(self, event: Event) -> None:
        self._t(event.now)
        if event.name:
            self.messages[event.name] += 1

    def step(self, step: Step, published: bool) -> None:
        self.steps += 1
        self.published += published
        if step.output is not None:
            if step.output.hold_reason:
                self.holds[_without_numbers(step.output.hold_reason)] += 1
            self.primitives[step.output.primitive] += 1
            self.curves["grounding"].add(self._t(step.ended), float(step.output.feasibility))
            for name, ms in step.output.timings.items():
                self._wall("policy" if name == "total" else name, ms)
        else:
            self.holds[f"the policy step failed: {type(step.error).__name__}"] += 1
            self.failed += 1
            assert step.error is not None
            self.failure = self.failure or first_line(step.error)
        self._wall("step", 1e3 * step.wall)

    def answer(self, now: int, answer: Answer, chunk_stamp: int | None, wall: float) -> None:
        output = answer.output
        if chunk_stamp is not None:
            self._wall("executor", 1e3 * wall)
            if output is not None and output.refused is None:
                self.carried += 1
                self.modes[output.mode] += 1
                self.clipped += output.clipped
                self.dropped_rows += output.dropped
                for name in SEAM:
                    self.seam[name].append(getattr(output, name))
                self.curves["gap"].add(self._t(now), output.gap)
                self.curves["left"].add(self._t(now), output.seam_position)
            else:
                self.refused[answer.cause] += 1
        if answer.new:
            self.problem(now, f"{answer.cause}: {answer.reason}")

    def status(self, now: int, fields: dict[str, Any]) -> None:
        self.curves["state"].add(self._t(now), fields["state"])

    def commanded(self, now: int, q: np.ndarray | None, qd: np.ndarray | None, fingers: np.ndarray) -> None:
        if q is not None:
            self.curves["commanded"].add(self._t(now), q)

    def measured(self, now: int, stamp: int, q: np.ndarray, reference: np.ndarray | None) -> None:
        self.curves["measured"].add(self._t(now), q)
        if reference is None:
            return
        error = reference - q
        self.curves["error"].add(self._t(now), error)
        self.error_sum += error**2
        self.error_count += 1
        for j in np.flatnonzero(np.abs(error) > self.error_max):
            self.error_max[j], self.error_at[j] = abs(error[j]), stamp

    def problem(self, now: int, text: str) -> None:
        if len(self.problems) < 200:
            self.problems.append(f"{self._t(now):.3f} s: {text}")

    def _wall(self, name: str, ms: float) -> None:
        self.wall.setdefault(name, array("d")).append(ms)


class BagSink(Sink):
    """Writes results below /replay beside what was recorded, as MCAP: for Foxglove, PlotJuggler, rosbag2."""

    def __init__(self, folder: Path, bag: Bag, base_frame: str, images: bool, names: Sequence[Any]) -> None:
        """folder: replaced when the bag is whole, see `close`; names: of the arm's joints, and of each gripper's by its
        name. What is taken over from the recording: see `copied`."""
        self._folder, self._partial = folder, folder.parent / ".partial"
        shutil.rmtree(self._partial, ignore_errors=True)
        self._store, self._base, self._bag = bag.typestore, base_frame, bag
        self._arm_names, self._gripper_joints = names
        self._writer = Writer(self._partial / folder.name, version=8, storage_plugin=StoragePlugin.MCAP)
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        self._writer.set_custom_data(*MARK)
        self._writer.open()
        self._connections: dict[str, Any] = {}
        self._received: tuple[int, int] = (0, 0)  # (bag time, when received) of the newest message
        self.copied = copied(bag, images)

    def close(self) -> None:
        """Finish the bag and put it in its place."""
        self._writer.close()
        if self._folder.exists():
            shutil.rmtree(self._folder)
        (self._partial / self._folder.name).rename(self._folder)
        self._partial.rmdir()

    def message(self, event: Event) -> None:
        self._received = (event.now, event.received)
        if event.topic in self.copied:
            if event.topic not in self._connections:
                (text, digest), kind = self._bag.definition(event.topic), self._bag.topics[event.topic]
                connection = self._writer.add_connection(event.topic, kind, msgdef=text, rihs01=digest)
                self._connections[event.topic] = connection
            self._writer.write(self._connections[event.topic], event.received, event.data)

    def chunk(self, now: int, fields: dict[str, Any], stamp: int) -> None:
        self._write("vla/action_chunk", "vla_nodes/msg/ActionChunk", now, header=self._header(stamp), **fields)

    def answer(self, now: int, answer: Answer, chunk_stamp: int | None, wall: float) -> None:
        if answer.arm is not None:
            self._trajectory(now, answer.arm, self._arm_names, "arm_controller/joint_trajectory")
        for name, trajectory in (answer.grippers or {}).items():
            self._trajectory(now, trajectory, [self._gripper_joints[name]], f"{name}_controller/joint_trajectory")

    def status(self, now: int, fields: dict[str, Any]) -> None:
        fields = dict(fields)
        stamp, target = fields.pop("stamp"), fields.pop("target")
        header = self._header(now if stamp is None else round(stamp * 1e9))
        point = self._type("geometry_msgs/msg/Point")(*(float(v) for v in target))
        kind = "vla_nodes/msg/PolicyStatus"
        self._write("vla/status", kind, now, header=header, target=point, checkpoint="", **fields)

    def commanded(self, now: int, q: np.ndarray | None, qd: np.ndarray | None, fingers: np.ndarray) -> None:
        if q is None or qd is None:
            return
        names, values, speeds = list(self._arm_names), q, qd
        if (told := np.isfinite(fingers)).any():
            names += [joint for joint, known in zip(self._gripper_joints.values(), told, strict=True) if known]
            values, speeds = np.append(q, fingers[told]), np.append(qd, np.zeros(told.sum()))
        self._write("joint_commands", "sensor_msgs/msg/JointState", now, header=self._header(now, ""), name=names,
                    position=values, velocity=speeds, effort=np.zeros(0))  # fmt: skip

    def _trajectory(self, now: int, trajectory: Trajectory, names: Sequence[str], topic: str) -> None:
        point = self._type("trajectory_msgs/msg/JointTrajectoryPoint")
        duration = self._type("builtin_interfaces/msg/Duration")
        empty = np.zeros(0)
        rows = [empty if x is None else x for x in (trajectory.velocities, trajectory.accelerations)]
        points = []
        for i, t in enumerate(trajectory.times):
            ns = round(float(t) * 1e9)
            velocity, acceleration = (x[i] if len(x) else empty for x in rows)
            start = duration(ns // 10**9, ns % 10**9)
            points.append(point(trajectory.positions[i], velocity, acceleration, empty, start))
        kind = "trajectory_msgs/msg/JointTrajectory"
        header = self._header(round(trajectory.stamp * 1e9), "")
        self._write(topic, kind, now, header=header, joint_names=list(names), points=points)

    def _type(self, name: str) -> Any:
        return self._store.types[name]

    def _header(self, ns: int, frame: str | None = None) -> Any:
        stamp = self._type("builtin_interfaces/msg/Time")(ns // 10**9, ns % 10**9)
        return self._type("std_msgs/msg/Header")(stamp, self._base if frame is None else frame)

    def _write(self, topic: str, kind: str, now: int, **fields: Any) -> None:
        name = f"{PREFIX}/{topic}"
        if name not in self._connections:
            self._connections[name] = self._writer.add_connection(name, kind, typestore=self._store)
        data = self._store.serialize_cdr(self._type(kind)(**fields), kind)
        then, received = self._received  # on the recorder's axis, so that both stand side by side
        self._writer.write(self._connections[name], max(0, received + now - then), data)


def made_here(folder: Path) -> bool:
    """Whether a folder is a bag that BagSink wrote, so that a recording is never overwritten."""
    try:
        return ": ".join(MARK) in (folder / "metadata.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def copied(bag: Bag, images: bool) -> list[str]:
    """The recorded topics that go beside the results."""
    kinds = COPIED + (IMAGES if images else ())
    chosen = sorted(name for name, kind in bag.topics.items() if kind in kinds and not name.startswith(PREFIX + "/"))
    return [name for name in chosen if bag.definition(name)[0]][:MAX_COPIED]


def _without_numbers(text: str) -> str:
    """A reason with its figures left out, so that equal reasons are counted as one."""
    import re

    return re.sub(r"\d+(\.\d+)?", "#", text)

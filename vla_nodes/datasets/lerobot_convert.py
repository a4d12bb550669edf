"""Episodes to a LeRobot folder and back: what the columns mean for our robot.

A folder that `export` wrote comes back as it was, within the loss of the colour video. For a folder of somebody else's
robot one has to tell what its names mean: which camera, which entries of the state are our joints, how the gripper
counts, and where the camera stands, which LeRobot does not record.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_nodes.control.robot import RobotModel
from vla_nodes.datasets import episode as episodes
from vla_nodes.datasets.actions_from_motion import Track, chunks
from vla_nodes.datasets.episode import DataError, EpisodeWriter
from vla_nodes.datasets.lerobot_read import LeRobotFolder
from vla_nodes.datasets.lerobot_write import HEADER, LeRobotWriter
from vla_nodes.policy.checkpoint import CheckpointConfig
from vla_nodes.policy.configuration import PRIMITIVES
from vla_nodes.policy.processing import square

MAX_HEADER = 1 << 20
UNKNOWN = -1


@dataclass(frozen=True)
class Mapping:
    """What a foreign folder's names mean. "" is found out from the folder, or refused where the folder is not clear.

    joints: {our joint: name in the state vector}; gripper: name in the state vector, with its values closed and open;
    degrees: joint angles are in degrees; intrinsics: (3, 3) of the folder's images; camera_pose: (4, 4) optical frame
    in base; depth "none": do not read depth.
    """

    camera: str = ""
    depth: str = ""
    state: str = "observation.state"
    joints: dict[str, str] = field(default_factory=dict)
    gripper: str = "gripper"
    closed: float = 0.0
    open: float = 1.0
    degrees: bool = False
    intrinsics: np.ndarray | None = None
    camera_pose: np.ndarray | None = None


def export(
    paths: Iterable[Path], folder: Path, config: CheckpointConfig, robot_type: str, report: Callable[[str], None]
) -> LeRobotWriter:
    """Write episodes as a LeRobot folder. Damaged ones are reported and left out; DataError when none is left."""
    writer = LeRobotWriter(
        folder,
        config.contract.tick,
        config.contract.actions.period,
        config.contract.robot.joints,
        config.contract.cameras[0].name,
        robot_type,
    )
    try:
        for path in paths:
            try:
                episode = episodes.read(path)
                for key, wanted in (("tick", config.contract.tick), ("period", config.contract.actions.period)):
                    if episode.header.get(key, wanted) != wanted:
                        said = f"{key} is {episode.header[key]}, not {wanted} s"
                        raise DataError(f"{path}: {said}: give the checkpoint it was made for")
                for t in range(len(episode)):  # a damaged image is found before anything of the episode is written
                    episode.color(t), episode.depth(t)
                writer.add(episode)
            except DataError as error:
                report(f"skipped: {error}")
        writer.close()
        return writer
    except BaseException:
        writer.abort()
        raise


class Importer:
    """Reads episodes of one LeRobot folder in the terms of one checkpoint and robot."""

    def __init__(self, folder: LeRobotFolder, mapping: Mapping, config: CheckpointConfig, robot: RobotModel) -> None:
        """DataError names what the folder lacks or the flag that tells it."""
        self.folder, self.mapping, self.config, self.robot = folder, mapping, config, robot
        self.dropped: Counter[str] = Counter()
        self.step = max(1, round(folder.fps * config.contract.tick))
        if abs(self.step / folder.fps / config.contract.tick - 1) > 0.25:
            raise DataError(
                f"{folder.folder}: {folder.fps:g} frames a second do not give one every {config.contract.tick} s"
            )
        self.camera = mapping.camera or _only(folder.cameras(), "colour cameras", "--camera", folder.folder)
        if self.camera not in folder.cameras():
            raise DataError(f"{folder.folder}: no colour camera {self.camera!r}, only {_listed(folder.cameras())}")
        self.depth = self._depth()
        if mapping.state not in folder.features:
            raise DataError(f"{folder.folder}: no feature {mapping.state!r} (--state), only {_listed(folder.features)}")
        names = folder.names(mapping.state)
        wanted = [mapping.joints.get(name, name) for name in config.contract.robot.joints] + [mapping.gripper]
        flags = ["--joint-map OURS:THEIRS"] * len(config.contract.robot.joints) + ["--gripper NAME"]
        for name, flag in zip(wanted, flags, strict=True):
            if name not in names:
                raise DataError(f"{folder.folder}: {mapping.state} has no {name!r} ({flag}); it has {_listed(names)}")
        self.columns = [names.index(name) for name in wanted]
        self.told = ""  # the column of `action` that commands the gripper
        if "action" in folder.features and mapping.gripper in folder.names("action"):
            self.told = mapping.gripper

    def _depth(self) -> str:
        folder, given = self.folder, self.mapping.depth
        if given == "none":
            return ""
        found = folder.cameras(depth=True)
        if given and given not in found:
            raise DataError(f"{folder.folder}: no depth camera {given!r}, only {_listed(found)}")
        own = f"{self.camera}_depth"
        return given or (own if own in found else found[0] if len(found) == 1 else "")

    def read(self, index: int) -> tuple[EpisodeWriter, dict[str, Any]]:
        """Episode `index`, ready to be written, and its header."""
        folder, mapping, config = self.folder, self.mapping, self.config
        header = self._header(index)
        own = "vla.action_chunk" in folder.features and bool(header)
        keys = [mapping.state, "timestamp", "task_index"]
        keys += [key for key in ("vla.action_chunk", "vla.stamp", "vla.primitive", "observation.velocity") if own]
        keys += ["action"] if self.told and not own else []
        rows = folder.columns(index, keys)
        state = rows[mapping.state].astype(np.float64)[:, self.columns]
        if not np.isfinite(state).all():
            raise DataError(f"{folder.folder}: episode {index}: {mapping.state} holds values that are not finite")
        q = np.deg2rad(state[:, :-1]) if mapping.degrees else state[:, :-1]
        low, high = self.robot.lower - 0.2, self.robot.upper + 0.2
        if ((q < low) | (q > high)).any():
            j = int(np.argmax(((q < low) | (q > high)).any(axis=0)))
            span = f"{q[:, j].min():.2f} to {q[:, j].max():.2f} rad"
            raise DataError(
                f"{folder.folder}: episode {index}: {config.contract.robot.joints[j]} runs from {span}, beyond its "
                "limits: "
                "--degrees, or another --joint-map?"
            )
        opening = self._opening(state[:, -1], index)
        stamps = rows["vla.stamp"] if own else rows["timestamp"].astype(np.float64)
        if len(stamps) < 2 or (np.diff(stamps) <= 0).any():
            raise DataError(f"{folder.folder}: episode {index}: time stands still, or there is a single frame")
        ticks = np.arange(0, len(q), self.step)
        usable = np.ones(len(ticks), bool)
        if (
            own
            and rows["vla.action_chunk"].shape[1:] == (config.contract.actions.horizon, 7)
            and header.get("period") == config.contract.actions.period
        ):
            actions, velocity = rows["vla.action_chunk"][ticks], rows["observation.velocity"]
            primitive = rows["vla.primitive"][ticks]
        else:
            wanted = np.full(len(q), np.nan)
            if self.told and not own:
                column = folder.names("action").index(self.told)
                wanted = self._opening(rows["action"].astype(np.float64)[:, column], index)
            track = Track()
            for t, row in enumerate(q):
                track.add(float(stamps[t]), row, np.full(len(row), np.nan), float(opening[t]), float(wanted[t]))
            actions, usable, why = chunks(
                track, stamps[ticks], self.robot, config.contract.actions.horizon, config.contract.actions.period, False
            )
            self.dropped.update({f"observation: {reason}": count for reason, count in why.items()})
            velocity = np.gradient(q, stamps, axis=0)
            primitive = np.full(len(ticks), UNKNOWN)
        writer, intrinsics = self._images(index, header, set(ticks[usable].tolist()))
        kept = ticks[usable]
        for name, values in {
            "stamp": stamps[kept], "joint_positions": q[kept], "joint_velocities": velocity[kept],
            "gripper": opening[kept], "ee_pose": np.array([self.robot.forward(q[t]) for t in kept]).reshape(-1, 4, 4),
            "actions": actions[usable].astype(np.float32), "primitive": primitive[usable],
        }.items():  # fmt: skip
            writer.column(name, values)
        task = int(rows["task_index"][0])
        if task not in folder.tasks:
            raise DataError(f"{folder.folder}: episode {index}: no task {task} in meta/tasks.parquet")
        pose = mapping.camera_pose if mapping.camera_pose is not None else header.get("camera_pose")
        return writer, {
            "primitives": PRIMITIVES, "success": None, "source": f"LeRobot folder {folder.folder.name}", **header,
            "instruction": folder.tasks[task], "intrinsics": intrinsics.tolist(),
            "camera_pose": np.asarray(pose).tolist(), "period": config.contract.actions.period,
            "tick": config.contract.tick,
        }  # fmt: skip

    def _header(self, index: int) -> dict[str, Any]:
        text = self.folder.episodes[index].get(HEADER)
        if text is None:
            header: Any = {}
        else:
            try:
                header = json.loads(text) if isinstance(text, str) and len(text) <= MAX_HEADER else None
            except (ValueError, RecursionError):
                header = None
        if not isinstance(header, dict):
            raise DataError(f"{self.folder.folder}: episode {index}: {HEADER} in meta/episodes is no JSON object")
        for flag, name, shape in (("--intrinsics", "intrinsics", (3, 3)), ("--camera-pose", "camera_pose", (4, 4))):
            if getattr(self.mapping, name) is None and name not in header:
                raise DataError(f"{self.folder.folder}: LeRobot records no {name}: give {flag}")
            try:
                if name in header and np.asarray(header[name], np.float64).shape != shape:
                    raise ValueError
            except (TypeError, ValueError):
                raise DataError(f"{self.folder.folder}: episode {index}: {name} is no {shape} matrix") from None
        return header

    def _opening(self, values: np.ndarray, index: int) -> np.ndarray:
        opening = (values - self.mapping.closed) / (self.mapping.open - self.mapping.closed)
        if opening.min() < -0.1 or opening.max() > 1.1:
            span = f"{values.min():.3g} to {values.max():.3g}"
            raise DataError(
                f"{self.folder.folder}: episode {index}: the gripper runs from {span}: give --gripper-closed and "
                "--gripper-open, its values when closed and when open"
            )
        return opening.clip(0, 1)

    def _images(self, index: int, header: dict, wanted: set[int]) -> tuple[EpisodeWriter, np.ndarray]:
        """The frames asked for, squared to the policy's size, and the intrinsics that go with them."""
        writer, config = EpisodeWriter(), self.config
        given = self.mapping.intrinsics if self.mapping.intrinsics is not None else header.get("intrinsics")
        intrinsics = np.asarray(given, np.float32)
        near, far = config.contract.cameras[0].depth_range
        depths = self.folder.images(index, self.depth) if self.depth else None
        for t, color in enumerate(self.folder.images(index, self.camera)):
            depth = next(depths) if depths is not None else np.zeros(color.shape[:2], np.float32)
            if depth.shape != color.shape[:2]:
                raise DataError(f"{self.folder.folder}: {self.depth} {depth.shape} does not cover {color.shape[:2]}")
            if t not in wanted:
                continue
            color, depth, intrinsics = square(color, depth, np.asarray(given), config.policy.image_size)
            writer.add(color, np.where((depth >= near) & (depth <= far), depth, 0.0))
        return writer, intrinsics


def _only(names: Sequence[str], what: str, flag: str, folder: Path) -> str:
    if len(names) != 1:
        raise DataError(f"{folder}: {len(names)} {what}, choose with {flag}: {_listed(names)}")
    return names[0]


def _listed(names: Any) -> str:
    names = list(names)
    return (", ".join(names[:12]) + (", ..." if len(names) > 12 else "")) or "none"

"""Recordings to training episodes: one episode for each instruction of a bag, at the policy's own tick.

Messages go through the very loop that feeds the live policy (pipeline/policy_loop.py), so an episode holds what the
policy would have seen; what was dropped on the way is counted with its reason. Actions are what the arm did next
(actions_from_motion.py).

An episode begins when an instruction comes into force and ends with the next one, with the recording, or at a break:
a clock set back, images missing for longer than MAX_GAP, another camera pose or calibration, MAX_TICKS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_nodes.control.joint_trajectory_controller import JointTrajectoryController
from vla_nodes.control.robot import RobotModel
from vla_nodes.datasets.actions_from_motion import Track, chunks
from vla_nodes.datasets.episode import EpisodeWriter
from vla_nodes.messages.convert import pose_matrix, trajectory_from
from vla_nodes.pipeline.observe import observation
from vla_nodes.pipeline.policy_core import PolicyCore
from vla_nodes.pipeline.policy_loop import Job, PolicyLoop
from vla_nodes.policy.checkpoint import CheckpointConfig
from vla_nodes.policy.configuration import PRIMITIVES
from vla_nodes.policy.processing import MAX_GAP, square
from vla_nodes.poses import matrix_from
from vla_nodes.rosbag.read import Bag, BagError
from vla_nodes.rosbag.timeline import choose, timeline
from vla_nodes.rosbag.topics import Topics, resolve

MAX_TICKS = 2000  # a longer stretch is cut in two
MAX_INSTRUCTION = 256  # characters
MIN_TICKS = 5  # a shorter stretch teaches nothing
THIN = 0.004  # s; joint samples closer together are not kept
UNKNOWN = -1  # the primitive of recorded data; training leaves that term out
SAME_POSE = (5e-3, 1e-2)  # m, rad within which the camera stands where it stood


@dataclass(frozen=True)
class BuildSettings:
    """instruction: in force throughout, instead of the bag's; camera_pose: (4, 4) instead of the bag's camera/pose;
    commanded: actions lead where the controller was told to go; the rest as replay and policy_node have them."""

    instruction: str = ""
    camera_pose: np.ndarray | None = None
    commanded: bool = False
    remaps: tuple[str, ...] = ()
    namespace: str = ""
    clock: str = "auto"
    slop: float = 0.02
    use_depth: bool = True
    joint_map: tuple[str, ...] = ()


@dataclass
class BagResult:
    """What became of one bag."""

    path: Path
    outcome: str = "unmarked"
    seconds: float = 0.0
    episodes: int = 0
    ticks: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason: how many messages, observations or stretches
    notes: list[str] = field(default_factory=list)
    error: str = ""  # why the bag, or the rest of it, was not read


@dataclass
class _Stretch:
    """An episode being collected."""

    instruction: str
    intrinsics: np.ndarray
    camera_pose: np.ndarray
    writer: EpisodeWriter = field(default_factory=EpisodeWriter)
    last: float = 0.0


class _Listener:
    """What PolicyLoop asks of a runtime, without a network: which instruction is acceptable."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config

    def check_instruction(self, text: str) -> str:
        if not text.strip():
            return "the instruction is empty"
        return "" if len(text) <= MAX_INSTRUCTION else f"it has {len(text)} characters, at most {MAX_INSTRUCTION}"


Emit = Callable[[EpisodeWriter, dict[str, Any]], None]


def build(
    bag: Bag, config: CheckpointConfig, robot: RobotModel, settings: BuildSettings, emit: Emit,
    progress: Callable[[float], None] = lambda share: None,
) -> BagResult:  # fmt: skip
    """Give every episode of a bag to `emit(writer, header)`.

    A bag that cannot be used at all raises BagError; one that is damaged further on gives what came before, with
    `error` set. `progress` is told which share of the bag is done.
    """
    return _Build(bag, config, robot, settings, emit).run(progress)


class _Build:
    def __init__(
        self, bag: Bag, config: CheckpointConfig, robot: RobotModel, settings: BuildSettings, emit: Emit
    ) -> None:
        self.bag, self.config, self.robot, self.settings, self.emit = bag, config, robot, settings, emit
        self.result = BagResult(bag.path, bag.custom.get("outcome", "unmarked")[:40], bag.duration)
        needed = ("color", "info", "joints", *(("depth",) if settings.use_depth else ()))
        self.topics: Topics = resolve(bag, settings.remaps, settings.namespace, needed)
        if settings.commanded and self.topics["arm"] is None:
            raise BagError(f"{bag.path}: --motion commanded, but the bag has no arm_controller/joint_trajectory")
        self.pose = settings.camera_pose
        if self.pose is None and self.topics["camera_pose"] is None:
            raise BagError(f"{bag.path}: no camera/pose in the bag: give --camera-pose X Y Z QX QY QZ QW")
        self.spoken = next((name for name in ("active_instruction", "instruction") if self.topics[name]), "")
        if not self.spoken and not (settings.instruction or bag.custom.get("instruction")):
            raise BagError(f"{bag.path}: no instruction in the bag: give --instruction 'TEXT'")
        core = PolicyCore(_Listener(config), 1.0 / config.contract.tick, np.inf)
        core.activate()
        self.loop = PolicyLoop(core, robot, settings.slop, settings.use_depth, settings.joint_map)
        self.core = core
        (self.camera,), (self.gripper,) = (c.name for c in config.contract.cameras), robot.grippers
        self.stretch: _Stretch | None = None
        self.track = Track()
        self.arm = JointTrajectoryController(robot.joint_names)
        self.told_arm = self.told_gripper = False
        self.wanted = np.nan
        self.jumps = 0
        self.refused_trajectories: Counter[str] = Counter()

    def run(self, progress: Callable[[float], None]) -> BagResult:
        bag, result = self.bag, self.result
        fixed = self.settings.instruction or ("" if self.spoken else bag.custom.get("instruction", ""))
        if fixed:
            self._instruct(fixed)
            self.spoken = ""
        span = max(1, bag.end - bag.start)
        try:
            kind = choose(bag, self.topics, self.settings.clock)
            for event in timeline(bag, self.topics, kind):
                if event.jumped:
                    self._break("clock set back")
                    self.loop.clear()
                self._take(event.name, event.now * 1e-9, event.message)
                progress(min(1.0, (event.received - bag.start) / span))
        except BagError as error:
            result.error = str(error)
        self._break("")
        result.dropped.update(self.loop.sync.dropped)
        result.dropped.update(self.refused_trajectories)
        result.notes[:0] = bag.notes
        if not result.episodes and not result.error and not result.dropped:
            result.notes.append(self.loop.sync.why_not() or "no instruction came into force")
        return result

    # -- messages ----------------------------------------------------------------------------------------------------
    def _take(self, name: str, now: float, message: Any) -> None:
        loop = self.loop
        if name == self.spoken and name:
            text = message.data
            if text != self.core.instruction:
                self._instruct(text)
        elif name == "camera_pose" and self.settings.camera_pose is None:
            self._camera(message)
        elif name == "arm":
            self._arm_command(message, now)
        elif name == "gripper":
            self._gripper_command(message)
        elif name in ("color", "depth", "info"):
            getattr(loop, name)(message)
        elif name == "joints":
            self._joints(message)
        else:
            return
        if loop.sync.jumps != self.jumps:  # stamps went back though the recorder's clock did not
            self.jumps = loop.sync.jumps
            self._break("clock set back")
        newest = loop.sync.newest("color")
        poses = {self.camera: lambda stamp, frame: self.pose}
        while newest is not None and (job := loop.next(newest, poses)) is not None:
            self.core.started(job.ticket)
            self._tick(job)

    def _instruct(self, text: str) -> None:
        self._break("")
        if reason := self.core.instruct(text):
            self.result.dropped[f"instruction: {reason}"] += bool(text.strip())

    def _camera(self, message: Any) -> None:
        frame = message.header.frame_id
        if frame != (base := self.config.contract.robot.base_frame):
            raise BagError(f"{self.bag.path}: camera/pose is in frame '{frame}', not '{base}'")
        try:
            pose = pose_matrix(message.pose)
        except ValueError as error:
            raise BagError(f"{self.bag.path}: camera/pose: {error}") from None
        if self.pose is not None and not _same_pose(pose, self.pose):
            self._break("camera moved")
        self.pose = pose

    def _joints(self, message: Any) -> None:
        new = self.loop.joints(message)
        if new and new not in self.result.notes:
            self.result.notes.append(new)
        if self.loop.joint_problem:
            self.result.dropped["joints: unusable"] += 1
            return
        sample = self.loop.sync.joints.newest
        track, dof = self.track, self.robot.dof
        if sample is None or (len(track) and sample.stamp < track.stamps[-1] + THIN):
            return
        q = sample.position[:dof]
        command = self.arm.reference(sample.stamp)[0] if self.told_arm else np.full(dof, np.nan)
        track.add(sample.stamp, q, command, float(self.gripper.opening(sample.position[dof])), self.wanted)
        if self.stretch is None and len(track) > 200:  # nothing is being collected: only what could still be needed
            self.track = Track(*(list(part[-100:]) for part in vars(track).values()))

    def _arm_command(self, message: Any, now: float) -> None:
        sample = self.loop.sync.joints.newest
        if sample is None:
            return
        try:
            trajectory = trajectory_from(message)
            reason = self.arm.accept(
                trajectory, now, sample.position[: self.robot.dof], sample.velocity[: self.robot.dof]
            )
        except ValueError as error:
            reason = str(error)
        if reason is None:
            self.told_arm = True
        else:
            self.refused_trajectories["joint_trajectory: a controller would refuse it"] += 1

    def _gripper_command(self, message: Any) -> None:
        joint = self.gripper.joint
        if joint in message.joint_names and len(message.points):
            column = list(message.joint_names).index(joint)
            positions = message.points[-1].positions
            if column < len(positions) and np.isfinite(positions[column]):
                self.told_gripper = True
                self.wanted = float(self.gripper.opening(positions[column]))

    # -- episodes ----------------------------------------------------------------------------------------------------
    def _tick(self, job: Job) -> None:
        config = self.config
        try:
            observed = observation(job.pair, job.camera_poses, self.robot)
            (seen,) = observed.cameras.values()
            if seen.depth is not None and seen.depth.shape != seen.color.shape[:2]:
                raise ValueError(f"depth {seen.depth.shape} is not aligned to colour {seen.color.shape[:2]}")
        except ValueError as error:
            self.result.dropped[f"observation: {str(error).splitlines()[0]}"] += 1
            return
        color, depth, intrinsics = square(seen.color, seen.depth, seen.intrinsics, config.policy.image_size)
        near, far = config.contract.cameras[0].depth_range
        depth = np.zeros(color.shape[:2], np.float32) if depth is None else depth
        depth = np.where((depth >= near) & (depth <= far), depth, 0.0)
        stretch = self.stretch
        if stretch is not None and job.pair.stamp > stretch.last + MAX_GAP:
            self._break("images missing")
        elif stretch is not None and not np.allclose(intrinsics, stretch.intrinsics, atol=0.01):
            self._break("calibration changed")
        elif stretch is not None and len(stretch.writer) >= MAX_TICKS:
            self._break("very long")
        if self.stretch is None:
            self.stretch = _Stretch(self.core.instruction, intrinsics, seen.pose)
        self.stretch.writer.add(
            color, depth, stamp=observed.stamp, joint_positions=observed.joint_positions,
            joint_velocities=observed.joint_velocities, gripper=float(observed.grippers[0]),
            ee_pose=observed.tool_pose, primitive=UNKNOWN,
        )  # fmt: skip
        self.stretch.last = observed.stamp

    def _break(self, why: str) -> None:
        """End the episode being collected; `why` is counted where it is a break and no proper end."""
        stretch, self.stretch = self.stretch, None
        track = self.track
        if why == "clock set back":
            self.track, self.told_arm, self.wanted = Track(), False, np.nan
            self.core.reset()  # the next observation is due, however early its stamp
        else:  # the newest samples also belong to what follows
            self.track = Track(*(list(part[-100:]) for part in vars(track).values()))
        if stretch is None:
            return
        result, config = self.result, self.config
        if why:
            result.dropped[f"episode cut: {why}"] += 1
        if self.settings.commanded and np.isnan(track.command).all():
            result.dropped["episode: its arm was never commanded"] += 1
            return
        stamps = stretch.writer.rows("stamp")
        actions, usable, reasons = chunks(
            track,
            stamps,
            self.robot,
            config.contract.actions.horizon,
            config.contract.actions.period,
            self.settings.commanded,
        )
        result.dropped.update({f"observation: {reason}": count for reason, count in reasons.items()})
        if usable.sum() < MIN_TICKS:
            result.dropped[f"episode: fewer than {MIN_TICKS} observations"] += 1
            return
        # The usable ones are together but for holes in joint_states; the longest run is kept, so that time runs evenly.
        run = _longest_run(usable)
        if lost := int(usable.sum()) - (run.stop - run.start):
            result.dropped["observation: beyond a gap in joint_states"] += lost
        if run.stop - run.start < MIN_TICKS:
            result.dropped[f"episode: fewer than {MIN_TICKS} observations"] += 1
            return
        stretch.writer.column("actions", actions)
        stretch.writer.keep(np.arange(run.start, run.stop))
        outcome, kept = result.outcome, stamps[run]
        apart = float(np.diff(kept).mean())
        tick = config.contract.tick
        note = f"observations are {apart:.3f} s apart, the policy's tick is {tick} s: is the camera so slow?"
        if apart > 1.15 * tick and note not in result.notes:
            result.notes.append(note)
        header = {
            "instruction": stretch.instruction,
            "intrinsics": stretch.intrinsics.tolist(),
            "camera_pose": np.asarray(stretch.camera_pose).tolist(),
            "period": config.contract.actions.period,
            "tick": config.contract.tick,
            "primitives": PRIMITIVES,
            "success": {"success": True, "failure": False}.get(outcome),
            "outcome": outcome,
            "source": f"recording {self.bag.path.name}",
            "start": float(kept[0]),
            "motion": "commanded" if self.settings.commanded else "measured",
            "gripper": "commanded" if self.told_gripper else "last direction",
        }
        if checkpoint := self.bag.custom.get("checkpoint"):
            header["checkpoint"] = checkpoint
        self.emit(stretch.writer, header)
        result.episodes += 1
        result.ticks += run.stop - run.start


def _same_pose(a: np.ndarray, b: np.ndarray) -> bool:
    turned = np.arccos(np.clip((np.trace(a[:3, :3].T @ b[:3, :3]) - 1) / 2, -1, 1))
    return float(np.linalg.norm(a[:3, 3] - b[:3, 3])) < SAME_POSE[0] and float(turned) < SAME_POSE[1]


def _longest_run(mask: np.ndarray) -> slice:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    starts, ends = edges[::2], edges[1::2]
    best = int(np.argmax(ends - starts))
    return slice(int(starts[best]), int(ends[best]))


def pose_argument(values: list[float]) -> np.ndarray:
    """--camera-pose X Y Z QX QY QZ QW to (4, 4). Raises BagError."""
    try:
        return matrix_from(values)
    except ValueError as error:
        raise BagError(f"--camera-pose: {error}") from None

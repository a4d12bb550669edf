"""The rules by which messages become policy steps, the same on the robot and in replay.

policy_node feeds it from its subscriptions and gives jobs to its worker; replay feeds it from a bag.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vla_nodes.control.robot import RobotModel
from vla_nodes.messages.convert import seconds
from vla_nodes.messages.joints import JointInput
from vla_nodes.messages.sync import CameraStreams, ObservationSync, Pair
from vla_nodes.pipeline.observe import observation
from vla_nodes.pipeline.policy_core import PolicyCore, State, Ticket
from vla_nodes.pipeline.robot_description import RobotDescription
from vla_nodes.policy.contract import Camera, Contract, difference_table, differences

WATCH_PERIOD = 0.05
"""s between two looks at what is lacking."""
STATUS_PERIOD = 0.125
"""s that vla/status is silent at most before a look at what is lacking renews it: at the third look, 0.15 s, with room
for looks that come early or late (> 5 Hz)."""


PoseAt = Callable[[float, str], "np.ndarray | None"]
"""For an image's stamp (s) and frame: T_base_camera (4, 4) of the colour optical frame, None while not known."""


@dataclass(frozen=True)
class Job:
    """What a step needs: messages as they came, decoded by whoever computes."""

    ticket: Ticket
    pair: Pair
    camera_poses: dict[str, np.ndarray | None]
    """T_base_camera (4, 4) by camera; None where the contract does not ask for it"""


class PolicyLoop:
    """Pairs messages and says when which observation is computed. Not thread-safe, but for `compute`."""

    def __init__(
        self, core: PolicyCore, robot: RobotModel, slop: float, use_depth: bool, joint_map: Sequence[str] = ()
    ) -> None:
        """
        Args:
            core: of a policy whose contract fits the robot.
            slop: as ObservationSync.
            use_depth: whether a depth that is optional in the contract is awaited.
            joint_map: as messages.joints.parse_joint_map.

        Raises JointStatesError, ValueError (see `streams_of`).
        """
        cameras = core.runtime.config.contract.cameras
        joints = (*robot.joint_names, *(gripper.joint for gripper in robot.grippers))
        self.core, self.robot = core, robot
        self.sync = ObservationSync(slop, [streams_of(camera, use_depth) for camera in cameras])
        self._posed = {camera.name: camera.pose == "known" for camera in cameras}
        self._joints = JointInput(joints, joint_map)
        self._frame = dict.fromkeys(self._posed, "")
        self._leader = cameras[0].name

    @property
    def joint_problem(self) -> str:
        """What is wrong with the newest joint_states, or ""."""
        return self._joints.problem

    def clear(self) -> None:
        """Forget every message received (at activation, and when the clock was set back)."""
        self.sync.clear()

    # -- messages in -------------------------------------------------------------------------------------------------
    def color(self, message: Any, camera: str = "") -> None:
        """camera: its name in the contract; "": the first one, here and below."""
        self._frame[camera or self._leader] = message.header.frame_id
        self.sync.add_color(seconds(message.header.stamp), message, camera)

    def depth(self, message: Any, camera: str = "") -> None:
        self.sync.add_depth(seconds(message.header.stamp), message, camera)

    def info(self, message: Any, camera: str = "") -> None:
        self.sync.add_info(seconds(message.header.stamp), message, camera)

    def joints(self, message: Any) -> str:
        """Returns "" or, once for each new problem, why it cannot be used (`joint_problem` while that lasts)."""
        before, joints = self.joint_problem, self._joints.read(message.name, message.position, message.velocity)
        if joints is None:
            return self.joint_problem if self.joint_problem != before else ""
        self.sync.add_joints(seconds(message.header.stamp), *joints)
        return ""

    # -- steps out ---------------------------------------------------------------------------------------------------
    def next(self, now: float, camera_poses: Mapping[str, PoseAt]) -> Job | None:
        """The step to take now, or None; call when something came in and nobody is computing, then `core.started`.

        Args: now: s, ROS clock; camera_poses: for each camera whose pose the contract asks for.
        """
        newest = self.sync.newest("color")
        if newest is None or not self.core.due(newest):
            return None
        if any(camera_poses[name](newest, self._frame[name]) is None for name, posed in self._posed.items() if posed):
            return None
        pair = self.sync.take()
        if pair is None or not self.core.due(pair.stamp):
            return None
        poses = {
            name: camera_poses[name](pair.frames[name].stamp, self._frame[name]) if posed else None
            for name, posed in self._posed.items()
        }
        ticket = self.core.ticket(pair.stamp, now)
        known = all(poses[name] is not None for name, posed in self._posed.items() if posed)
        return Job(ticket, pair, poses) if ticket is not None and known else None

    def compute(self, job: Job) -> Any:
        """The step itself, in whatever thread: decode, kinematics, policy. Raises what they raise."""
        self.core.prepare(job.ticket)
        started = time.perf_counter()
        seen = observation(job.pair, job.camera_poses, self.robot)
        decoded = 1e3 * (time.perf_counter() - started)
        output = self.core.runtime.step(seen)
        output.timings["decode"] = decoded  # ms, added to the timings that the policy measures itself
        return output

    # -- what is lacking ---------------------------------------------------------------------------------------------
    def watch(self, now: float, problem: str) -> None:
        """Every WATCH_PERIOD while nobody computes: tell the core that it waits, and for what.

        Args: problem: what the caller knows to be missing (silent topics, no camera pose), or "".
        """
        if not self.core.instruction:
            return
        why = self.joint_problem or problem or self._stale(now)
        if why and self.core.state not in (State.INACTIVE, State.WAITING_INSTRUCTION):
            self.core.waiting(why)

    def _stale(self, now: float) -> str:
        last = self.core.output_stamp
        if last is None:
            return self.sync.why_not()
        age = now - last
        if age > self.core.max_image_age + self.core.period:
            return self.sync.why_not() or f"the newest observation is {age:.2f} s old"
        return ""

    def dropped_frames(self) -> int:
        """How many colour images were received and not used."""
        return self.sync.unused_images()


def streams_of(camera: Camera, use_depth: bool) -> CameraStreams:
    """What is awaited of a camera of the contract. ValueError where its depth is required and is not to be used."""
    if camera.depth == "required" and not use_depth:
        raise ValueError(f"use_depth is false, and the checkpoint needs depth of camera {camera.name}")
    depth = camera.depth == "required" or (camera.depth == "optional" and use_depth)
    # Depth and poses are of use with the calibration only; a colour-only camera without a pose needs none.
    return CameraStreams(camera.name, depth, info=depth or camera.pose == "known")


def misfits(contract: Contract, description: RobotDescription) -> str:
    """A table of what a checkpoint's contract and this robot do not agree on, or "".

    A robot's name and its workspace are not the policy's business: another cell may call it otherwise and bound it.
    """
    offered = msgspec.structs.replace(description.robot, name=contract.robot.name, workspace=contract.robot.workspace)
    rows = differences(contract.robot, offered, "robot")
    return difference_table(rows) if rows else ""


def fingerprint(folder: Path) -> str:
    """First characters of the hash of the weights, so that a log tells which policy ran."""
    digest = hashlib.sha256()
    with open(folder / "model.safetensors", "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:8]

"""The rules by which messages become policy steps, the same on the robot and in replay.

policy_node feeds it from its subscriptions and gives jobs to its worker; replay feeds it from a bag.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_nodes.control.chunk import ActionSpace
from vla_nodes.control.robot import RobotModel
from vla_nodes.messages.convert import seconds
from vla_nodes.messages.joints import JointInput
from vla_nodes.messages.sync import ObservationSync, Pair
from vla_nodes.pipeline.observe import observation
from vla_nodes.pipeline.policy_core import PolicyCore, State, Ticket

WATCH_PERIOD = 0.05
"""s between two looks at what is lacking."""
STATUS_PERIOD = 0.125
"""s that vla/status is silent at most before a look at what is lacking renews it: at the third look, 0.15 s, with room
for looks that come early or late (> 5 Hz)."""


@dataclass(frozen=True)
class Job:
    """What a step needs: messages as they came, decoded by whoever computes."""

    ticket: Ticket
    pair: Pair
    camera_pose: np.ndarray


class PolicyLoop:
    """Pairs messages and says when which observation is computed. Not thread-safe, but for `compute`."""

    def __init__(
        self, core: PolicyCore, robot: RobotModel, slop: float, use_depth: bool, joint_map: Sequence[str] = ()
    ) -> None:
        """slop, use_depth: see ObservationSync; joint_map: see parse_joint_map, which may raise JointStatesError."""
        config = core.runtime.config
        joints = (*config.joint_names, config.gripper_joint)
        self.core, self.robot = core, robot
        self.sync = ObservationSync(slop, use_depth)
        self._joints = JointInput(joints, joint_map)
        self._frame = ""

    @property
    def joint_problem(self) -> str:
        """What is wrong with the newest joint_states, or ""."""
        return self._joints.problem

    def clear(self) -> None:
        """Activation, or a clock set back: what was received belongs to another time."""
        self.sync.clear()

    # -- messages in -------------------------------------------------------------------------------------------------
    def color(self, message: Any) -> None:
        self._frame = message.header.frame_id
        self.sync.add_color(seconds(message.header.stamp), message)

    def depth(self, message: Any) -> None:
        self.sync.add_depth(seconds(message.header.stamp), message)

    def info(self, message: Any) -> None:
        self.sync.add_info(seconds(message.header.stamp), message)

    def joints(self, message: Any) -> str:
        """Returns "" or, once for each new problem, why it cannot be used (`joint_problem` while that lasts)."""
        before, joints = self.joint_problem, self._joints.read(message.name, message.position, message.velocity)
        if joints is None:
            return self.joint_problem if self.joint_problem != before else ""
        self.sync.add_joints(seconds(message.header.stamp), *joints)
        return ""

    # -- steps out ---------------------------------------------------------------------------------------------------
    def next(self, now: float, camera_pose: Callable[[float, str], np.ndarray | None]) -> Job | None:
        """The step to take now, or None; call when something came in and nobody is computing, then `core.started`.

        Args: now: s, ROS clock; camera_pose: gives, for an image's stamp and frame, the (4, 4) colour optical frame in
        base, None while not known.
        """
        newest = self.sync.newest("color")
        if newest is None or not self.core.due(newest):
            return None
        if camera_pose(newest, self._frame) is None:
            return None
        pair = self.sync.take()
        if pair is None or not self.core.due(pair.stamp):
            return None
        pose, ticket = camera_pose(pair.stamp, self._frame), self.core.ticket(pair.stamp, now)
        return None if ticket is None or pose is None else Job(ticket, pair, pose)

    def compute(self, job: Job) -> Any:
        """The step itself, in whatever thread: decode, kinematics, policy. Raises what they raise."""
        self.core.prepare(job.ticket)
        started = time.perf_counter()
        seen = observation(job.pair, job.camera_pose, self.robot)
        decoded = 1e3 * (time.perf_counter() - started)
        output = self.core.runtime.step(seen)
        output.timings["decode"] = decoded  # ms, beside the policy's own
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
        """Colour images that came and were not used."""
        return sum(count for reason, count in self.sync.dropped.items() if reason.startswith("color"))


def misfits(config: Any, robot: RobotModel, tool_frame: str, base_frame: str) -> str:
    """A table of what a checkpoint's config and this robot do not agree on, or "". Imports torch."""
    from vla_nodes.policy.checkpoint import misfit_table

    gripper = robot.gripper
    rows = config.misfits(
        joint_names=tuple(robot.joint_names),
        gripper_joint=None if gripper is None else gripper.joint,
        tool_frame=tool_frame,
        base_frame=base_frame,
    )
    spaces = [space.value for space in ActionSpace]
    if config.action_space not in spaces:
        rows.append(("action_space", config.action_space, " or ".join(spaces)))
    return misfit_table(rows) if rows else ""


def fingerprint(folder: Path) -> str:
    """First characters of the hash of the weights, so that a log tells which policy ran."""
    digest = hashlib.sha256()
    with open(folder / "model.safetensors", "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:8]

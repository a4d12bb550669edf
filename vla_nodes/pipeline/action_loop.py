"""The rules by which chunks become trajectories, the same on the robot and in replay: messages in, answers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vla_nodes.control.safety import SafetySettings
from vla_nodes.control.settings import ExecutorSettings, OnInstructionChange, Strategy
from vla_nodes.messages.convert import chunk_from, seconds
from vla_nodes.messages.joints import JointInput
from vla_nodes.pipeline.action_core import ActionCore, Answer
from vla_nodes.pipeline.policy_core import State
from vla_nodes.policy.contract import Box

GATE_PERIOD = 0.02
"""s between two looks of the safety gate (50 Hz, steady clock)."""


class ActionLoop:
    """Reads messages for an ActionCore. Not thread-safe. `steady` is a clock that never jumps, s."""

    def __init__(self, core: ActionCore, joint_map: Sequence[str] = ()) -> None:
        """joint_map: as messages.joints.parse_joint_map, raises JointStatesError."""
        robot = core.robot
        joints = (*robot.joint_names, *(gripper.joint for gripper in robot.grippers))
        self.core = core
        self.last: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # of joint_states, as read
        self._joints = JointInput(joints, joint_map)
        self.arm_names = list(self._joints.robot_names[: robot.dof])
        fingers = self._joints.robot_names[robot.dof :]
        self.gripper_joints = dict(zip(robot.gripper_names, fingers, strict=True))  # {gripper: the robot's joint}
        self.idle = "no vla/status received yet: is policy_node active?"

    @property
    def joint_problem(self) -> str:
        """What is wrong with the newest joint_states, or ""."""
        return self._joints.problem

    def read_joints(self, message: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Arm positions and velocities (J,) and the positions of the grippers' joints (G,) (kept as `last`), or None
        with `joint_problem` saying why."""
        joints = self._joints.read(message.name, message.position, message.velocity)
        if joints is None:
            return None
        (position, velocity), dof = joints, self.core.robot.dof
        self.last = (position[:dof], np.zeros(dof) if velocity is None else velocity[:dof], position[dof:])
        return self.last

    def joints(self, message: Any, steady: float) -> Answer:
        """A joint_states message, while active."""
        read = self.read_joints(message)
        if read is None:
            new = self.core.gate.refused("bad_joint_states")
            return Answer(cause="bad_joint_states", reason=self.joint_problem, new=new)
        return self.core.joints(seconds(message.header.stamp), *read, steady)

    def chunk(self, message: Any, now: float) -> Answer:
        """An ActionChunk message, while active."""
        try:
            chunk = chunk_from(message, self.core.robot)
        except ValueError as error:
            return Answer(cause="malformed", reason=str(error), new=self.core.gate.refused("malformed"))
        self.idle = ""  # a chunk proves that the policy is running; the status that says so may come later
        return self.core.chunk(chunk, now)

    def status(self, state: int, reason: str) -> None:
        """A PolicyStatus message. While the policy is not running, no further chunk is to be expected."""
        self.idle = "" if state == State.RUNNING else f"the policy holds: {reason or 'no reason given'}"

    def tick(self, now: float, steady: float) -> Answer:
        """Every GATE_PERIOD of the steady clock."""
        return self.core.tick(now, steady, self.idle)


def executor_settings(value: Callable[[str], Any]) -> ExecutorSettings:
    """From action_node's parameters; ValueError names one that is out of range."""
    names = ["velocity_scale", "acceleration_scale", "jerk_scale", "tool_speed"]
    names += ["lead", "blend", "effort", "smoothing"]
    return ExecutorSettings(
        strategy=Strategy(value("strategy")),
        on_instruction_change=OnInstructionChange(value("on_instruction_change")),
        **{name: value(name) for name in names},
    )


def safety_settings(value: Callable[[str], Any], workspace: Box | None) -> SafetySettings:
    """From action_node's parameters and the robot's workspace; ValueError names one that is out of range."""
    names = ["table", "outside", "max_age", "step_factor", "tracking_tolerance", "tracking_time"]
    names += ["joint_timeout", "chunk_timeout", "deadman_timeout"]
    corners: dict[str, Any] = (
        {} if workspace is None else {"workspace_low": workspace.lower, "workspace_high": workspace.upper}
    )
    return SafetySettings(**corners, **{name: value(name) for name in names})

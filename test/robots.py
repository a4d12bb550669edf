"""The arms of the tests, as their contracts describe them, and the actions of a chunk."""

from functools import lru_cache

from vla_nodes.control.robot import MotionLimits, RobotModel
from vla_nodes.pipeline.robot_description import RobotDescription

PANDA = "config/panda/contract.yaml"
GRIPPER = ("gripper",)  # the Panda's, as a chunk names it


@lru_cache
def panda() -> RobotModel:
    return RobotDescription(PANDA).model()


def workspace() -> dict:
    """The Panda's, as SafetySettings take it."""
    box = RobotDescription(PANDA).robot.workspace
    return {"workspace_low": box.lower, "workspace_high": box.upper}


def motion_limits(values: dict) -> MotionLimits:
    """From {"joints": {name: {"acceleration", "jerk"}}, "tool_speed", "rest"}."""
    joints = values["joints"]
    acceleration, jerk = ({name: entry[key] for name, entry in joints.items()} for key in ("acceleration", "jerk"))
    return MotionLimits(acceleration, jerk, values["tool_speed"], values.get("rest"))

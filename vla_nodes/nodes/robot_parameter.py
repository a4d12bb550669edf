"""The one parameter that says which robot it is."""

from __future__ import annotations

from vla_nodes.nodes.base import ConfigureError
from vla_nodes.nodes.parameters import Param
from vla_nodes.pipeline.robot_description import RobotDescription

CONTRACT = Param(
    "contract", "", "The robot's contract.yaml: a path, or one below the package's share folder (config/ROBOT/...)."
)


def robot_description(path: str) -> RobotDescription:
    """What the file named by the parameter says. ConfigureError where it names none, else as `RobotDescription`."""
    if not path:
        raise ConfigureError(
            "parameter contract is empty: give the robot's contract.yaml, such as config/panda/contract.yaml, or start "
            "the node by its launch file"
        )
    return RobotDescription(path)

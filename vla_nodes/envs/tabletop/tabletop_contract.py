"""What this world's robot and camera fix, and what its demonstrations hold (policy/contract.py)."""

from __future__ import annotations

from vla_nodes.envs.tabletop.camera import MAX_RANGE
from vla_nodes.pipeline.robot_description import RobotDescription
from vla_nodes.policy.contract import Actions, Camera, Contract, StateVector

WORKSPACE_CENTER, WORKSPACE_SIZE = (0.48, 0.0, 0.15), 0.25  # m in base: positions enter a network relative to these
MOVE_SCALE, TURN_SCALE = 0.016, 0.05  # m and rad in a period that a normalised action of 1 stands for
ROBOT = RobotDescription("config/panda/contract.yaml").robot
JOINTS = len(ROBOT.joints)

CONTRACT = Contract(
    robot=ROBOT,
    state=(
        StateVector(
            name="tool_position", token="position", size=3, unit="m", offset=WORKSPACE_CENTER, scale=WORKSPACE_SIZE
        ),
        StateVector(name="tool_rotation", token="position", size=6),
        StateVector(name="gripper", token="position", size=1, offset=0.5, scale=0.5),
        StateVector(name="joint_positions", token="position", size=JOINTS, unit="rad", scale=2.0),
        StateVector(name="tool_velocity", size=3, unit="m/s", token="velocity", scale=0.2),
        StateVector(name="gripper_velocity", size=1, unit="1/s", token="velocity", scale=4.0),
        StateVector(name="joint_velocities", size=JOINTS, unit="rad/s", token="velocity"),
    ),
    actions=Actions(
        space="ee_delta",
        columns=("dx", "dy", "dz", "rx", "ry", "rz", "gripper"),
        scale=(MOVE_SCALE,) * 3 + (TURN_SCALE,) * 3 + (1.0,),
        grippers=("gripper",),
        horizon=16,
        period=0.05,
    ),
    cameras=(Camera(name="camera", depth_range=(0.1, MAX_RANGE)),),
    tick=0.1,
)

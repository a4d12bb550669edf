"""What the launch files share: arguments and lifecycle nodes. Needs launch_ros.

No transition is requested from a launch file: a node with the parameter `autostart` brings itself up when its process
starts. A request would go by the node's name, and so also to a node that another launch has started and its operator
has deactivated; and a handler that activates whatever has been configured would do so again at a later configure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.actions import DeclareLaunchArgument, RegisterEventHandler
from launch.launch_description_entity import LaunchDescriptionEntity
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.parameter_descriptions import ParameterFile
from launch_ros.substitutions import FindPackageShare


def policy_arguments() -> list[DeclareLaunchArgument]:
    """Which policy, and where it computes."""
    return [
        DeclareLaunchArgument(
            "checkpoint",
            default_value="",
            description="Checkpoint folder (model.safetensors, config.json). Empty: what params_file says.",
        ),
        DeclareLaunchArgument(
            "device",
            default_value="",
            choices=["", "auto", "cpu", "cuda"],
            description="Where the policy computes. Empty: what params_file says.",
        ),
    ]


def common_arguments() -> list[DeclareLaunchArgument]:
    """Which robot, which parameters, and how much is logged."""
    return [
        DeclareLaunchArgument(
            "robot",
            default_value="panda",
            description="Robot: the folder of config/ with its contract.yaml and params.yaml.",
        ),
        DeclareLaunchArgument(
            "params_file",
            default_value=PathJoinSubstitution(
                [FindPackageShare("vla_nodes"), "config", LaunchConfiguration("robot"), "params.yaml"]
            ),
            description="Parameters of all nodes, one YAML file. An unknown parameter name in it is an error at "
            "configure.",
        ),
        DeclareLaunchArgument(
            "log_level",
            default_value="info",
            choices=["debug", "info", "warn", "error", "fatal"],
            description="Level from which the nodes log.",
        ),
    ]


def lifecycle_node(name: str, parameters: dict[str, Any], namespace: Any = "", **options: Any) -> LifecycleNode:
    """A node of this package with the parameters of params_file, and after them its own; options: LifecycleNode's."""
    return LifecycleNode(
        package="vla_nodes",
        executable=name,
        name=name,
        namespace=namespace,
        parameters=[ParameterFile(LaunchConfiguration("params_file"), allow_substs=True), parameters],
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        output="screen",
        **options,
    )


def once_active(node: LifecycleNode, actions: Sequence[LaunchDescriptionEntity]) -> RegisterEventHandler:
    """What is to follow the node's first activation. Goes before the node, so that no event of its start is missed."""
    return RegisterEventHandler(
        OnStateTransition(
            target_lifecycle_node=node,
            start_state="activating",
            goal_state="active",
            entities=list(actions),
            handle_once=True,
        )
    )

"""What the launch files share: arguments and lifecycle nodes. Needs launch_ros.

No transition is requested from a launch file: a node with the parameter `autostart` brings itself up when its process
starts. A request would go by the node's name, and so also to a node that another launch has started and its operator
has deactivated; and a handler that activates whatever has been configured would do so again at a later configure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from launch.actions import DeclareLaunchArgument, RegisterEventHandler
from launch.launch_context import LaunchContext
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
            description="Parameters of all nodes, one YAML file, taken as it stands (no substitutions). A parameter or "
            "node name in it that does not exist is an error at configure.",
        ),
        DeclareLaunchArgument(
            "params_overlay",
            default_value="",
            description="A second YAML file of the same form, whose values go before those of params_file: what is "
            "special to this cell. Empty: none.",
        ),
        DeclareLaunchArgument(
            "remap",
            default_value="",
            description='Remappings for all nodes, separated by spaces, e.g. remap:="camera/color/image_raw:=/rgb '
            'joint_states:=/left/joint_states". With NODE: before the first name for one node alone.',
        ),
        DeclareLaunchArgument(
            "log_level",
            default_value="info",
            choices=["debug", "info", "warn", "error", "fatal"],
            description="Level from which the nodes log.",
        ),
    ]


_NAME = r"(?:~/|/)?[A-Za-z_]\w*(?:/[A-Za-z_]\w*)*"


def topic_name(argument: str, text: str) -> str:
    """The value of a launch argument that names a topic. Raises ValueError where it cannot be one."""
    if not re.fullmatch(_NAME, text):
        raise ValueError(f"launch argument {argument}: '{text}' is no name of a topic")
    return text


def remappings(text: str) -> list[tuple[str, str]]:
    """The pairs of "a:=b c:=d". Raises ValueError, in one line, where a part is no remapping of a topic or service."""
    pairs = []
    for word in text.split():
        match = re.fullmatch(rf"((?:\w+:)?{_NAME}):=({_NAME})", word)
        if match is None or match[1].split(":")[-1].startswith("__"):
            raise ValueError(f"launch argument remap: '{word}' is not FROM:=TO with two topic or service names")
        pairs.append((match[1], match[2]))
    return pairs


def lifecycle_node(
    context: LaunchContext, name: str, parameters: dict[str, Any], namespace: Any = "", **options: Any
) -> LifecycleNode:
    """A node of this package with the parameters of params_file, then of params_overlay, then its own, and with the
    remappings of the argument remap; options: LifecycleNode's. The files are taken as they stand: with substitutions, a
    "$(" in a comment would be one. ValueError: remap is malformed."""
    overlay = context.launch_configurations["params_overlay"]
    files = [LaunchConfiguration("params_file"), *([overlay] if overlay else [])]
    remap = [*options.pop("remappings", []), *remappings(context.launch_configurations["remap"])]
    return LifecycleNode(
        package="vla_nodes",
        executable=name,
        name=name,
        namespace=namespace,
        parameters=[*(ParameterFile(file) for file in files), parameters],
        remappings=remap,
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

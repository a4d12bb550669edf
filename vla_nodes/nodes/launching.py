"""What the launch files share: arguments, and a lifecycle node with what takes it to active. Needs launch_ros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.actions import DeclareLaunchArgument, EmitEvent, RegisterEventHandler
from launch.event_handlers import OnProcessStart
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterFile
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import Transition

from launch import LaunchDescriptionEntity


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
            description="Robot: the folder of config/ with its URDF, limits and params.yaml.",
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


def started(node: LifecycleNode, then: Sequence[LaunchDescriptionEntity] = ()) -> list[LaunchDescriptionEntity]:
    """The node, configured and activated as soon as it runs, and what is to follow then."""

    def change(transition: int) -> EmitEvent:
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition))

    def reached(start: str, goal: str, entities: list[LaunchDescriptionEntity]) -> RegisterEventHandler:
        return RegisterEventHandler(
            OnStateTransition(target_lifecycle_node=node, start_state=start, goal_state=goal, entities=entities)
        )

    return [
        # before the node, so that no event of its start is missed
        RegisterEventHandler(OnProcessStart(target_action=node, on_start=[change(Transition.TRANSITION_CONFIGURE)])),
        # from 'configuring' only: a node that someone deactivates stays inactive
        reached("configuring", "inactive", [change(Transition.TRANSITION_ACTIVATE)]),
        *([reached("activating", "active", list(then))] if then else []),
        node,
    ]

"""Bring up camera, policy and action node, and the simulated robot on request.

    ros2 launch vla_nodes robot.launch.py use_sim:=true
    ros2 topic pub --once /instruction std_msgs/msg/String "{data: 'pick up the red block'}"

Parameters come from config/<robot>/params.yaml unless params_file names another file; an argument given here goes
before the file. `ros2 launch vla_nodes robot.launch.py --show-args` describes every argument.
"""

from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
)
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessStart
from launch.events import matches_action
from launch.substitutions import EnvironmentVariable, LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterFile
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import Transition

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

ARGUMENTS = [
    DeclareLaunchArgument(
        "use_sim",
        default_value="false",
        choices=["true", "false"],
        description="Start the simulated robot (sim_node) in place of a real one and its ros2_control.",
    ),
    DeclareLaunchArgument(
        "robot",
        default_value="panda",
        description="Robot: the folder of config/ with its URDF, limits and params.yaml.",
    ),
    DeclareLaunchArgument(
        "camera",
        default_value="auto",
        description="Source of camera_node (its parameter 'source'); 'none' starts no camera_node, for a driver that "
        "runs already (remap its topics to camera/...); 'auto' is 'sim' with use_sim, else 'none'.",
    ),
    DeclareLaunchArgument(
        "checkpoint",
        default_value="",
        description="Checkpoint folder for the policy (model.safetensors, config.json). Empty: what params_file says.",
    ),
    DeclareLaunchArgument(
        "device",
        default_value="",
        choices=["", "auto", "cpu", "cuda"],
        description="Where the policy computes. Empty: what params_file says.",
    ),
    DeclareLaunchArgument(
        "instruction",
        default_value="",
        description="Instruction to start with. Empty: wait for one on the topic 'instruction'.",
    ),
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of every node and relative topic."),
    DeclareLaunchArgument(
        "params_file",
        default_value=PathJoinSubstitution(
            [FindPackageShare("vla_nodes"), "config", LaunchConfiguration("robot"), "params.yaml"]
        ),
        description="Parameters of all nodes, one YAML file. An unknown parameter name in it is an error at configure.",
    ),
    DeclareLaunchArgument(
        "use_sim_time",
        default_value=LaunchConfiguration("use_sim"),
        choices=["true", "false"],
        description="Take time from /clock (simulation, bag replay). Default: the value of use_sim.",
    ),
    DeclareLaunchArgument(
        "autostart",
        default_value="true",
        choices=["true", "false"],
        description="Configure and activate every node. With false: ros2 lifecycle set /<node> configure.",
    ),
    DeclareLaunchArgument(
        "respawn",
        default_value="false",
        choices=["true", "false"],
        description="Start a node again 1 s after it ends; with autostart it then configures and activates itself.",
    ),
    DeclareLaunchArgument(
        "log_level",
        default_value="info",
        choices=["debug", "info", "warn", "error", "fatal"],
        description="Level from which the nodes log.",
    ),
]


def is_true(context: LaunchContext, name: str) -> bool:
    """Whether a boolean launch argument is set (its choices are checked by launch)."""
    return context.launch_configurations[name].lower() == "true"


def bring_up(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The nodes and their transitions, for the arguments as given."""
    argument = context.launch_configurations
    use_sim = is_true(context, "use_sim")
    camera = argument["camera"]
    if camera == "auto":
        camera = "sim" if use_sim else "none"

    given = {name: argument[name] for name in ("checkpoint", "device", "instruction") if argument[name]}
    own_parameters: dict[str, dict] = {}
    if use_sim:
        own_parameters["sim_node"] = {}
    if camera != "none":
        own_parameters["camera_node"] = {"source": camera}
    own_parameters["policy_node"] = given
    own_parameters["action_node"] = {}

    entities: list[LaunchDescriptionEntity] = []
    for name, parameters in own_parameters.items():
        entities += managed_node(context, name, parameters)
    return entities


def managed_node(context: LaunchContext, name: str, parameters: dict) -> list[LaunchDescriptionEntity]:
    """A lifecycle node, and with autostart what takes it to active."""
    autostart, respawn = is_true(context, "autostart"), is_true(context, "respawn")
    common = {"use_sim_time": is_true(context, "use_sim_time")}
    if autostart and respawn:
        # A node that was killed stays matched until its discovery lease is over (20 s with Fast DDS), so a transition
        # requested from here may be answered by nobody: a node that may be started again brings itself up.
        common["autostart"] = True
    node = LifecycleNode(
        package="vla_nodes",
        executable=name,
        name=name,
        namespace=LaunchConfiguration("namespace"),
        parameters=[ParameterFile(LaunchConfiguration("params_file"), allow_substs=True), common | parameters],
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        output="screen",
        respawn=respawn,
        respawn_delay=1.0,
    )
    if not autostart or respawn:
        return [node]

    def change(transition: int) -> EmitEvent:
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition))

    return [
        # before the node, so that no event of its start is missed
        RegisterEventHandler(OnProcessStart(target_action=node, on_start=[change(Transition.TRANSITION_CONFIGURE)])),
        # from 'configuring' only: a node that someone deactivates stays inactive
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=node,
                start_state="configuring",
                goal_state="inactive",
                entities=[change(Transition.TRANSITION_ACTIVATE)],
            )
        ),
        node,
    ]


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription(
        [
            *ARGUMENTS,
            SetEnvironmentVariable("RCUTILS_LOGGING_BUFFERED_STREAM", "1"),
            # A simulated robot must not meet a real one on the network, nor another desk's simulation. With a real
            # robot the range stays as the machine has it: its driver may run on another computer.
            SetEnvironmentVariable(
                "ROS_AUTOMATIC_DISCOVERY_RANGE",
                EnvironmentVariable("ROS_AUTOMATIC_DISCOVERY_RANGE", default_value="LOCALHOST"),
                condition=IfCondition(LaunchConfiguration("use_sim")),
            ),
            OpaqueFunction(function=bring_up),
        ]
    )

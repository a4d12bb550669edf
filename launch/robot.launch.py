"""Bring up camera, policy and action node, and the simulated robot on request.

    ros2 launch vla_nodes robot.launch.py use_sim:=true
    ros2 topic pub --once /instruction std_msgs/msg/String "{data: 'pick up the red block'}"

Parameters come from config/<robot>/params.yaml unless params_file names another file; those of params_overlay go
before it, and an argument given here before both. `ros2 launch vla_nodes robot.launch.py --show-args` describes
every argument.
"""

from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.substitutions import EnvironmentVariable, LaunchConfiguration

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from vla_nodes.nodes.launching import common_arguments, lifecycle_node, policy_arguments, topic_name

ARGUMENTS = [
    DeclareLaunchArgument(
        "use_sim",
        default_value="false",
        choices=["true", "false"],
        description="Start the simulated robot (sim_node) in place of a real one and its ros2_control.",
    ),
    DeclareLaunchArgument(
        "camera",
        default_value="auto",
        description="Source of camera_node (its parameter 'source'); 'none' starts no camera_node, for a driver that "
        "runs already (remap its topics to camera/...); 'auto' is 'sim' with use_sim, else 'none'.",
    ),
    DeclareLaunchArgument(
        "instruction",
        default_value="",
        description="Instruction to start with. Empty: wait for one on the topic 'instruction'.",
    ),
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of every node and relative topic."),
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
        description="Configure and activate every node at its start. With false: ros2 lifecycle set /<node> configure.",
    ),
    DeclareLaunchArgument(
        "respawn",
        default_value="false",
        choices=["true", "false"],
        description="Start a node again 1 s after it ends; with autostart it then configures and activates itself.",
    ),
    DeclareLaunchArgument(
        "resume_instruction",
        default_value=LaunchConfiguration("use_sim"),
        choices=["true", "false"],
        description="After policy_node or action_node was deactivated or restarted, go on with the instruction in "
        "force; with false the arm rests until it is told again. Default: the value of use_sim.",
    ),
    DeclareLaunchArgument(
        "dry_run",
        default_value="",
        choices=["", "true", "false"],
        description="With true, trajectories go to vla/preview/... only, nothing moves. Empty: what params_file says.",
    ),
    DeclareLaunchArgument(
        "output",
        default_value="",
        choices=["", "trajectory_topic", "follow_joint_trajectory", "forward_positions"],
        description="How action_node sends commands (its parameter 'output'). Empty: what params_file says.",
    ),
    DeclareLaunchArgument(
        "controller_topic",
        default_value="",
        description="Topic of the arm's controller in place of arm_controller/joint_trajectory, e.g. "
        "scaled_joint_trajectory_controller/joint_trajectory.",
    ),
    DeclareLaunchArgument(
        "record",
        default_value="",
        description="Folder to record episodes into from the start, by recorder_node. Empty: record nothing.",
    ),
    DeclareLaunchArgument(
        "seed",
        default_value="",
        description="Where the simulated objects stand: a whole number from 0. Empty: what params_file says.",
    ),
    DeclareLaunchArgument(
        "scene",
        default_value="",
        description="Simulated scene: demo, random, or an evaluation suite. Empty: what params_file says.",
    ),
    DeclareLaunchArgument(
        "publish_clock",
        default_value="",
        choices=["", "true", "false"],
        description="Whether sim_node publishes /clock; false where another simulation does. Empty: what params_file "
        "says.",
    ),
    *policy_arguments(),
    *common_arguments(),
]
NODE_OF = {
    "checkpoint": "policy_node",
    "device": "policy_node",
    "instruction": "policy_node",
    "dry_run": "action_node",
    "output": "action_node",
    "seed": "sim_node",
    "scene": "sim_node",
    "publish_clock": "sim_node",
}
"""The node whose parameter of the same name an argument sets, where it is not empty."""


def is_true(context: LaunchContext, name: str) -> bool:
    """Whether a boolean launch argument is set (its choices are checked by launch)."""
    return context.launch_configurations[name].lower() == "true"


def typed(name: str, text: str) -> bool | int | str:
    """An argument as the value of the parameter it sets. (launch_ros quotes text: "yes" stays text.)"""
    if name == "seed":
        if not text.isdecimal():
            raise ValueError(f"launch argument seed: '{text}' is no whole number from 0")
        return int(text)
    if name in ("dry_run", "publish_clock"):
        return text == "true"
    return text


def bring_up(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The nodes, for the arguments as given."""
    argument = context.launch_configurations
    use_sim = is_true(context, "use_sim")
    camera = argument["camera"]
    if camera == "auto":
        camera = "sim" if use_sim else "none"

    own_parameters: dict[str, dict] = {}
    if use_sim:
        own_parameters["sim_node"] = {}
    if camera != "none":
        own_parameters["camera_node"] = {"source": camera}
    own_parameters["policy_node"] = {"resume_instruction": is_true(context, "resume_instruction")}
    own_parameters["action_node"] = {}
    if argument["record"]:
        own_parameters["recorder_node"] = {"out": argument["record"]}
    for name, node in NODE_OF.items():
        if argument[name] and node not in own_parameters:
            raise ValueError(f"launch argument {name}: it is for {node}, which runs with use_sim:=true only")
        if argument[name]:
            own_parameters[node][name] = typed(name, argument[name])
    topic = argument["controller_topic"]
    renamed = [("arm_controller/joint_trajectory", topic_name("controller_topic", topic))] if topic else []

    # Each node brings itself up (see launching.py), also where it is started again.
    common = {name: is_true(context, name) for name in ("use_sim_time", "autostart")}
    namespace, respawn = LaunchConfiguration("namespace"), is_true(context, "respawn")
    return [
        lifecycle_node(
            context, name, common | parameters, namespace, respawn=respawn, respawn_delay=1.0, remappings=renamed
        )
        for name, parameters in own_parameters.items()
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

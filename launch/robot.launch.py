"""Bring up camera, policy and action node, and the simulated robot on request.

    ros2 launch vla_nodes robot.launch.py use_sim:=true
    ros2 topic pub --once /instruction std_msgs/msg/String "{data: 'pick up the red block'}"

Parameters come from config/<robot>/params.yaml unless params_file names another file; an argument given here goes
before the file. `ros2 launch vla_nodes robot.launch.py --show-args` describes every argument.
"""

from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.substitutions import EnvironmentVariable, LaunchConfiguration

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from vla_nodes.nodes.launching import common_arguments, lifecycle_node, policy_arguments

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
    *policy_arguments(),
    *common_arguments(),
]


def is_true(context: LaunchContext, name: str) -> bool:
    """Whether a boolean launch argument is set (its choices are checked by launch)."""
    return context.launch_configurations[name].lower() == "true"


def bring_up(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The nodes, for the arguments as given."""
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
    own_parameters["policy_node"] = {"resume_instruction": is_true(context, "resume_instruction"), **given}
    own_parameters["action_node"] = {}

    # Each node brings itself up (see launching.py), also where it is started again.
    common = {name: is_true(context, name) for name in ("use_sim_time", "autostart")}
    namespace, respawn = LaunchConfiguration("namespace"), is_true(context, "respawn")
    return [
        lifecycle_node(name, common | parameters, namespace, respawn=respawn, respawn_delay=1.0)
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

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
from vla_nodes.nodes.launching import common_arguments, lifecycle_node, policy_arguments, started

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
        description="Configure and activate every node. With false: ros2 lifecycle set /<node> configure.",
    ),
    DeclareLaunchArgument(
        "respawn",
        default_value="false",
        choices=["true", "false"],
        description="Start a node again 1 s after it ends; with autostart it then configures and activates itself.",
    ),
    *policy_arguments(),
    *common_arguments(),
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
    node = lifecycle_node(
        name, common | parameters, LaunchConfiguration("namespace"), respawn=respawn, respawn_delay=1.0
    )
    return [node] if not autostart or respawn else started(node)


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

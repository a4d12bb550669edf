"""Play a recording into the live policy_node and action_node, with the recording's clock; the robot does not move.

    ros2 launch vla_nodes replay.launch.py bag:=recordings/20260101-120000_000
    ros2 launch vla_nodes replay.launch.py bag:=X mode:=rate rate:=1.0 record:=replayed

In lock step (the default) the commands are those of `python -m vla_nodes replay` with the same latency, on any machine.
With mode:=rate the recording runs in real time, by `ros2 bag play` where rosbag2 is installed. What the nodes said
when it was recorded is not played. Trajectories go to vla/preview/... unless dry_run:=false.
"""

from ament_index_python.packages import PackageNotFoundError, get_package_prefix
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
    Shutdown,
    TimerAction,
)
from launch.event_handlers import OnProcessExit
from launch.substitutions import EnvironmentVariable
from launch_ros.actions import LifecycleNode

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from vla_nodes.nodes.launching import common_arguments, lifecycle_node, once_active, policy_arguments
from vla_nodes.nodes.topic_names import OURS

ARGUMENTS = [
    DeclareLaunchArgument("bag", description="Recording to play: a rosbag2 folder, or one storage file."),
    DeclareLaunchArgument(
        "mode",
        default_value="lockstep",
        choices=["lockstep", "rate"],
        description="lockstep: every message is handled before the next is played; rate: in real time, times rate.",
    ),
    DeclareLaunchArgument(
        "rate", default_value="1.0", description="Seconds of recording per second; in lock step at most."
    ),
    DeclareLaunchArgument(
        "player",
        default_value="auto",
        choices=["auto", "ours", "rosbag2"],
        description="Who plays in mode rate; 'auto': `ros2 bag play` where rosbag2 is installed, else player_node.",
    ),
    DeclareLaunchArgument(
        "latency",
        default_value="0.05",
        description="What a policy step takes in lock step [s of the recording], as the offline replay's --latency.",
    ),
    DeclareLaunchArgument(
        "instruction", default_value="", description="Instruction in place of the recorded ones. Empty: the recorded."
    ),
    DeclareLaunchArgument(
        "dry_run",
        default_value="true",
        choices=["true", "false"],
        description="Trajectories go to vla/preview/...; with false to the controllers, for a robot that may move.",
    ),
    DeclareLaunchArgument(
        "record", default_value="", description="Folder to record what the nodes say into. Empty: record nothing."
    ),
    *policy_arguments(),
    *common_arguments(),
]


def bring_up(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The nodes, then the player; all ends when the recording does."""
    argument = context.launch_configurations
    lockstep = argument["mode"] == "lockstep"
    given = {name: argument[name] for name in ("checkpoint", "device") if argument[name]}
    nodes = {
        "policy_node": {
            "paced": lockstep,
            "paced_latency": float(argument["latency"]),
            "resume_instruction": True,
            **given,
        },
        "action_node": {"paced": lockstep, "dry_run": argument["dry_run"] == "true"},
    }
    if argument["record"]:
        preview = [name for name in OURS if name.startswith("vla/preview/")]
        nodes["recorder_node"] = {"out": argument["record"], "extra_topics": preview}
    player = players_process(context)
    ours = isinstance(player, LifecycleNode)  # which waits for the nodes itself
    if not ours and argument["instruction"]:
        nodes["policy_node"]["instruction"] = argument["instruction"]
    then = [] if ours else [TimerAction(period=2.0, actions=[player])]
    entities = []
    for name, parameters in nodes.items():
        # 20 s of a busy machine to end in: a recorder that ends in peace writes its index
        parameters = {"use_sim_time": True, "autostart": True, **parameters}
        node = lifecycle_node(context, name, parameters, sigterm_timeout="20")
        entities += [once_active(node, then), node] if then and name == "policy_node" else [node]
    over = RegisterEventHandler(OnProcessExit(target_action=player, on_exit=[Shutdown(reason="the recording is over")]))
    return [*entities, over, *([player] if ours else [])]


def players_process(context: LaunchContext) -> ExecuteProcess:
    """player_node, or `ros2 bag play`."""
    argument = context.launch_configurations
    ours = argument["mode"] == "lockstep" or argument["player"] == "ours"
    if not ours and argument["player"] == "auto":
        ours = not rosbag2_is_there()
    if not ours:
        excluded = [f"/{name.removeprefix('/')}" for name in (*OURS, "clock")]  # `--clock` publishes it
        if argument["instruction"]:
            excluded.append("/instruction")
        command = [
            "ros2",
            "bag",
            "play",
            argument["bag"],
            "--clock",
            "100",
            "--rate",
            argument["rate"],
        ]
        return ExecuteProcess(
            cmd=[*command, "--disable-keyboard-controls", "--exclude-topics", *excluded], output="screen"
        )
    values = {name: argument[name] for name in ("bag", "mode", "instruction") if argument[name]}
    wait = ["policy_node", "action_node"]
    parameters = {**values, "rate": float(argument["rate"]), "autostart": True, "wait_for": wait}
    return lifecycle_node(context, "player_node", parameters)


def rosbag2_is_there() -> bool:
    """Whether `ros2 bag play` can be run."""
    try:
        get_package_prefix("ros2bag")
    except PackageNotFoundError:
        return False
    return True


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription(
        [
            *ARGUMENTS,
            SetEnvironmentVariable("RCUTILS_LOGGING_BUFFERED_STREAM", "1"),
            # a recording played for a test must not meet a robot on the network
            SetEnvironmentVariable(
                "ROS_AUTOMATIC_DISCOVERY_RANGE",
                EnvironmentVariable("ROS_AUTOMATIC_DISCOVERY_RANGE", default_value="LOCALHOST"),
            ),
            OpaqueFunction(function=bring_up),
        ]
    )

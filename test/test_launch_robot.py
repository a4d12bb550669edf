"""launch/robot.launch.py, with the real launch and launch_ros: what it starts for which arguments."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

launch = pytest.importorskip("launch", reason="launch is not installed (it is no PyPI package; comes with ROS 2)")
pytest.importorskip("launch_ros", reason="launch_ros is not installed (it is no PyPI package; comes with ROS 2)")

from launch.actions import DeclareLaunchArgument, OpaqueFunction  # noqa: E402
from launch_ros.actions import LifecycleNode  # noqa: E402
from launch_ros.utilities import evaluate_parameters  # noqa: E402

from launch import LaunchContext, LaunchDescription  # noqa: E402
from vla_nodes.demo.processes import free_domain  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "launch/robot.launch.py"
REQUIRED = {
    "use_sim", "robot", "camera", "checkpoint", "device", "instruction", "namespace", "params_file", "use_sim_time",
    "autostart", "respawn", "resume_instruction", "log_level", "dry_run", "output", "controller_topic", "record",
    "seed", "scene", "publish_clock", "params_overlay", "remap",
}  # fmt: skip


@pytest.fixture
def description(monkeypatch) -> LaunchDescription:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    specification = importlib.util.spec_from_file_location("robot_launch", FILE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.generate_launch_description()


def context_of(**arguments: str) -> LaunchContext:
    """A context in which the params file is this checkout's."""
    context = LaunchContext()
    file = ROOT / "config/panda/params.yaml"
    context.launch_configurations.update({"params_file": str(file), "namespace": "", "log_level": "info", **arguments})
    return context


def entities(description: LaunchDescription, **arguments: str) -> list:
    """What the launch file's function gives for these arguments, without starting anything."""
    context = LaunchContext()
    context.launch_configurations.update(arguments)
    result = []
    for entity in description.entities:
        if isinstance(entity, DeclareLaunchArgument):
            entity.execute(context)
        elif isinstance(entity, OpaqueFunction):
            result += entity.execute(context)
    return result


def nodes(description: LaunchDescription, **arguments: str) -> dict[str, LifecycleNode]:
    found = [e for e in entities(description, **arguments) if isinstance(e, LifecycleNode)]
    return {node.node_executable: node for node in found}


def test_every_argument_is_there_and_described(description):
    declared = {a.name: a for a in description.entities if isinstance(a, DeclareLaunchArgument)}
    assert set(declared) >= REQUIRED
    assert all(len(a.description) > 20 for a in declared.values())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"policy_node", "action_node"}),
        ({"use_sim": "true"}, {"sim_node", "camera_node", "policy_node", "action_node"}),
        ({"use_sim": "true", "camera": "none"}, {"sim_node", "policy_node", "action_node"}),
        ({"camera": "sim"}, {"camera_node", "policy_node", "action_node"}),
        ({"record": "somewhere"}, {"policy_node", "action_node", "recorder_node"}),
    ],
)
def test_the_arguments_choose_the_nodes(description, arguments, expected):
    assert set(nodes(description, **arguments)) == expected


def parameters(node: LifecycleNode, context: LaunchContext) -> dict:
    """What the launch file gives a node beside the params file."""
    given = {}
    for one in evaluate_parameters(context, node._Node__parameters):
        given |= one if isinstance(one, dict) else {}
    return given


@pytest.mark.parametrize("respawn", ["true", "false"])
@pytest.mark.parametrize("autostart", ["true", "false"])
def test_no_launch_asks_for_a_transition(description, autostart, respawn):
    """Nothing but the nodes: what activates whatever is configured would do so again, with nobody asking."""
    found = entities(description, autostart=autostart, respawn=respawn)
    assert {type(entity) for entity in found} == {LifecycleNode} and len(found) == 2
    for node in found:
        assert parameters(node, context_of())["autostart"] is (autostart == "true")


@pytest.mark.parametrize("use_sim", ["true", "false"])
def test_an_instruction_is_resumed_in_simulation_only_unless_told(description, use_sim):
    resumed = {
        given: parameters(
            nodes(description, use_sim=use_sim, **({"resume_instruction": given} if given else {}))["policy_node"],
            context_of(),
        )["resume_instruction"]
        for given in ("", "true", "false")
    }
    assert resumed == {"": use_sim == "true", "true": True, "false": False}


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*/params.yaml")), ids=lambda file: file.parent.name)
def test_params_files_reach_the_nodes_as_they_stand(description, file, tmp_path):
    """Also with a comment that launch would take for a substitution; the overlay after it, the arguments last."""
    commented = tmp_path / "params.yaml"
    commented.write_text("# $(ros2 pkg prefix ur_description)/share\n" + file.read_text())
    given = {"params_file": str(commented), "params_overlay": str(file), "use_sim": "true"}
    for node in nodes(description, **given).values():
        context = context_of(**given)
        first, second, last = evaluate_parameters(context, node._Node__parameters)
        assert first.read_text() == commented.read_text() and second == file and isinstance(last, dict)


def test_arguments_become_the_parameters_of_their_node(description):
    found = nodes(
        description, use_sim="true", dry_run="true", output="forward_positions", seed="7", scene="random",
        publish_clock="false", record="2024", instruction="yes", checkpoint="12",
    )  # fmt: skip
    expected = {
        "action_node": {"dry_run": True, "output": "forward_positions"},
        "sim_node": {"seed": 7, "scene": "random", "publish_clock": False},
        "recorder_node": {"out": "2024"},
        "policy_node": {"instruction": "yes", "checkpoint": "12"},
    }
    for name, values in expected.items():
        assert values.items() <= parameters(found[name], context_of()).items()
    assert "dry_run" not in parameters(nodes(description)["action_node"], context_of()), "left to the params file"


def remapped(node: LifecycleNode) -> set[tuple[str, str]]:
    context = LaunchContext()
    text = lambda parts: "".join(part.perform(context) for part in parts)  # noqa: E731
    return {(text(a), text(b)) for a, b in node._Node__remappings}


def test_every_node_is_remapped(description):
    given = {"remap": " joint_states:=/left/joint_states  policy_node:camera/pose:=pose", "controller_topic": "c/t"}
    for node in nodes(description, use_sim="true", **given).values():
        assert remapped(node) == {
            ("joint_states", "/left/joint_states"), ("policy_node:camera/pose", "pose"),
            ("arm_controller/joint_trajectory", "c/t"),
        }  # fmt: skip


@pytest.mark.parametrize(
    "wrong", ["a", "a:=", ":=b", "a:=b:=c", "a=b", "a:=1b", "__ns:=/x", "node:__node:=b", "a:=b//c"]
)
def test_a_malformed_remapping_is_refused_in_one_line(description, wrong):
    with pytest.raises(ValueError) as caught:
        nodes(description, remap=f"x:=y {wrong}")
    assert f"remap: '{wrong}' is not FROM:=TO" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("seed", "1.5"), ("seed", "-1"), ("controller_topic", "a b")])
def test_a_wrong_argument_is_named(description, name, value):
    with pytest.raises(ValueError, match=f"{name}: '{value}' is no"):
        nodes(description, use_sim="true", **{name: value})


def test_an_argument_for_the_simulation_is_refused_without_it(description):
    with pytest.raises(ValueError, match="scene: it is for sim_node, which runs with use_sim:=true only"):
        nodes(description, scene="random")


@pytest.mark.parametrize("wrong", ["use_sim:=perhaps", "log_level:=loud", "device:=tpu", "remap:=a", "seed:=x"])
def test_a_wrong_value_is_refused_by_name(wrong, tmp_path):
    log = tmp_path / "launch.log"
    result = run_launch(log, wrong)
    result.wait(60)
    output = log.read_text()
    assert result.returncode != 0
    assert wrong.split(":=")[0] in output and wrong.split(":=")[1] in output and "Traceback" not in output


def run_launch(log: Path, *arguments: str, domain: int | None = None) -> subprocess.Popen:
    """The launch file under launch's own service, as `ros2 launch` does it, with its output in `log`."""
    code = (
        "import sys; from launch import LaunchDescription, LaunchService;"
        "from launch.actions import IncludeLaunchDescription;"
        "from launch.launch_description_sources import PythonLaunchDescriptionSource as Source;"
        "service = LaunchService(argv=[]);"
        "service.include_launch_description(LaunchDescription([IncludeLaunchDescription(Source(sys.argv[1]),"
        "launch_arguments=[tuple(a.split(':=', 1)) for a in sys.argv[2:]])]));"
        "sys.exit(service.run())"
    )
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(FILE), *arguments],
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {
                "ROS_DOMAIN_ID": str(free_domain() if domain is None else domain),
                "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "PYTHONUNBUFFERED": "1",
            },
        )  # fmt: skip


def four_active(log: Path, process: subprocess.Popen) -> None:
    """Wait until the simulated graph is up."""
    deadline = time.monotonic() + 120
    while log.read_text().count("]: active") < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert log.read_text().count("]: active") == 4, log.read_text()[-3000:]


@pytest.fixture
def simulation():
    """Skips where the simulated graph cannot be started."""
    pytest.importorskip("vla_nodes.msg", reason="the messages are not built: colcon build, or tools/setup")
    if not (ROOT / "resource/checkpoints/nano/model.safetensors").exists():
        pytest.skip("resource/checkpoints/nano holds no weights")


def test_the_simulated_graph_comes_up_and_ends_cleanly(tmp_path, simulation):
    log = tmp_path / "launch.log"
    process = run_launch(log, "use_sim:=true")
    try:
        four_active(log, process)
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C in a terminal reaches launch and every node
        process.wait(90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text()
    assert "Traceback" not in text, text[-3000:]
    assert text.count("process has finished cleanly") == 4, text[-3000:]
    left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert not left


def test_a_second_launch_ends_and_configure_activates_nothing(tmp_path, simulation):
    """In the domain of a robot at work: its nodes are neither ended nor asked for anything; nor does its own launch
    activate what its operator has only configured."""
    import nodes_support as support
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState, GetState

    graph = support.Graph()
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    launches = [run_launch(logs[0], "use_sim:=true", domain=graph.domain)]

    def change(label: str) -> bool:
        request = ChangeState.Request(transition=Transition(label=label))
        return graph.call(ChangeState, "action_node/change_state", request).success

    try:
        four_active(logs[0], launches[0])
        assert change("deactivate") and change("cleanup")
        launches.append(run_launch(logs[1], "use_sim:=true", domain=graph.domain))
        launches[1].wait(120)
        ended = logs[1].read_text()
        assert ended.count("runs in this domain and namespace") == 4 and ended.count("exit code 1,") == 4, ended
        assert "Traceback" not in ended and "]: configured" not in ended
        assert graph.call(GetState, "action_node/get_state").current_state.label == "unconfigured"
        assert change("configure")
        time.sleep(2.0)  # for whoever would activate it
        assert graph.call(GetState, "action_node/get_state").current_state.label == "inactive"
        assert change("activate")
        assert "process has" not in logs[0].read_text()
    finally:
        for process in launches:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(90)
        graph.close()

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

from launch import LaunchContext, LaunchDescription  # noqa: E402
from vla_nodes.demo.processes import free_domain  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "launch/robot.launch.py"
REQUIRED = {
    "use_sim", "robot", "camera", "checkpoint", "device", "instruction", "namespace", "params_file", "use_sim_time",
    "autostart", "respawn", "log_level",
}  # fmt: skip


@pytest.fixture
def description(monkeypatch) -> LaunchDescription:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    specification = importlib.util.spec_from_file_location("robot_launch", FILE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.generate_launch_description()


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
    ],
)
def test_the_arguments_choose_the_nodes(description, arguments, expected):
    assert set(nodes(description, **arguments)) == expected


def test_transitions_only_with_autostart_and_without_respawn(description):
    count = {
        (autostart, respawn): len(entities(description, autostart=autostart, respawn=respawn))
        for autostart in ("true", "false")
        for respawn in ("true", "false")
    }
    assert count[("true", "false")] == 2 * 3  # two nodes, each with the handlers of its two transitions
    assert count[("false", "false")] == count[("false", "true")] == count[("true", "true")] == 2


@pytest.mark.parametrize("wrong", ["use_sim:=perhaps", "log_level:=loud", "device:=tpu"])
def test_a_wrong_value_is_refused_by_name(wrong, tmp_path):
    log = tmp_path / "launch.log"
    result = run_launch(log, wrong)
    result.wait(60)
    output = log.read_text()
    assert result.returncode != 0
    assert wrong.split(":=")[0] in output and wrong.split(":=")[1] in output


def run_launch(log: Path, *arguments: str) -> subprocess.Popen:
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
                "ROS_DOMAIN_ID": str(free_domain()), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
                "PYTHONUNBUFFERED": "1",
            },
        )  # fmt: skip


def test_the_simulated_graph_comes_up_and_ends_cleanly(tmp_path):
    pytest.importorskip("vla_nodes.msg", reason="the messages are not built: colcon build, or tools/setup")
    if not (ROOT / "resource/checkpoints/nano/model.safetensors").exists():
        pytest.skip("resource/checkpoints/nano holds no weights")
    log = tmp_path / "launch.log"
    process = run_launch(log, "use_sim:=true")
    try:
        deadline = time.monotonic() + 120
        while log.read_text().count("]: active") < 4 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        assert log.read_text().count("]: active") == 4, log.read_text()[-3000:]
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

"""launch/replay.launch.py, with the real launch and launch_ros: who plays, and what the nodes are told."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import yaml

launch = pytest.importorskip("launch", reason="launch is not installed (it is no PyPI package; comes with ROS 2)")
pytest.importorskip("launch_ros", reason="launch_ros is not installed (it is no PyPI package; comes with ROS 2)")

from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction  # noqa: E402
from launch_ros.actions import LifecycleNode  # noqa: E402
from launch_ros.utilities import evaluate_parameters  # noqa: E402

from launch import LaunchContext  # noqa: E402

FILE = Path(__file__).resolve().parent.parent / "launch/replay.launch.py"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    specification = importlib.util.spec_from_file_location("replay_launch", FILE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def entities(module, **arguments: str) -> list:
    context = LaunchContext()
    context.launch_configurations.update({"bag": "some/bag", **arguments})
    found = []
    for entity in module.generate_launch_description().entities:
        if isinstance(entity, DeclareLaunchArgument):
            entity.execute(context)
        elif isinstance(entity, OpaqueFunction):
            found += entity.execute(context)
    return found


def nodes(module, **arguments: str) -> dict[str, LifecycleNode]:
    return {n.node_executable: n for n in entities(module, **arguments) if isinstance(n, LifecycleNode)}


def given(node: LifecycleNode) -> dict:
    """The parameters of the node that the launch file itself gives."""
    values: dict = {}
    for entry in node._Node__parameters:
        if isinstance(entry, dict):
            values |= {text(key): text(value) for key, value in entry.items()}
    return values


def text(value):
    """What launch keeps as substitutions of YAML, as what it stands for."""
    parts = isinstance(value, tuple) and value and all(hasattr(part, "text") for part in value)
    return yaml.safe_load("".join(part.text for part in value)) if parts else value


def test_every_argument_is_described(module):
    declared = [a for a in module.generate_launch_description().entities if isinstance(a, DeclareLaunchArgument)]
    assert {"bag", "mode", "rate", "latency", "dry_run", "record", "checkpoint"} <= {a.name for a in declared}
    assert all(len(a.description) > 20 for a in declared)


def test_lock_step_by_default_and_nothing_moves(module):
    found = nodes(module)
    assert set(found) == {"policy_node", "action_node", "player_node"}
    assert given(found["action_node"])["paced"] is True and given(found["action_node"])["dry_run"] is True
    assert given(found["policy_node"])["paced"] is True and given(found["policy_node"])["use_sim_time"] is True
    assert "use_sim_time" not in given(found["player_node"]), "the player is the clock"


def test_real_time_is_played_by_rosbag2_where_it_is(module, monkeypatch):
    assert not module.rosbag2_is_there()
    assert set(nodes(module, mode="rate")) == {"policy_node", "action_node", "player_node"}
    assert given(nodes(module, mode="rate")["action_node"])["paced"] is False
    monkeypatch.setattr(module, "rosbag2_is_there", lambda: True)
    assert "player_node" not in nodes(module, mode="rate")
    assert "player_node" in nodes(module, mode="lockstep"), "rosbag2 cannot wait for the nodes"
    context = LaunchContext()
    context.launch_configurations.update(
        {"bag": "b", "mode": "rate", "player": "auto", "rate": "2.0", "instruction": ""}
    )
    process = module.players_process(context)
    assert isinstance(process, ExecuteProcess)
    command = ["".join(part.text for part in word) for word in process.cmd]
    assert command[:4] == ["ros2", "bag", "play", "b"] and "--clock" in command
    excluded = command[command.index("--exclude-topics") + 1 :]
    assert {"/vla/action_chunk", "/arm_controller/joint_trajectory", "/vla/status", "/clock"} <= set(excluded)


def test_what_the_nodes_say_can_be_recorded(module):
    assert set(nodes(module, record="somewhere")) >= {"recorder_node"}
    assert given(nodes(module, record="somewhere")["recorder_node"])["out"] == "somewhere"


def test_text_that_looks_like_yaml_stays_text(module):
    found = nodes(module, bag="2024", record="2025", instruction="yes", checkpoint="12")
    context = LaunchContext()
    for name, parameter, text in (
        ("player_node", "bag", "2024"), ("player_node", "instruction", "yes"), ("recorder_node", "out", "2025"),
        ("policy_node", "checkpoint", "12"),
    ):  # fmt: skip
        (values,) = (v for v in evaluate_parameters(context, found[name]._Node__parameters[-1:]) if isinstance(v, dict))
        assert values[parameter] == text

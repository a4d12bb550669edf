"""A recording through the live nodes, over real DDS, gives the commands of the offline replay."""

import contextlib

import numpy as np
import pytest
import robots

pytest.importorskip("rclpy", reason="ROS 2 is not in this environment: run ./check, or source a ROS 2 installation")
import made_bags
import nodes_support as support
from trajectory_msgs.msg import JointTrajectory

from vla_nodes.messages.convert import trajectory_from
from vla_nodes.pipeline.robot_description import RobotDescription
from vla_nodes.policy.runtime import PolicyRuntime
from vla_nodes.replay import parameter_files as parameter_files
from vla_nodes.replay.open_loop import Replay, Sink
from vla_nodes.rosbag.read import open_bag
from vla_nodes.rosbag.timeline import choose, timeline
from vla_nodes.rosbag.topics import resolve

LATENCY = 0.05
PREVIEW = "vla/preview/arm_controller/joint_trajectory"
wait_for = support.wait_for


class Commands(Sink):
    """(stamp in s, positions) of every trajectory sent to the arm."""

    def __init__(self):
        self.sent = []

    def answer(self, now, answer, chunk_stamp, wall):
        if answer.arm is not None:
            self.sent.append(answer.arm)


pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return support.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """It ends within a policy step, and policy_node has to look around before that is over."""
    folder = tmp_path_factory.mktemp("bag") / "arm"
    return made_bags.write(folder, seconds=1.78, fps=12.5, pause=(0.7, 1.4), rate=50.0)


@pytest.fixture
def graph():
    graph = support.Graph()
    yield graph
    graph.close()


def offline(bag, checkpoint):
    with open_bag(bag) as recording:
        topics = resolve(recording)
        commands = Commands()
        run = Replay(
            PolicyRuntime.load(checkpoint, "cpu", 1), robots.panda(), RobotDescription(robots.PANDA).robot.workspace,
            parameter_files.load(), LATENCY, commands,
        )  # fmt: skip
        run.run(timeline(recording, topics, choose(recording, topics)))
    return commands.sent


@pytest.mark.parametrize("first", ["policy_node", "action_node"])
def test_lock_step_sends_the_commands_of_the_offline_replay(graph, bag, checkpoint, first):
    """Whichever node comes first: what it says before the other is there still reaches it."""
    expected = offline(bag, checkpoint)
    assert len(expected) > 5 and any(len(t.times) != len(expected[0].times) for t in expected)
    heard = graph.hear(JointTrajectory, PREVIEW, 2000)
    parameters = {
        "policy_node": [f"checkpoint:={checkpoint}", "paced:=true", f"paced_latency:={LATENCY}"],
        "action_node": ["paced:=true", "dry_run:=true"],
    }
    for name in sorted(parameters, key=lambda name: name != first):
        node = graph.start(name, *parameters[name])
        wait_for(lambda node=node: "active" in node.log, f"{name} active", 300)
    wait_for(lambda: graph.node.get_publishers_info_by_topic(f"/{PREVIEW}"), "action_node's publisher")
    player = graph.start("player_node", f"bag:={bag}")
    assert player.process.wait(800) == 0, player.log
    with contextlib.suppress(AssertionError):  # what is missing is told below, with its stamp
        wait_for(lambda: len(heard) >= len(expected), "all trajectories", 10.0)
    got = [trajectory_from(message) for message in heard]
    assert [round(t.stamp, 6) for t in got] == [round(t.stamp, 6) for t in expected]
    for a, b in zip(expected, got, strict=True):
        assert abs(a.stamp - b.stamp) < 2e-9
        np.testing.assert_allclose(b.times, a.times, atol=2e-9)
        np.testing.assert_allclose(b.positions, a.positions, atol=1e-4, rtol=0)
        np.testing.assert_allclose(b.velocities, a.velocities, atol=1e-3, rtol=0)
    worst = max(np.abs(a.positions - b.positions).max() for a, b in zip(expected, got, strict=True))
    print(f"{len(got)} trajectories, largest difference {worst:.2e} rad")

"""recorder_node as a real process over real DDS: what is published is in the bag, untouched, whatever ends it."""

import subprocess
import sys
import time

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in this environment: run ./check, or source a ROS 2 installation")
import nodes_support as support
from geometry_msgs.msg import PoseStamped
from rclpy.serialization import deserialize_message
from rosbags.rosbag2 import Reader
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from vla_nodes.msg import PolicyStatus
from vla_nodes.nodes.recorder_node import TOPICS
from vla_nodes.rosbag.metadata import read
from vla_nodes.rosbag.read import open_bag
from vla_nodes.rosbag.topics import NAMES

pytestmark = pytest.mark.timeout(600)
wait_for = support.wait_for
LATCHED = support.LATCHED
IMAGE = "camera/color/image_raw"


@pytest.fixture(scope="module")
def graph():
    graph = support.Graph()
    graph.out = graph.folder / "recordings"
    graph.recorder = graph.start("recorder_node", f"out:={graph.out}", "record_at_start:=false", clock=False)
    graph.pose = graph.node.create_publisher(PoseStamped, "camera/pose", LATCHED)
    graph.pose.publish(PoseStamped())
    graph.publishers = {
        JointState: graph.publisher(JointState, "joint_states"),
        String: graph.publisher(String, "instruction", 1),
        Image: graph.publisher(Image, IMAGE, 2),
        PolicyStatus: graph.publisher(PolicyStatus, "vla/status", 1),
    }
    graph.active = graph.publisher(String, "vla/active_instruction", LATCHED)
    yield graph
    graph.close()


def ask(graph, what: str) -> Trigger.Response:
    return graph.call(Trigger, f"vla/record/{what}")


def bags(graph) -> list:
    return sorted(p for p in graph.out.glob("*_*") if p.is_dir())


def said(graph, text: str) -> None:
    wait_for(lambda: text in graph.recorder.log, f"'{text}' in the recorder's log")


def test_all_that_a_replay_reads_is_recorded_by_default():
    assert {name for name, _ in NAMES.values()} <= {name.lstrip("/") for name in TOPICS}


def test_an_episode_holds_what_was_published(graph):
    answer = ask(graph, "start")
    assert answer.success and str(graph.out) in answer.message
    assert not ask(graph, "start").success
    sent = []
    graph.active.publish(String(data="pick up the red block"))
    graph.publishers[PolicyStatus].publish(PolicyStatus(checkpoint="nano 01234567", reason="none"))
    for k in range(40):
        message = JointState(name=["a", "b"], position=[0.1 * k, float(k)], velocity=[0.0, 1.0])
        message.header.stamp.sec, message.header.stamp.nanosec = 17, k
        graph.publishers[JointState].publish(message)
        sent.append(message)
        picture = Image(height=2, width=3, step=9, encoding="rgb8", data=bytes([k] * 18))
        picture.header.stamp.sec = k
        graph.publishers[Image].publish(picture)

    def on_disk():
        folder = bags(graph)[0]
        with Reader(folder) as reader:
            return sum(c.msgcount for c in reader.connections) >= 80 + 3

    wait_for(on_disk, "all messages on the disk, while it records")
    answer = ask(graph, "success")
    assert answer.success and "marked success" in answer.message
    (folder,) = bags(graph)
    with Reader(folder) as reader:
        by_topic = {}
        for connection, _, data in reader.messages():
            by_topic.setdefault(connection.topic, []).append(bytes(data))
        latched = {c.topic for c in reader.connections if c.ext.offered_qos_profiles[0].durability.name != "VOLATILE"}
    assert [deserialize_message(data, JointState) for data in by_topic["/joint_states"]] == sent
    assert len(by_topic["/camera/color/image_raw"]) == 40
    assert len(by_topic["/camera/pose"]) == 1, "the latched message of before the start"
    assert latched == {"/camera/pose", "/vla/active_instruction"}
    custom = read(folder)["custom_data"]
    assert (custom["outcome"], custom["instruction"]) == ("success", "pick up the red block")
    assert custom["checkpoint"] == "nano 01234567"
    with open_bag(folder) as bag:
        stamps = [(m.header.stamp.sec, m.header.stamp.nanosec) for _, _, m in bag.messages(["/joint_states"])]
        assert stamps == [(17, k) for k in range(40)] and not bag.notes


def test_marks_from_the_command_line(graph):
    assert ask(graph, "start").success
    graph.publishers[String].publish(String(data="second"))
    command = [sys.executable, "-m", "vla_nodes", "record", "mark"]
    run = lambda what: subprocess.run([*command, what], env=graph.environment, capture_output=True, text=True)  # noqa: E731
    done = run("discard")
    end = time.monotonic() + support.PATIENCE
    while "no recorder answers" in done.stderr and time.monotonic() < end:  # a busy machine: not found in its 5 s
        done = run("discard")
    assert done.returncode == 0 and "marked discarded" in done.stdout
    assert len(list((graph.out / "discarded").iterdir())) == 1 and len(bags(graph)) == 1


def test_killed_while_recording(graph):
    """Last: it ends the recorder."""
    assert ask(graph, "start").success
    for k in range(30):
        graph.publishers[JointState].publish(JointState(name=["a"], position=[float(k)]))
    folder = bags(graph)[-1]

    def there():
        with Reader(folder) as reader:
            return sum(1 for c, _, _ in reader.messages() if c.topic == "/joint_states") == 30

    wait_for(there, "30 joint states on the disk")
    graph.recorder.kill()
    with open_bag(folder) as bag:
        assert bag.counts["/joint_states"] == 30 and bag.custom["outcome"] == "unmarked"


def test_recorder_node_records_when_it_is_run_by_itself(graph):
    """As `ros2 run vla_nodes recorder_node`: nobody configures it, and no launch gives it parameters but the folder."""
    out = graph.folder / "alone"
    script = support.ROOT / "resource/executables/recorder_node"
    arguments = ["--ros-args", "-r", "__ns:=/alone", "-p", f"out:={out}"]
    process = support.Process("recorder_node", arguments, graph.environment, graph.folder, script)
    graph.processes.append(process)
    publisher = graph.publisher(String, "/alone/instruction", LATCHED)
    publisher.publish(String(data="pick up the red block"))
    messages = lambda: sum(file.stat().st_size for file in out.glob("*/*.mcap")) > 500  # noqa: E731
    wait_for(messages, "a message on the disk")
    assert process.interrupt() == 0
    (bag,) = out.glob("*_*")
    with Reader(bag) as reader:
        assert "/alone/instruction" in {connection.topic for connection, _, _ in reader.messages()}

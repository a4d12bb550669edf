"""What is asked of the lifecycle, legal or not: no node ends by it, nothing moves by itself, one name has one node."""

import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in this environment: run ./test, or source a ROS 2 installation")
import nodes_support as support
import rclpy
import soak
from hypothesis import given
from hypothesis import strategies as st
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_nodes.msg import ActionChunk, PolicyStatus
from vla_nodes.nodes.heartbeat import CLAIMING, MAX_BEAT, Beat, must_yield
from vla_nodes.nodes.transitions import problem

pytestmark = pytest.mark.timeout(600)
wait_for, START = support.wait_for, support.START
NODES = ("sim_node", "camera_node", "policy_node", "action_node")
ARM = [f"panda_joint{i}" for i in range(1, 8)]
TEXT = "pick up the red block"
TRAJECTORIES = "arm_controller/joint_trajectory"
WALK = soak.amount(150, 1000)
"""Requests of the random walk."""
RESPAWNS = soak.amount(3, 20)
LEGAL = {  # state: {label: (id, state after)}, of what a lifecycle manager asks for
    "unconfigured": {"configure": (Transition.TRANSITION_CONFIGURE, "inactive")},
    "inactive": {
        "activate": (Transition.TRANSITION_ACTIVATE, "active"),
        "cleanup": (Transition.TRANSITION_CLEANUP, "unconfigured"),
    },
    "active": {"deactivate": (Transition.TRANSITION_DEACTIVATE, "inactive")},
}
SHUTDOWNS = {
    "unconfigured": Transition.TRANSITION_UNCONFIGURED_SHUTDOWN,
    "inactive": Transition.TRANSITION_INACTIVE_SHUTDOWN,
    "active": Transition.TRANSITION_ACTIVE_SHUTDOWN,
}
UP = {"unconfigured": "configure", "inactive": "activate"}
WRONG_LABELS = ("create", "destroy", "on_activate_success", "transition_success", "Activate", "nonsense", "x" * 5000)


def illegal(state: str) -> list[tuple[int, str]]:
    """(id, label) of requests that are not legal in a state."""
    legal = {SHUTDOWNS[state], *(number for number, _ in LEGAL[state].values())}
    known = {label for labels in LEGAL.values() for label in labels}
    by_id = [(number, "") for number in range(256) if number not in legal]
    return by_id + [(0, label) for label in (*WRONG_LABELS, *sorted(known - set(LEGAL[state])))]


# -- without nodes -----------------------------------------------------------------------------------------------------
def test_a_refusal_names_the_state_and_what_is_legal():
    legal = {"cleanup": 2, "activate": 3, "shutdown": 6}
    assert problem(3, "", "inactive", legal) == problem(0, "activate", "inactive", legal) == ""
    assert problem(3, "deactivate", "inactive", legal)  # a label goes before the id
    said = problem(4, "", "inactive", legal)
    assert "id 4" in said and "is inactive" in said and "activate (3)" in said and "\n" not in said
    assert len(problem(0, "x\n" * 5000, "inactive", legal)) < 300 and "\n" not in problem(0, "a\nb", "inactive", legal)
    assert "start the node anew" in problem(1, "", "finalized", {})


STATES = st.sampled_from([CLAIMING, "unconfigured", "configuring", "inactive", "active"])


@given(st.lists(st.text("0123456789abcdef", min_size=1), min_size=2, max_size=2, unique=True), STATES, STATES)
def test_of_two_processes_of_one_name_exactly_one_ends(identities, state, other):
    a, b = identities
    a_ends = must_yield(a, state == CLAIMING, Beat("n", other, b))
    b_ends = must_yield(b, other == CLAIMING, Beat("n", state, a))
    assert a_ends != b_ends
    if state == CLAIMING != other:
        assert a_ends
    assert not must_yield(a, state == CLAIMING, Beat("n", "gone", b)) and not must_yield(a, True, Beat("n", state, a))


@given(st.text(max_size=3 * MAX_BEAT))
def test_any_text_is_a_heartbeat_of_somebody(text):
    beat = Beat.parse(text)
    assert all(len(part) <= MAX_BEAT for part in (beat.name, beat.state, beat.identity))
    assert Beat.parse(Beat("camera_node", "active", "1-2").message().data) == Beat("camera_node", "active", "1-2")


# -- the four nodes ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    graph = support.Graph()
    try:
        checkpoint = support.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
        for kind, topic in (
            (JointState, "joint_states"), (PolicyStatus, "vla/status"), (ActionChunk, "vla/action_chunk"),
            (JointTrajectory, TRAJECTORIES),
        ):  # fmt: skip
            graph.hear(kind, topic, 2000, keep=1_000_000)
        graph.parameters = {"policy_node": [f"checkpoint:={checkpoint}"], "sim_node": ["seed:=3"]}
        graph.running = {name: graph.start(name, *graph.parameters.get(name, ())) for name in NODES}
        for name in NODES:
            wait_for(lambda n=name: ": active" in graph.running[n].log, f"{name} active", START)
        graph.speak = graph.publisher(String, "instruction", 1)
        yield graph
    finally:
        graph.close(2500)


def state(graph, name: str) -> str:
    return graph.call(GetState, f"{name}/get_state").current_state.label


def ask(graph, name: str, number: int, label: str = "") -> bool:
    asked = ChangeState.Request(transition=Transition(id=number, label=label))
    return graph.call(ChangeState, f"{name}/change_state", asked).success


def go(graph, name: str, *labels: str) -> None:
    for label in labels:
        assert ask(graph, name, 0, label), f"{name}: {label}; {graph.running[name].log[-1000:]}"


def up(graph) -> None:
    """Every node active."""
    for name in NODES:
        while (now := state(graph, name)) in UP:
            go(graph, name, UP[now])


def status(graph) -> PolicyStatus:
    return graph.heard["vla/status"][-1]


def speed(graph) -> float:
    """Largest arm joint speed in the newest joint state, rad/s."""
    message = graph.heard["joint_states"][-1]
    return max(abs(v) for name, v in zip(message.name, message.velocity, strict=True) if name in ARM)


def moving(graph) -> None:
    """From the start of the scene, so that the test policy's one direction does not end at the workspace's edge."""
    before = len(graph.heard["joint_states"])
    assert graph.call(Trigger, "sim/reset").success
    wait_for(lambda: len(graph.heard["joint_states"]) > before + 20, "joint states of the new world")
    told = lambda: status(graph).instruction == TEXT  # noqa: E731
    support.say(lambda: graph.speak.publish(String(data=TEXT)), told, "the instruction taken")
    wait_for(lambda: speed(graph) > 0.01, "the arm moving")


def at_rest(graph) -> None:
    wait_for(lambda: speed(graph) < 2e-3, "the arm at rest")


def sent_between(graph, topic: str, begin: float, end: float) -> list[float]:
    """Times at which the topic's messages were sent, of those in an interval, s on the machine's clock."""
    return [at for at in list(graph.times[topic]) if begin < at < end]


@pytest.mark.parametrize("name", NODES)
def test_an_illegal_transition_is_refused_in_motion(graph, name):
    up(graph)
    moving(graph)
    wrong = [(0, ""), (1, ""), (2, ""), (3, ""), (5, ""), (6, ""), (8, ""), (10, ""), (30, ""), (61, ""), (99, "")]
    wrong += [(255, ""), (3, "activate"), *((0, label) for label in WRONG_LABELS), (0, "configure"), (0, "cleanup")]
    already = graph.running[name].log.count(" refused: the node is active")
    for number, label in wrong:
        assert not ask(graph, name, number, label), (number, label)
    assert state(graph, name) == "active" and graph.running[name].alive()
    said = lambda: graph.running[name].log.count(" refused: the node is active")  # noqa: E731
    wait_for(lambda: said() == already + len(wrong), "one warning for each")
    assert "deactivate (4)" in graph.running[name].log
    go(graph, name, "deactivate", "activate")


@pytest.mark.parametrize("name", ["policy_node", "action_node"])
def test_nothing_moves_by_itself_after_cleanup_and_configure(graph, name):
    """A task is in force when the node is taken down: it comes up only as far as asked, and rests until told anew."""
    up(graph)
    moving(graph)
    go(graph, name, "deactivate")
    at_rest(graph)
    wait_for(lambda: status(graph).instruction == "", "the instruction withdrawn")
    withdrawn = time.time()
    go(graph, name, "cleanup", "configure")
    time.sleep(1.0)  # for whoever would activate it
    assert state(graph, name) == "inactive"
    go(graph, name, "activate")
    wait_for(lambda: status(graph).state == PolicyStatus.WAITING_INSTRUCTION, "the policy waiting")
    time.sleep(2.0)  # for whoever would speak
    assert not sent_between(graph, "vla/action_chunk", withdrawn, time.time())
    assert not sent_between(graph, TRAJECTORIES, withdrawn, time.time()) and speed(graph) < 2e-3
    moving(graph)


def test_the_status_says_why_the_instruction_was_withdrawn(graph):
    up(graph)
    moving(graph)
    go(graph, "action_node", "deactivate")
    wait_for(lambda: "action_node was deactivated" in status(graph).reason, "the reason in vla/status")
    up(graph)


@pytest.mark.parametrize("name", ["policy_node", "action_node"])
def test_after_a_kill_and_respawn_the_arm_rests_until_told_anew(graph, name):
    up(graph)
    moving(graph)
    graph.running[name].kill()
    at_rest(graph)
    if name == "action_node":
        wait_for(lambda: "fell silent" in status(graph).reason, "the instruction withdrawn for the silence")
    again = graph.running[name] = graph.start(name, *graph.parameters.get(name, ()))
    wait_for(lambda: ": active" in again.log, f"{name} active again", START)
    begun = time.time()
    wait_for(lambda: graph.times["vla/status"][-1] > begun, "the policy's status")
    time.sleep(2.0)  # for whoever would speak
    assert not sent_between(graph, TRAJECTORIES, begun, time.time()) and speed(graph) < 2e-3
    assert status(graph).instruction == ""
    moving(graph)


def test_a_stop_outlives_cleanup_and_configure(graph):
    up(graph)
    moving(graph)
    assert graph.call(Trigger, "vla/stop").success
    at_rest(graph)
    go(graph, "action_node", "deactivate", "cleanup", "configure", "activate")
    begun = time.time()
    told = lambda: status(graph).state == PolicyStatus.RUNNING  # noqa: E731
    support.say(lambda: graph.speak.publish(String(data=TEXT)), told, "the policy running")
    time.sleep(1.0)  # for chunks, of which none is carried out
    assert sent_between(graph, "vla/action_chunk", begun, time.time())
    assert not sent_between(graph, TRAJECTORIES, begun, time.time()) and speed(graph) < 2e-3
    assert graph.call(Trigger, "vla/resume").success
    moving(graph)


def test_random_walk_through_the_lifecycle(graph):
    """Requests legal and not, at all nodes, while the operator goes on asking for a task."""
    up(graph)
    moving(graph)
    generator = random.Random(7)
    now = dict.fromkeys(NODES, "active")
    off = {"policy_node": [], "action_node": []}  # [when the node answered that it is not active, when it may be again]
    for step in range(WALK):
        name = generator.choice(NODES)
        if generator.random() < 0.5:
            label, (number, after) = generator.choice(sorted(LEGAL[now[name]].items()))
            if name in off and label == "activate" and off[name]:
                off[name][-1].append(time.time())
            asked = generator.choice([(number, ""), (number, label), (0, label)])
            assert ask(graph, name, *asked), f"step {step}: {name} {asked} from {now[name]}"
            now[name] = after
            if name in off and label == "deactivate":
                off[name].append([time.time()])
        else:
            asked = generator.choice(illegal(now[name]))
            assert not ask(graph, name, *asked), f"step {step}: {name} {asked} from {now[name]}"
        if generator.random() < 0.3:
            graph.speak.publish(String(data=TEXT))
        if generator.random() < 0.1 and now["sim_node"] == "active" != now["action_node"]:
            at_rest(graph)
        assert all(process.alive() for process in graph.running.values()), f"step {step}: {name} {asked}"
        assert "Traceback" not in graph.running[name].log
    for name, topic in (("policy_node", "vla/action_chunk"), ("action_node", TRAJECTORIES)):
        for begin, *end in off[name]:
            assert not sent_between(graph, topic, begin, end[0] if end else time.time())
    assert off["policy_node"] and off["action_node"]
    up(graph)
    moving(graph)
    assert {name: state(graph, name) for name in NODES} == dict.fromkeys(NODES, "active")


# -- one node of a name ------------------------------------------------------------------------------------------------
def test_a_second_node_of_the_name_ends_and_the_first_lives(graph):
    up(graph)
    first = graph.running["camera_node"]
    second = graph.start("camera_node")
    assert second.process.wait(START) == 1
    who = f" (process {first.process.pid})" if sys.platform == "linux" else ""
    assert f"another camera_node{who} runs in this domain and namespace (/)" in second.log
    assert "Traceback" not in second.log and (sys.platform != "linux" or "configured" not in second.log)
    other = graph.start("camera_node", autostart=False, extra=("-r", "__ns:=/left"))
    wait_for(lambda: graph.call(GetState, "/left/camera_node/get_state"), "a camera_node in another namespace")
    assert first.alive() and other.alive() and state(graph, "camera_node") == "active"
    assert other.interrupt() == 0


def test_a_second_node_on_another_machine_is_known_by_its_heartbeat(graph):
    """Whose process this machine does not know; and heartbeats from a recording, which no node of the name sends."""
    other = rclpy.create_node("camera_node", namespace="/right", context=graph.context)
    played = rclpy.create_node("player", namespace="/played", context=graph.context)
    nodes = {"right": other, "played": played}
    stop = threading.Event()

    def beat() -> None:
        pubs = [node.create_publisher(String, "vla/heartbeat", 10) for node in nodes.values()]
        while not stop.wait(0.1):
            for publisher in pubs:
                publisher.publish(Beat("camera_node", "active", "0").message())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        started = {name: graph.start("camera_node", extra=("-r", f"__ns:=/{name}")) for name in nodes}
        assert started["right"].process.wait(START) == 1
        assert "another camera_node runs in this domain and namespace (/right)" in started["right"].log
        wait_for(lambda: ": active" in started["played"].log, "a node beside a played recording", START)
        beats = graph.hear(String, "/played/vla/heartbeat")
        wait_for(lambda: sum(b.data.startswith("camera_node active 1") for b in beats) > 10, "its heartbeats")
        assert started["played"].interrupt() == 0
    finally:
        stop.set()
        thread.join()
        for node in nodes.values():
            node.destroy_node()


def test_of_two_simultaneous_starts_one_lives(graph):
    graph.running["camera_node"].interrupt()
    both = [graph.start("camera_node") for _ in range(2)]
    wait_for(lambda: sum(p.alive() for p in both) == 1, "one of the two ended", START)
    lives = next(p for p in both if p.alive())
    graph.running["camera_node"] = lives
    wait_for(lambda: ": active" in lives.log, "the other active", START)
    assert {p.process.poll() for p in both} == {None, 1}


def test_a_killed_node_is_no_second_node(graph):
    """DDS lists it for some 20 s more."""
    for _ in range(RESPAWNS):
        graph.running["camera_node"].kill()
        again = graph.running["camera_node"] = graph.start("camera_node")
        wait_for(lambda p=again: ": active" in p.log or not p.alive(), "camera_node up", START)
        assert again.alive(), again.log
    beats = graph.hear(String, "vla/heartbeat")
    wait_for(lambda: sum(beat.data.startswith("camera_node active") for beat in beats) > 10, "heartbeats of the last")
    assert graph.running["camera_node"].alive()


# -- the end -----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to tell when the process takes signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0])
def test_a_signal_during_the_imports_ends_a_node_cleanly(graph, number, delay):
    log = graph.folder / f"imports-{number}-{delay}.log"
    executable = support.ROOT / "resource/executables/policy_node"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(executable), "--ros-args", "-r", "__ns:=/imports"],
            stdout=out, stderr=subprocess.STDOUT, env=graph.environment, start_new_session=True,
        )  # fmt: skip
    try:
        status = Path(f"/proc/{process.pid}/status")
        caught = lambda: int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)  # noqa: E731
        wait_for(lambda: caught() & (1 << (signal.SIGTERM - 1)), "the handlers of the executable", START)
        time.sleep(delay)
        process.send_signal(number)
        assert process.wait(support.PATIENCE) == 0, log.read_text()
    finally:
        process.kill()
    assert "Traceback" not in log.read_text()

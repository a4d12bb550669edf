"""action_node alone over real DDS: its outputs, emergency stop, seam log and what it refuses at configure."""

import math
import time
from collections import Counter

import numpy as np
import pytest
import robots

pytest.importorskip("rclpy", reason="ROS 2 is not in this environment: run ./check, or source a ROS 2 installation")
import nodes_support as support
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.action import ActionServer, CancelResponse
from rclpy.task import Future
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_nodes.control import seam_report
from vla_nodes.control.joint_trajectory_controller import JointTrajectoryController
from vla_nodes.control.limits import Limits
from vla_nodes.control.streams import ForwardSampler
from vla_nodes.control.trajectory import sample
from vla_nodes.messages.convert import trajectory_from
from vla_nodes.msg import ActionChunk, PolicyStatus
from vla_nodes.nodes.base import LATEST
from vla_nodes.nodes.to_messages import to_time

pytestmark = pytest.mark.timeout(600)
wait_for, START = support.wait_for, support.START


class Arm:
    """The rest of the robot: joint states that follow what is commanded, chunks as a policy sends them."""

    def __init__(self, graph):
        self.robot = robots.panda()
        self.graph, self.q, self.plan, self.begun = graph, self.robot.rest.copy(), None, time.time()
        self.offset = np.zeros(7)  # rad, measured minus commanded
        self.states = graph.publisher(JointState, "joint_states", 10)
        self.status = graph.publisher(PolicyStatus, "vla/status", 1)
        self.chunks = graph.publisher(ActionChunk, "vla/action_chunk", 1)

    def step(self, chunk=True):
        """A tenth of a second of it."""
        now = time.time()
        if chunk:
            t = now - self.begun + 0.1 * np.arange(16)
            rows = np.zeros((16, 7))
            rows[:, 1], rows[:, 2], rows[:, 6] = 0.015 * np.sin(t), 0.008 * np.cos(t), 1.0
            message = ActionChunk(instruction="x", period=0.1, action_space="ee_delta", horizon=16, dim=7)
            message.grippers = ["gripper"]
            message.header.stamp = to_time(now)
            message.actions = rows.astype(np.float32).ravel().tolist()
            self.chunks.publish(message)
        self.status.publish(PolicyStatus(state=PolicyStatus.RUNNING))
        for _ in range(10):
            at = time.time()
            if self.graph.heard["arm_controller/joint_trajectory"]:
                plan = trajectory_from(self.graph.heard["arm_controller/joint_trajectory"][-1])
                self.q = sample(plan, at - plan.stamp)[0]
            elif self.graph.heard["arm_controller/commands"]:
                self.q = np.array(self.graph.heard["arm_controller/commands"][-1].data)
            names = [*self.robot.joint_names, "panda_finger_joint1"]
            message = JointState(name=names, position=[*(self.q + self.offset), 0.04])
            message.header.stamp = to_time(at)
            self.states.publish(message)
            time.sleep(0.01)


@pytest.fixture
def run():
    graphs = []

    def start(*parameters):
        graph = support.Graph()
        graphs.append(graph)
        for kind, topic in (
            (JointTrajectory, "arm_controller/joint_trajectory"), (Float64MultiArray, "arm_controller/commands"),
            (JointTrajectory, "vla/preview/arm_controller/joint_trajectory"), (DiagnosticArray, "/diagnostics"),
        ):  # fmt: skip
            graph.hear(kind, topic, 2000, keep=100_000)
        process = graph.start("action_node", *parameters, clock=False)
        wait_for(lambda: ": active" in process.log or "cannot configure" in process.log, "action_node up", START)
        return graph, process, Arm(graph) if ": active" in process.log else None

    yield start
    for graph in graphs:
        print("\n".join(p.log[-1500:] for p in graph.processes))
        graph.close()


def until(arm, condition, what, chunk=True):
    for _ in range(600):
        arm.step(chunk)
        if value := condition():
            return value
    raise AssertionError(what)


def values(graph, since=0.0):
    """What action_node said last in its diagnostics, of what it sent after `since` (s, the machine's clock)."""
    newest = {}
    for at, message in zip(graph.times["/diagnostics"], graph.heard["/diagnostics"], strict=False):
        for status in message.status:
            if status.name.startswith("action_node") and at > since:
                newest = {v.key: v.value for v in status.values}
    return newest


def test_forward_positions_move_within_limits_and_stop_in_silence(run):
    graph, _, arm = run("output:=forward_positions", "command_rate:=100.0")
    heard, times = graph.heard["arm_controller/commands"], graph.times["arm_controller/commands"]
    until(arm, lambda: len(heard) > 150, "commands")
    counts = []

    def silent():  # for a second
        counts.append(len(heard))
        return len(counts) > 10 and counts[-1] == counts[-11]

    until(arm, silent, "at rest, said, and silent", chunk=False)
    q = np.array([m.data for m in heard])
    assert np.abs(q[-1] - q[0]).max() > 0.01
    limits = Limits.scaled(arm.robot, 0.6, 0.3, 0.1, 0.6)
    # Commands are samples of one smooth motion; a busy machine only spaces them unevenly.
    times = np.array(times)
    gaps = np.maximum(np.diff(times), 0.01)[:, None]
    assert (np.abs(np.diff(q, axis=0)) <= limits.velocity * (gaps + 0.1)).all()
    # Half of the time that the end is repeated: a busy machine sends late what was sampled before.
    assert np.abs(q[times > times[-1] - 0.5 * ForwardSampler.REPEAT] - q[-1]).max() < 1e-9
    assert not graph.heard["arm_controller/joint_trajectory"]


def test_emergency_stop_from_a_plain_publisher_seams_and_diagnostics(run, tmp_path):
    log = tmp_path / "seams.jsonl"
    graph, _, arm = run(f"seam_log:={log}", "deadman_timeout:=0.0")
    until(arm, lambda: len(graph.heard["arm_controller/joint_trajectory"]) > 12, "trajectories")
    estop = graph.publisher(Bool, "estop", 1)  # volatile, as `ros2 topic pub` is
    until(arm, lambda: estop.get_subscription_count() > 0, "the stop heard")
    estop.publish(Bool(data=True))
    until(arm, lambda: values(graph).get("held for") == "estop", "held for the emergency stop")
    count = len(graph.heard["arm_controller/joint_trajectory"])
    last = trajectory_from(graph.heard["arm_controller/joint_trajectory"][-1])
    for _ in range(5):
        arm.step()
    assert len(graph.heard["arm_controller/joint_trajectory"]) == count and not last.velocities[-1].any()
    assert not graph.call(Trigger, "vla/resume").success  # still asserted
    estop.publish(Bool(data=False))
    until(arm, lambda: graph.call(Trigger, "vla/resume").success, "resumed")
    until(arm, lambda: len(graph.heard["arm_controller/joint_trajectory"]) > count + 2, "moving again")
    said = values(graph)
    assert {said[f"age of {other} [s]"] for other in ("sim_node", "camera_node", "policy_node")} == {"not heard"}
    assert float(said["latency exposure to command p50, p99 [ms]"].split(",")[0]) > 0.0
    assert float(said["seam left in the trajectory p50, p99 [rad]"].split(",")[1]) < 1e-6
    assert int(said["chunks carried out"]) > 5 and "time starved [s]" in said
    until(arm, lambda: log.stat().st_size > 0, "seams in the file")
    records = seam_report.read(log)
    assert len(records) > 5 and records[0].mode and records[0].trajectory() is not None


def test_an_offset_holds_the_arm_until_resume_and_moves_it_no_farther_than_itself(run):
    """The measured joints are 0.2 rad away from what is commanded, for good, then no longer."""
    graph, process, arm = run()
    heard = graph.heard["arm_controller/joint_trajectory"]
    until(arm, lambda: len(heard) > 5, "trajectories")
    arm.offset[0] = 0.2
    until(arm, lambda: values(graph).get("held for") == "tracking", "held")
    assert "panda_joint1 is 0." in values(graph)["held because"] and "vla/resume" in values(graph)["held because"]
    assert "tracking: panda_joint1 is" in process.log
    count, end = len(heard), trajectory_from(heard[-1]).positions[-1]
    for _ in range(20):
        arm.step()
    refused = graph.call(Trigger, "vla/resume")
    assert not refused.success and "panda_joint1 is 0." in refused.message
    assert len(heard) == count and np.abs(end - arm.robot.rest).max() < 0.3
    arm.offset[0] = 0.0
    until(arm, lambda: graph.call(Trigger, "vla/resume").success, "resumed")
    until(arm, lambda: len(heard) > count + 2, "moving again")
    assert "Traceback" not in process.log


def test_emergency_stops_of_several_sources_of_any_quality_of_service(run):
    """One publishes best effort, as some safety bridges do; the other keeps what it said for those who come later."""
    graph, process, arm = run("estop_topics:=['estop', 'cell/estop']")
    heard = graph.heard["arm_controller/joint_trajectory"]
    until(arm, lambda: len(heard) > 5, "trajectories")
    bridge, cell = graph.publisher(Bool, "estop", LATEST), graph.publisher(Bool, "cell/estop", support.LATCHED)

    def asserted(publisher, data, topics):
        def found():
            publisher.publish(Bool(data=data))  # best effort may be lost
            return values(graph).get("emergency stops") == topics

        until(arm, found, f"emergency stops: {topics}")

    asserted(bridge, True, "estop")
    assert values(graph)["held for"] == "estop"
    count = len(heard)
    asserted(cell, True, "cell/estop, estop")
    asserted(bridge, False, "cell/estop")
    refused = graph.call(Trigger, "vla/resume")
    assert not refused.success and "cell/estop" in refused.message
    assert len(heard) == count and values(graph)["held for"] == "estop"
    asserted(cell, False, "none")
    for _ in range(5):
        arm.step()
    assert len(heard) == count  # released is not resumed
    until(arm, lambda: graph.call(Trigger, "vla/resume").success, "resumed")
    until(arm, lambda: len(heard) > count + 2, "moving again")


def test_dry_run_previews_and_the_deadman_must_be_held(run):
    graph, _, arm = run("dry_run:=true", "deadman_timeout:=1.0")
    preview, hand = graph.heard["vla/preview/arm_controller/joint_trajectory"], graph.publisher(Bool, "vla/deadman", 1)
    for _ in range(10):
        arm.step()
    assert not preview  # nobody holds the switch

    def held():
        hand.publish(Bool(data=True))
        return len(preview) > 3

    until(arm, held, "previews while the switch is held")
    released = time.time()
    until(arm, lambda: values(graph, released + 1.0).get("held for") == "deadman", "held, as the switch is not")
    count = len(preview)
    for _ in range(10):
        arm.step()
    assert len(preview) == count and not graph.heard["arm_controller/joint_trajectory"]


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("seam_log:=/nowhere/seams.jsonl", "/nowhere/seams.jsonl"),
        ("output:=carrier_pigeon", "output"),
        ("estop_topics:=['estop', 'estop']", "estop_topics"),
        ("estop_topics:=['e stop']", "estop_topics: 'e stop'"),
        ("contract:=config/none.yaml", "config/none.yaml"),
    ],
)
def test_what_cannot_be_is_refused_at_configure(run, parameter, said):
    _, process, _ = run(parameter)
    line = next(x for x in process.log.splitlines() if "cannot configure" in x)
    assert said in line and "Traceback" not in process.log


def test_an_action_without_control_msgs_is_refused_with_the_remedy(run):
    try:
        import control_msgs  # noqa: F401
    except ImportError:
        _, process, _ = run("output:=follow_joint_trajectory")
        assert "control_msgs" in process.log and "trajectory_topic" in process.log
    else:
        pytest.skip("control_msgs is installed here")


class Controller:
    """joint_trajectory_controller as the network sees it: a topic and an action for one simulated controller."""

    def __init__(self, graph, part, joints, at):
        self.core, self.joints, self.goal, self.ends = JointTrajectoryController(joints), joints, None, math.inf
        self.core.hold(at)
        self.results, self.futures = Counter(), {}
        name = f"{part}_controller"
        graph.node.create_subscription(JointTrajectory, f"{name}/joint_trajectory", self._accept, 10)
        try:
            from control_msgs.action import FollowJointTrajectory
        except ImportError:
            return
        self._result = FollowJointTrajectory.Result
        self._server = ActionServer(
            graph.node, FollowJointTrajectory, f"{name}/follow_joint_trajectory", self._execute,
            handle_accepted_callback=self._take, cancel_callback=lambda _: CancelResponse.ACCEPT,
        )  # fmt: skip

    def _accept(self, message):
        """Whether it was taken; what came too late on a busy machine is not."""
        trajectory = trajectory_from(message)
        problem = self.core.accept(trajectory, time.time(), self.state(), np.zeros(len(self.joints)))
        assert problem is None or "in the past" in problem, problem
        self.ends = trajectory.end if problem is None else self.ends
        return problem is None

    def _take(self, goal):
        future = Future()
        if self._accept(goal.request.trajectory):
            if self.goal is not None:
                self.goal.set_result(-1)  # a new goal ends the one in flight
            self.goal = future
        else:
            future.set_result(-3)
        self.futures[bytes(goal.goal_id.uuid)] = future
        goal.execute()

    async def _execute(self, goal):
        code = await self.futures.pop(bytes(goal.goal_id.uuid))
        self.results[code] += 1
        goal.succeed() if code == 0 else goal.abort()
        return self._result(error_code=code)

    def state(self):
        """Joints now; a goal whose time is up has succeeded."""
        if self.goal is not None and time.time() > self.ends:
            self.goal.set_result(0)
            self.goal = None
        return self.core.reference(time.time())[0]


@pytest.mark.parametrize("output", ["trajectory_topic", "follow_joint_trajectory"])
def test_topic_and_action_bring_the_controller_to_the_same_end_state(run, output):
    """Both to where the last row is, whatever the machine's timing: so to the same state."""
    if output == "follow_joint_trajectory":
        pytest.importorskip("control_msgs.action")
    graph, process, arm = run(f"output:={output}")
    names = (*arm.robot.joint_names, arm.robot.grippers[0].joint)
    hand = Controller(graph, "gripper", names[7:], np.array([0.04]))
    body = Controller(graph, "arm", names[:7], arm.robot.rest)
    target, begun, stamp = arm.robot.rest + 0.2 * np.linspace(-1.0, 1.0, 7), time.time(), 0.0
    end, error = begun + 5.5, math.inf  # of the chunks: 2.5 s after the last row is reached, later on a busy machine
    while (now := time.time()) < end + 2.5:
        error = np.abs(np.concatenate([body.state() - target, hand.state()])).max()
        if now > end - 0.1 and error > 1e-3 and now < begun + support.PATIENCE:
            end = now + 0.5
        joints = JointState(name=names, position=[*body.state(), *hand.state()])
        joints.header.stamp = to_time(now)
        arm.states.publish(joints)
        if begun + 0.5 < now < end and now > stamp + 0.1:
            stamp = now
            u = np.clip((now - begun - 0.5 + 0.1 * np.arange(1, 17)) / 3.0, 0.0, 1.0)[:, None]
            rows = np.hstack([arm.robot.rest + (target - arm.robot.rest) * u * u * (3.0 - 2.0 * u), 1.0 - u])
            message = ActionChunk(instruction="x", period=0.1, action_space="joint_position", horizon=16, dim=8)
            message.grippers = ["gripper"]
            message.header.stamp, message.names = to_time(now), [*names[:7], "gripper"]
            message.actions = rows.astype(np.float32).ravel().tolist()
            arm.chunks.publish(message)
        arm.status.publish(PolicyStatus(state=PolicyStatus.RUNNING))
        time.sleep(0.01)
    print(f"{output}: {error:.1e} rad or m from the last row")
    assert error < 1e-5, process.log[-1000:]  # a chunk's numbers are float32
    if output == "follow_joint_trajectory":
        assert body.results[0] >= 1 and body.results[-1] > 5, body.results

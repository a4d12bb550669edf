"""Arms and cameras other than the shipped ones, by their contract alone, with real nodes over real DDS."""

import dataclasses
import importlib.metadata
import json
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in this environment: run ./check, or source a ROS 2 installation")
import nodes_support as support
import policy_tiny
import robots
import six_axis
import torch
import yaml
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from vla_nodes.msg import PolicyStatus
from vla_nodes.nodes.to_messages import pose as to_pose
from vla_nodes.nodes.to_messages import to_time
from vla_nodes.pipeline.robot_description import RobotDescription, robot_model
from vla_nodes.policy.checkpoint import CheckpointConfig, save
from vla_nodes.policy.configuration import preset
from vla_nodes.policy.contract import Actions, Camera, Contract, Robot, StateVector, plain
from vla_nodes.share import share_path

pytestmark = pytest.mark.timeout(600)
POLICY = Path(__file__).with_name("policy_of_a_contract.py")
CAMERA_POSE = np.array([[0, -0.6, 0.8, -0.1], [-1, 0, 0, 0.02], [0, -0.8, -0.6, 0.7], [0, 0, 0, 1]])
K = [60.0, 0.0, 32.0, 0.0, 60.0, 24.0, 0.0, 0.0, 1.0]


@pytest.fixture
def graph():
    graph = support.Graph()
    try:
        yield graph
    finally:
        graph.close()


def urdf_of_ur5(folder: Path) -> Path:
    """The UR5 of example-robot-data where that is installed, else an arm with the same joints and frames."""
    try:
        files = importlib.metadata.files("example-robot-data") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).endswith("ur_description/urdf/ur5_robot.urdf"):
            return Path(file.locate())
    (folder / "six.urdf").write_text(six_axis.urdf())
    return folder / "six.urdf"


def ur5e(folder: Path) -> Path:
    """config/ur5e/contract.yaml with a URDF that is there."""
    entries = yaml.safe_load(share_path("config/ur5e/contract.yaml").read_text())
    entries["urdf"] = str(urdf_of_ur5(folder))
    (folder / "contract.yaml").write_text(yaml.safe_dump(entries))
    return folder / "contract.yaml"


def checkpoint(folder: Path, contract: Contract) -> Path:
    folder.mkdir()
    (folder / "contract.json").write_text(json.dumps(plain(contract)))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def untrained(folder: Path, contract: Contract) -> Path:
    """The real network of a contract, small, with random weights; its chunks are scaled down to what an arm can do."""
    sizes = dataclasses.replace(
        preset("nano-general"), image_size=64, vision_widths=(4, 8, 8, 16), feature_width=16, d_model=32, n_layer=2,
        d_state=8, headdim=16, head_width=32, language=policy_tiny.CONFIG.language)  # fmt: skip
    words = folder.parent / "words.json"
    words.parent.mkdir(exist_ok=True)
    policy_tiny.write_tokenizer(words)
    model = policy_tiny.tiny_model(sizes, contract=contract)
    with torch.no_grad():
        model.head.shared.weight.mul_(0.1)
        model.head.shared.bias.mul_(0.1)
    save(folder, model, CheckpointConfig(sizes, contract), words)
    return folder


def state_of(robot: Robot) -> tuple[StateVector, ...]:
    """What the arm measures of itself."""
    joints, grippers = len(robot.joints), len(robot.grippers)
    vectors = (
        StateVector(name="tool_position", size=3, unit="m", token="position", scale=0.5),
        StateVector(name="joint_positions", size=joints, unit="rad", token="position", scale=2.0),
        StateVector(name="joint_velocities", size=joints, unit="rad/s", token="velocity"),
    )
    return (*vectors, *(StateVector(name="gripper", size=grippers, token="position") for _ in range(grippers > 0)))


class Cell:
    """An arm at rest and its cameras, publishing, beside policy_node and action_node."""

    def __init__(self, graph, contract: Contract, file: Path, network: bool = False) -> None:
        """network: the real one of this contract, with random weights, in place of policy_of_a_contract.py."""
        self.graph, self.contract, self.robot = graph, contract, robot_model(file)
        self.folder = (untrained if network else checkpoint)(graph.folder / "checkpoint", contract)
        of = [f"contract:={file}", f"checkpoint:={self.folder}"]
        self.policy = graph.start("policy_node", *of, clock=False, script=None if network else POLICY)
        self.action = graph.start("action_node", f"contract:={file}", "velocity_scale:=0.4", clock=False)
        self.heard = {
            part: graph.hear(JointTrajectory, f"{part}_controller/joint_trajectory")
            for part in ("arm", *self.robot.gripper_names)
        }
        self.status = graph.hear(PolicyStatus, "vla/status")
        self.joints = graph.publisher(JointState, "joint_states", 10)
        self.images, self.infos = {}, {}
        for camera in contract.cameras:
            name = camera.name
            self.images[f"{name}/color/image_raw"] = graph.publisher(Image, f"{name}/color/image_raw", 2)
            if camera.depth != "none":
                topic = f"{name}/aligned_depth_to_color/image_raw"
                self.images[topic] = graph.publisher(Image, topic, 2)
            if camera.pose == "known":
                self.infos[name] = graph.publisher(CameraInfo, f"{name}/color/camera_info", 10)
                pose = PoseStamped(pose=to_pose(CAMERA_POSE))
                pose.header.frame_id = contract.robot.base_frame
                graph.publisher(PoseStamped, f"{name}/pose", support.LATCHED).publish(pose)
        self.instruction = graph.publisher(String, "instruction", 1)

    def publish(self) -> None:
        """One exposure of every camera, and joint states around it."""
        stamp = to_time(time.time())
        q = [*self.robot.rest, *(0.5 * (g.open + g.closed) for g in self.robot.grippers)]
        names = [*self.robot.joint_names, *(g.joint for g in self.robot.grippers)]
        for _ in range(2):
            message = JointState(name=names[::-1], position=q[::-1], velocity=[0.0] * len(q))
            message.header.stamp = to_time(time.time())
            self.joints.publish(message)
            time.sleep(0.01)
        for number, (topic, publisher) in enumerate(self.images.items()):
            depth = "depth" in topic
            pixels = np.full((48, 64), 800, np.uint16) if depth else np.full((48, 64, 3), 10 + number, np.uint8)
            image = Image(height=48, width=64, step=128 if depth else 192, encoding="16UC1" if depth else "rgb8")
            image.data = pixels.tobytes()
            image.header.stamp = stamp
            publisher.publish(image)
        for publisher in self.infos.values():
            info = CameraInfo(height=48, width=64, k=K)
            info.header.stamp = stamp
            publisher.publish(info)
        message = JointState(name=names, position=q, velocity=[0.0] * len(q))
        message.header.stamp = to_time(time.time())
        self.joints.publish(message)
        time.sleep(0.02)

    def until(self, condition, what: str) -> None:
        end = time.monotonic() + support.PATIENCE
        said = 0.0
        while not condition():
            reasons = [status.reason for status in self.status[-3:]]
            assert time.monotonic() < end, f"{what}\n{reasons}\n{self.policy.log[-1500:]}\n{self.action.log[-1500:]}"
            if time.monotonic() > said + support.AGAIN:
                said = time.monotonic()
                self.instruction.publish(String(data="pick up the red block"))
            self.publish()

    def seen(self) -> dict:
        return json.loads((self.folder / "seen.json").read_text())


def test_a_ur5e_is_driven_by_its_contract(graph):
    """Six joints, other frames, no gripper."""
    file = ur5e(graph.folder)
    robot = RobotDescription(file).robot
    actions = Actions(space="joint_delta", columns=robot.joints, scale=(0.05,) * 6, horizon=16, period=0.1)
    contract = Contract(robot=robot, state=(), actions=actions, cameras=(Camera(name="camera"),), tick=0.1)
    cell = Cell(graph, contract, file)
    cell.until(lambda: len(cell.heard["arm"]) > 1, "a trajectory")
    (trajectory, *_), seen = cell.heard["arm"], cell.seen()
    assert tuple(trajectory.joint_names) == robot.joints and len(trajectory.points) > 3
    first, last = (np.array(point.positions) for point in (trajectory.points[0], trajectory.points[-1]))
    assert last[0] > first[0] + 0.05 and np.abs(last - first)[1:].max() < 1e-3
    np.testing.assert_allclose(first, cell.robot.rest, atol=1e-6)
    np.testing.assert_allclose(seen["joints"], cell.robot.rest)
    assert seen["grippers"] == [] and len(seen["velocities"]) == 6
    np.testing.assert_allclose(seen["tool_pose"], cell.robot.forward(cell.robot.rest))
    image = seen["cameras"]["camera"]
    assert image["color"] == [48, 64, 3] and image["depth"] == pytest.approx(0.8)
    np.testing.assert_allclose(image["pose"], CAMERA_POSE, atol=1e-9)


def test_two_cameras_one_without_depth(graph):
    """`front` with depth and a pose, `wrist` with colour alone; the gripper's column comes first."""
    file = share_path(robots.PANDA)
    columns = ("gripper", "dx", "dy", "dz", "rx", "ry", "rz")
    actions = Actions(
        space="ee_delta", columns=columns, scale=(1.0,) * 7, grippers=("gripper",), horizon=12, period=0.1
    )
    cameras = (Camera(name="front", depth="required"), Camera(name="wrist", depth="none", pose="unknown"))
    contract = Contract(robot=RobotDescription(file).robot, state=(), actions=actions, cameras=cameras, tick=0.1)
    cell = Cell(graph, contract, file)
    cell.until(lambda: cell.heard["arm"] and cell.heard["gripper"], "trajectories of arm and gripper")
    seen = cell.seen()
    assert list(seen["cameras"]) == ["front", "wrist"] and seen["grippers"] == pytest.approx([0.5])
    front, wrist = seen["cameras"].values()
    assert (front["level"], wrist["level"]) == (10, 12) and front["depth"] == pytest.approx(0.8)
    np.testing.assert_allclose(front["intrinsics"], np.reshape(K, (3, 3)))
    assert wrist["depth"] is wrist["pose"] is wrist["intrinsics"] is None
    end = np.array(cell.heard["arm"][0].points[-1].positions)
    moved = cell.robot.forward(end)[:3, 3] - cell.robot.forward(cell.robot.rest)[:3, 3]
    assert moved[0] > 0.03 and np.abs(moved[1:]).max() < 0.01  # dx, whatever column it stands in
    assert cell.heard["gripper"][0].joint_names == ["panda_finger_joint1"]
    assert cell.heard["gripper"][0].points[-1].positions[0] == pytest.approx(0.02, abs=1e-6)


def test_the_network_drives_a_ur5e_by_its_contract(graph):
    """Random weights, six joints, other frames, no gripper: what it wants, the arm is told within its limits."""
    file = ur5e(graph.folder)
    robot = RobotDescription(file).robot
    actions = Actions(space="joint_delta", columns=robot.joints, scale=(0.02,) * 6, horizon=16, period=0.1)
    contract = Contract(robot=robot, state=state_of(robot), actions=actions, cameras=(Camera(name="camera"),), tick=0.1)
    cell = Cell(graph, contract, file, network=True)
    cell.until(lambda: len(cell.heard["arm"]) > 1, "a trajectory")
    trajectory = cell.heard["arm"][0]
    assert tuple(trajectory.joint_names) == robot.joints and len(trajectory.points) > 3
    first, last = (np.array(point.positions) for point in (trajectory.points[0], trajectory.points[-1]))
    np.testing.assert_allclose(first, cell.robot.rest, atol=1e-6)
    assert 1e-4 < np.abs(last - first).max() < 1.0
    assert (last >= cell.robot.lower).all() and (last <= cell.robot.upper).all()
    told = cell.status[-1]
    assert told.state == PolicyStatus.RUNNING and np.isnan(told.grounding) and told.ticks > 0


def test_the_network_sees_with_two_cameras_one_without_depth(graph):
    """Random weights; `front` with depth and a pose, `wrist` with colour alone; the gripper's column comes first."""
    file = share_path(robots.PANDA)
    robot = RobotDescription(file).robot
    columns = ("gripper", "dx", "dy", "dz", "rx", "ry", "rz")
    actions = Actions(
        space="ee_delta", columns=columns, scale=(1.0,) + (0.005,) * 3 + (0.02,) * 3, grippers=("gripper",),
        horizon=12, period=0.1)  # fmt: skip
    cameras = (Camera(name="front", depth="required"), Camera(name="wrist", depth="none", pose="unknown"))
    contract = Contract(robot=robot, state=state_of(robot), actions=actions, cameras=cameras, tick=0.1)
    cell = Cell(graph, contract, file, network=True)
    cell.until(lambda: cell.heard["arm"] and cell.heard["gripper"], "trajectories of arm and gripper")
    assert tuple(cell.heard["arm"][0].joint_names) == robot.joints
    closed, opened = 0.0, 0.04
    assert closed <= cell.heard["gripper"][0].points[-1].positions[0] <= opened
    assert cell.status[-1].state == PolicyStatus.RUNNING


def test_a_checkpoint_of_another_arm_is_refused_with_what_differs(graph):
    robot = RobotDescription(ur5e(graph.folder)).robot
    actions = Actions(space="joint_delta", columns=robot.joints, scale=(0.05,) * 6, horizon=16, period=0.1)
    contract = Contract(robot=robot, state=(), actions=actions, cameras=(Camera(name="camera"),), tick=0.1)
    folder = checkpoint(graph.folder / "checkpoint", contract)
    node = graph.start("policy_node", f"checkpoint:={folder}", clock=False, script=POLICY)
    support.wait_for(lambda: "cannot configure" in node.log, "the refusal", support.START)
    for word in ("does not fit this robot", "robot.joints", "elbow_joint", "panda_joint1", "robot.base_frame", "tool0"):
        assert word in node.log
    nobody = graph.start("action_node", "contract:=''", clock=False)
    support.wait_for(lambda: "cannot configure" in nobody.log, "the refusal", support.START)
    assert "parameter contract is empty" in nobody.log

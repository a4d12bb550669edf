"""Recordings for the data set tests: whole demonstrations by the scripted expert, and a plain arm with known motion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from replay_support import (
    COLOR,
    DEPTH,
    EPOCH,
    INFO,
    JOINTS,
    STORE,
    Row,
    header,
    image,
    info,
    joint_state,
    make,
    pose_stamped,
    text,
)
from rosbags.rosbag2 import StoragePlugin, Writer

from vla_nodes.envs.tabletop.mjcf import READY
from vla_nodes.envs.tabletop.rollout import panda

NAMES = (*(f"panda_joint{i}" for i in range(1, 8)), "panda_finger_joint1")
ACTIVE, POSE = "/vla/active_instruction", "/camera/pose"
ARM, GRIPPER = "/arm_controller/joint_trajectory", "/gripper_controller/joint_trajectory"
CAMERA = np.array([[0, -0.6, 0.8, -0.1], [-1, 0, 0, 0.02], [0, -0.8, -0.6, 0.7], [0, 0, 0, 1.0]])


def write(path: Path, rows: list[Row], plugin=StoragePlugin.MCAP, **custom: str) -> Path:
    """A bag of rows in order of receipt, with custom_data as the recorder notes it."""
    writer = Writer(path, version=8, storage_plugin=plugin)
    for key, value in custom.items():
        writer.set_custom_data(key, value)
    with writer:
        connections = {}
        for topic, kind, received, message in sorted(rows, key=lambda row: row[2]):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(connections[topic], received, STORE.serialize_cdr(message, kind))
    return path


def spoken(sentence: str, at: float, topic: str = ACTIVE) -> Row:
    return (topic, "std_msgs/msg/String", EPOCH + round(at * 1e9), text(sentence))


def posed(matrix: np.ndarray, at: float) -> Row:
    ns = EPOCH + round(at * 1e9)
    return (POSE, "geometry_msgs/msg/PoseStamped", ns, pose_stamped(matrix, ns))


def camera(at: float, color: np.ndarray, depth: np.ndarray | None, k: np.ndarray) -> list[Row]:
    """Colour, camera_info and depth of one instant, received 15 ms later."""
    ns = EPOCH + round(at * 1e9)
    height, width = color.shape[:2]
    rows = [
        (INFO, "sensor_msgs/msg/CameraInfo", ns + 15_000_000, info(k, width, height, ns)),
        (COLOR, "sensor_msgs/msg/Image", ns + 15_001_000, image(color, "rgb8", ns)),
    ]
    if depth is not None:
        rows.append((DEPTH, "sensor_msgs/msg/Image", ns + 15_002_000, image(depth, "32FC1", ns)))
    return rows


def joints(at: float, q: np.ndarray) -> Row:
    ns = EPOCH + round(at * 1e9)
    return (JOINTS, "sensor_msgs/msg/JointState", ns + 200_000, joint_state(NAMES, q, np.zeros(8), ns))


def trajectory_message(given, ns: int):
    """A Trajectory as the message a controller gets; fields it does not have are empty."""
    points = []
    for i, t in enumerate(given.times):
        at, none = round(float(t) * 1e9), np.zeros(0)
        fields = {"positions": given.positions, "velocities": given.velocities, "accelerations": given.accelerations}
        values = {name: none if rows is None else rows[i] for name, rows in fields.items()}
        span = make("builtin_interfaces/msg/Duration", sec=at // 10**9, nanosec=at % 10**9)
        kind = "trajectory_msgs/msg/JointTrajectoryPoint"
        points.append(make(kind, **values, effort=none, time_from_start=span))
    kind = "trajectory_msgs/msg/JointTrajectory"
    return make(kind, header=header(ns), joint_names=list(given.joint_names), points=points)


def arm_at(t: float) -> np.ndarray:
    """(8,) joints of the plain arm at t s: it swings for 3 s and then rests; the gripper closes at 1 s on something."""
    swing = np.sin(0.5 * np.pi * np.clip(t, 0, 3) / 3)
    q = np.asarray(READY) + 0.3 * swing * np.array([1, 0.4, 0, 0.5, 0, 0.3, 0.2])
    return np.append(q, 0.04 - 0.02 * np.clip((t - 1) / 0.3, 0, 1))


def plain(seconds: float = 5.0, size: tuple[int, int] = (48, 64), rate: float = 20.0, depth: bool = True) -> list[Row]:
    """Images, 100 Hz joints and a camera pose, no instruction. Images are wider than high and say when they are of."""
    height, width = size
    k = np.array([[58.0, 0, width / 2], [0, 58.0, height / 2], [0, 0, 1]])
    rows = [posed(CAMERA, 0.0)]
    for i in range(round(seconds * 100)):
        rows.append(joints(0.01 * i, arm_at(0.01 * i)))
    for i in range(round(seconds * rate)):
        at = i / rate
        color = np.zeros((height, width, 3), np.uint8)
        color[:, :, 0], color[:, :, 1] = i % 256, np.arange(width) * 3
        metres = np.full((height, width), 0.5 + 0.01 * i, np.float32)
        metres[0] = np.nan
        metres[1] = 9.0
        rows += camera(at, color, metres if depth else None, k)
    return rows


def demonstration(seed: int = 0, size: int = 64, seconds: float = 12.0) -> tuple[list[Row], bool]:
    """The scripted expert picks up the red block in the simulator: the rows, and whether it was done."""
    from vla_nodes.envs.tabletop import instructions
    from vla_nodes.envs.tabletop.camera import Camera
    from vla_nodes.envs.tabletop.expert import Expert
    from vla_nodes.envs.tabletop.rollout import STEP, Rollout
    from vla_nodes.envs.tabletop.scene import Scene
    from vla_nodes.envs.tabletop.tasks import SuccessChecker
    from vla_nodes.envs.tabletop.world import World

    sentence = "pick up the red block"
    scene = Scene.demo(seed)
    world, task = World(scene), instructions.parse(sentence)
    rollout, eye, expert, checker = Rollout(world), Camera(world, size, size), Expert(task, scene), SuccessChecker(task)
    rows = [posed(eye.pose, 0.0), spoken(sentence, 0.001)]
    done = None
    kind = "trajectory_msgs/msg/JointTrajectory"
    try:
        for k in range(round(seconds / STEP)):
            now = world.time + 0.01
            q, _, _ = world.joint_state()
            rows.append(joints(now, q[:8]))
            if k % 5 == 0:
                frame = eye.render()
                rows += camera(now, frame.color, frame.depth, eye.intrinsics)
            if k % 10 == 0:
                actions, _ = expert.plan(world, rollout.velocity, 16, 0.05)
                output = rollout.submit(actions, world.time, 0.05)
                for topic, given in ((ARM, output.arm), (GRIPPER, (output.grippers or {}).get("gripper"))):
                    if given is not None:
                        start = EPOCH + 10**7 + round(given.stamp * 1e9)
                        ns = EPOCH + round(now * 1e9) + 300_000
                        rows.append((topic, kind, ns, trajectory_message(given, start)))
            rollout.run(STEP)
            if checker.update(world) and done is None:
                done = world.time
            if done is not None and world.time > done + 0.5:
                break
    finally:
        eye.close()
    return rows, checker.succeeded


def tool_at(t: float) -> np.ndarray:
    return panda().forward(arm_at(t)[:7])

"""Recordings for the replay tests: the simulated robot, driven by the scripted expert, written as a rosbag2 bag."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from policy_tiny import CONFIG, CONTRACT, robot, tiny_model, write_tokenizer
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from vla_nodes.policy import checkpoint
from vla_nodes.poses import quaternion
from vla_nodes.rosbag.read import typestore

EPOCH = 1_760_000_000 * 10**9
"""ns; when the recorded robot's clock began."""
INSTRUCTION = "pick up the red block"
COLOR, INFO = "/camera/color/image_raw", "/camera/color/camera_info"
DEPTH, JOINTS = "/camera/aligned_depth_to_color/image_raw", "/joint_states"
STORE = typestore()
Row = tuple[str, str, int, object]
"""(topic, type, when received in ns, message)"""


def make(kind: str, **fields):
    return STORE.types[kind](**fields)


def header(ns: int, frame: str = ""):
    stamp = make("builtin_interfaces/msg/Time", sec=ns // 10**9, nanosec=ns % 10**9)
    return make("std_msgs/msg/Header", stamp=stamp, frame_id=frame)


def text(data: str):
    return make("std_msgs/msg/String", data=data)


def image(pixels: np.ndarray, encoding: str, ns: int):
    data = np.ascontiguousarray(pixels).reshape(-1).view(np.uint8)
    height, width = pixels.shape[:2]
    return make("sensor_msgs/msg/Image", header=header(ns, "camera"), height=height, width=width, encoding=encoding,
                is_bigendian=0, step=data.size // height, data=data)  # fmt: skip


def info(k: np.ndarray, width: int, height: int, ns: int):
    roi = make("sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    p = np.hstack([k, np.zeros((3, 1))]).reshape(12)
    return make("sensor_msgs/msg/CameraInfo", header=header(ns, "camera"), height=height, width=width,
                distortion_model="plumb_bob", d=np.zeros(5), k=k.reshape(9), r=np.eye(3).reshape(9), p=p, binning_x=0,
                binning_y=0, roi=roi)  # fmt: skip


def joint_state(names, q, qd, ns: int):
    return make("sensor_msgs/msg/JointState", header=header(ns), name=list(names), position=np.asarray(q, float),
                velocity=np.asarray(qd, float), effort=np.zeros(0))  # fmt: skip


def pose_stamped(matrix: np.ndarray, ns: int):
    point = make("geometry_msgs/msg/Point", **dict(zip("xyz", matrix[:3, 3].tolist(), strict=True)))
    turn = make("geometry_msgs/msg/Quaternion", **dict(zip("xyzw", quaternion(matrix[:3, :3]).tolist(), strict=True)))
    pose = make("geometry_msgs/msg/Pose", position=point, orientation=turn)
    return make("geometry_msgs/msg/PoseStamped", header=header(ns, "panda_link0"), pose=pose)


def trajectory(arm, ns: int):
    duration = STORE.types["builtin_interfaces/msg/Duration"]
    points = []
    for i, t in enumerate(arm.times):
        at = round(float(t) * 1e9)
        points.append(make("trajectory_msgs/msg/JointTrajectoryPoint", positions=arm.positions[i],
                           velocities=arm.velocities[i], accelerations=arm.accelerations[i], effort=np.zeros(0),
                           time_from_start=duration(at // 10**9, at % 10**9)))  # fmt: skip
    return make("trajectory_msgs/msg/JointTrajectory", header=header(ns), joint_names=list(arm.joint_names),
                points=points)  # fmt: skip


@lru_cache(maxsize=2)
def recording(seconds: float = 2.0, size: int = 64, rate: int = 20) -> tuple[Row, ...]:
    """The simulated robot picking up the red block: what a recorder beside it would have got, in order of receipt."""
    from vla_nodes.envs.tabletop import instructions
    from vla_nodes.envs.tabletop.camera import Camera
    from vla_nodes.envs.tabletop.expert import Expert
    from vla_nodes.envs.tabletop.rollout import STEP, Rollout
    from vla_nodes.envs.tabletop.scene import Scene
    from vla_nodes.envs.tabletop.world import World

    scene = Scene.demo(0)
    world = World(scene)
    rollout, camera, expert = Rollout(world), Camera(world, size, size), Expert(instructions.parse(INSTRUCTION), scene)
    names = ("panda_joint1", "panda_joint2", "panda_joint3", "panda_joint4", "panda_joint5", "panda_joint6",
             "panda_joint7", "panda_finger_joint1")  # fmt: skip
    rows: list[Row] = [
        ("/camera/pose", "geometry_msgs/msg/PoseStamped", EPOCH, pose_stamped(camera.pose, EPOCH)),
        ("/instruction", "std_msgs/msg/String", EPOCH + 1, text(INSTRUCTION)),
    ]
    every, steps = round(1 / (rate * STEP)), round(seconds / STEP)
    try:
        for k in range(steps):
            now = EPOCH + 10**7 + round(world.time * 1e9)
            q, qd, _ = world.joint_state()
            rows.append((JOINTS, "sensor_msgs/msg/JointState", now + 200_000, joint_state(names, q[:8], qd[:8], now)))
            if k % every == 0:
                frame = camera.render()
                got = now + 15_000_000
                rows.append((INFO, "sensor_msgs/msg/CameraInfo", got, info(camera.intrinsics, size, size, now)))
                rows.append((COLOR, "sensor_msgs/msg/Image", got + 1000, image(frame.color, "rgb8", now)))
                rows.append((DEPTH, "sensor_msgs/msg/Image", got + 2000, image(frame.depth, "32FC1", now)))
            if k % 10 == 0:
                actions, _ = expert.plan(world, rollout.velocity, 16, 0.05)
                arm = rollout.submit(actions, world.time, 0.05).arm
                if arm is not None:
                    start = EPOCH + 10**7 + round(arm.stamp * 1e9)
                    kind = "trajectory_msgs/msg/JointTrajectory"
                    rows.append(("/arm_controller/joint_trajectory", kind, now + 300_000, trajectory(arm, start)))
            rollout.run(STEP)
    finally:
        camera.close()
    return tuple(sorted(rows, key=lambda row: row[2]))


def write(
    path: Path, rows, plugin=StoragePlugin.MCAP, version: int = 8, mode=CompressionMode.STORAGE,
    change: Callable[[Row], Iterator[Row]] | None = None,
) -> Path:  # fmt: skip
    """A bag of rows; `change` gives, for each, what is written in its place."""
    writer = Writer(path, version=version, storage_plugin=plugin)
    if plugin is StoragePlugin.MCAP and mode is not CompressionMode.NONE:
        writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        connections = {}
        for row in rows:
            for topic, kind, received, message in [row] if change is None else change(row):
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
                data = message if isinstance(message, bytes) else STORE.serialize_cdr(message, kind)
                writer.write(connections[topic], received, data)
    return path


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A small policy of the real format that is certain of what it sees and moves slowly, a little by what it sees."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder.parent / "words.json")
    model = tiny_model(CONFIG, seed)
    with torch.no_grad():
        for part in model.feasibility_head.parts:
            part[-1].weight.zero_()
            part[-1].bias.fill_(8.0)
        model.head.shared.weight.mul_(0.02)
        model.head.decoders.mul_(0.02)
        model.head.shared.bias.copy_(
            torch.tensor([0.01, 0.02, 0.0, 0.0, 0.0, 0.0, 8.0]).repeat(CONTRACT.actions.horizon)
        )
    checkpoint.save(folder, model, robot(CONFIG), folder.parent / "words.json")
    return folder

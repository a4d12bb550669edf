"""Recordings made for tests: an arm that stands before a camera, with every topic that the pipeline takes."""

from pathlib import Path

import numpy as np
import robots

from vla_nodes.rosbag.message_definitions import topic
from vla_nodes.rosbag.metadata import Qos
from vla_nodes.rosbag.read import typestore
from vla_nodes.rosbag.write import BagWriter

HOME = (0.0, -0.3, 0.0, -2.2, 0.0, 2.0, 0.79)
SIZE = 112
START = 5_000_000_000
"""ns"""


def cdr(kind: str, **fields) -> bytes:
    store = typestore()
    return bytes(store.serialize_cdr(store.types[kind](**fields), kind))


def of(kind: str, *values):
    return typestore().types[kind](*values)


def time(ns: int):
    return of("builtin_interfaces/msg/Time", ns // 10**9, ns % 10**9)


def header(ns: int, frame: str = ""):
    return of("std_msgs/msg/Header", time(ns), frame)


def image(ns: int, pixels: np.ndarray, encoding: str) -> bytes:
    height, width = pixels.shape[:2]
    data = np.frombuffer(pixels.tobytes(), np.uint8)
    step = data.size // height
    return cdr(
        "sensor_msgs/msg/Image", header=header(ns, "camera_color_optical_frame"), height=height, width=width,
        encoding=encoding, is_bigendian=0, step=step, data=data,
    )  # fmt: skip


def camera_info(ns: int, size: int = SIZE) -> bytes:
    k = np.array([1.2 * size, 0, size / 2, 0, 1.2 * size, size / 2, 0, 0, 1], float)
    roi = of("sensor_msgs/msg/RegionOfInterest", 0, 0, 0, 0, False)
    p = np.array([k[0], 0, k[2], 0, 0, k[4], k[5], 0, 0, 0, 1, 0])
    return cdr(
        "sensor_msgs/msg/CameraInfo", header=header(ns, "camera_color_optical_frame"), height=size, width=size,
        distortion_model="plumb_bob", d=np.zeros(5), k=k, r=np.eye(3).ravel(), p=p, binning_x=0, binning_y=0, roi=roi,
    )  # fmt: skip


def joints(ns: int, q, qd) -> bytes:
    names = [f"panda_joint{i}" for i in range(1, 8)] + ["panda_finger_joint1", "panda_finger_joint2"]
    position, velocity = np.append(q, [0.04, 0.04]), np.append(qd, [0.0, 0.0])
    return cdr(
        "sensor_msgs/msg/JointState", header=header(ns), name=names, position=position, velocity=velocity,
        effort=np.zeros(9),
    )  # fmt: skip


def camera_pose(ns: int) -> bytes:
    pose = of(
        "geometry_msgs/msg/Pose", of("geometry_msgs/msg/Point", 1.2, 0.0, 0.6),
        of("geometry_msgs/msg/Quaternion", 0.5, 0.5, -0.5, -0.5),
    )  # fmt: skip
    return cdr("geometry_msgs/msg/PoseStamped", header=header(ns, "panda_link0"), pose=pose)


COLOR, DEPTH = "/camera/color", "/camera/aligned_depth_to_color"
TOPICS = {
    f"{COLOR}/image_raw": "sensor_msgs/msg/Image",
    f"{COLOR}/camera_info": "sensor_msgs/msg/CameraInfo",
    f"{DEPTH}/image_raw": "sensor_msgs/msg/Image",
    "/camera/pose": "geometry_msgs/msg/PoseStamped",
    "/joint_states": "sensor_msgs/msg/JointState",
    "/instruction": "std_msgs/msg/String",
    "/clock": "rosgraph_msgs/msg/Clock",
}


def write(
    folder: Path,
    seconds: float = 3.0,
    fps: float = 10.0,
    pause: tuple[float, float] = (0.0, 0.0),
    clock: bool = True,
    rate: float = 100.0,
) -> Path:
    """A recording of an arm that moves a little; no camera frames during `pause` (s from the start)."""
    robots.panda()  # the joints below are this robot's
    rng = np.random.default_rng(0)
    color = rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    depth = rng.uniform(0.5, 1.5, (SIZE, SIZE)).astype(np.float32)
    period, frame, told = round(1e9 / rate), round(1e9 / fps), False
    with BagWriter(folder, background=False, min_free=0) as bag:
        for name, kind in TOPICS.items():
            if clock or name != "/clock":
                bag.add_topic(topic(name, kind, Qos(latched=name == "/camera/pose")))
        bag.write("/camera/pose", START, camera_pose(START))
        for k in range(round(seconds * rate)):
            now = START + k * period
            t = k / rate
            if clock:
                bag.write("/clock", now, cdr("rosgraph_msgs/msg/Clock", clock=time(now)))
            q = np.array(HOME) + 0.02 * np.sin(t + np.arange(7))
            bag.write("/joint_states", now, joints(now, q, 0.02 * np.cos(t + np.arange(7))))
            if not told and t >= 0.2:
                told = True
                bag.write("/instruction", now, cdr("std_msgs/msg/String", data="pick up the red block"))
            if (now - START) % frame == 0 and not pause[0] <= t < pause[1]:
                seen = np.roll(color, k, axis=1)
                bag.write(f"{COLOR}/camera_info", now, camera_info(now))
                bag.write(f"{COLOR}/image_raw", now, image(now, seen, "rgb8"))
                bag.write(f"{DEPTH}/image_raw", now, image(now, depth, "32FC1"))
    return folder

"""Which topic of a bag is which input of the pipeline."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from vla_nodes.rosbag.read import Bag, BagError

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
NAMES = {  # input: (the node's topic, types it may have)
    "color": ("camera/color/image_raw", (IMAGE, COMPRESSED)),
    "info": ("camera/color/camera_info", ("sensor_msgs/msg/CameraInfo",)),
    "depth": ("camera/aligned_depth_to_color/image_raw", (IMAGE, COMPRESSED)),
    "joints": ("joint_states", ("sensor_msgs/msg/JointState",)),
    "instruction": ("instruction", ("std_msgs/msg/String",)),
    "active_instruction": ("vla/active_instruction", ("std_msgs/msg/String",)),
    "camera_pose": ("camera/pose", ("geometry_msgs/msg/PoseStamped",)),
    "clock": ("clock", ("rosgraph_msgs/msg/Clock",)),
    "tf": ("tf", ("tf2_msgs/msg/TFMessage",)),
    "tf_static": ("tf_static", ("tf2_msgs/msg/TFMessage",)),
    "arm": ("arm_controller/joint_trajectory", ("trajectory_msgs/msg/JointTrajectory",)),
    "gripper": ("gripper_controller/joint_trajectory", ("trajectory_msgs/msg/JointTrajectory",)),
    "chunk": ("vla/action_chunk", ("vla_nodes/msg/ActionChunk",)),
    "status": ("vla/status", ("vla_nodes/msg/PolicyStatus",)),
}
REMEDIES = {
    "info": "record it beside the images: without the camera's calibration pixels are no directions",
    "depth": "for a policy that was trained without: --set policy_node.use_depth=false",
    "joints": "record it: the policy needs to know where the arm is",
    "camera_pose": "give --camera-pose X Y Z QX QY QZ QW, or with /tf --set policy_node.camera_pose_source=tf",
}
"""What else can be done about an input that is missing."""
GLOBAL = ("clock", "tf", "tf_static")
"""Not in a namespace."""
ON_DEMAND = ("tf", "tf_static")
"""Read only where asked for: few need them, and there are many."""
TRANSPORT = {"color": "compressed", "depth": "compressedDepth"}
"""image_transport's suffix under which a camera was recorded if not raw."""


@dataclass(frozen=True)
class Topics:
    """The bag's topic for each input that it has."""

    by_input: Mapping[str, str]

    def __getitem__(self, name: str) -> str | None:
        return self.by_input.get(name)

    def inputs(self) -> dict[str, str]:
        """{bag topic: input}."""
        return {topic: name for name, topic in self.by_input.items()}


def resolve(
    bag: Bag, remaps: Sequence[str] = (), namespace: str = "", needed: Sequence[str] = (), also: Sequence[str] = ()
) -> Topics:
    """Find the inputs in a bag.

    Args:
        remaps: "camera/color/image_raw:=/front/rgb", as ROS writes it: the node's topic, then the bag's.
        namespace: put before the names that are not remapped.
        needed: inputs without which there is nothing to do.
        also: of ON_DEMAND, those that are wanted.

    Raises:
        BagError: a needed topic that is missing or empty, any input of another type, a remap of an unknown name.
    """
    given = _parse(remaps, bag)
    found: dict[str, str] = {}
    for name, (ros_name, types) in NAMES.items():
        if name in ON_DEMAND and name not in also:
            continue
        topic = given.get(ros_name) or "/" + "/".join(part for part in (namespace.strip("/"), ros_name) if part)
        if name in GLOBAL and ros_name not in given:
            topic = f"/{ros_name}"
        if topic not in bag.topics and ros_name not in given and name in TRANSPORT:
            packed = f"{topic}/{TRANSPORT[name]}"
            if packed in bag.topics:
                topic = packed
                bag.notes.append(f"{ros_name} is read from {packed}")
        if topic in bag.topics and bag.counts[topic]:
            bag.require(topic, *types)
            bag.check(topic)
            found[name] = topic
        elif name in needed:
            raise BagError(f"{bag.path}: {_missing(bag, name, topic, found.values())}")
    return Topics(found)


def _parse(remaps: Sequence[str], bag: Bag) -> dict[str, str]:
    known = {ros_name for ros_name, _ in NAMES.values()}
    given = {}
    for text in remaps:
        ours, separator, theirs = text.partition(":=")
        ours = ours.strip().lstrip("/")
        if not separator or ours not in known:
            raise BagError(f"remap '{text}' is not TOPIC:=BAG_TOPIC with TOPIC one of {', '.join(sorted(known))}")
        given[ours] = theirs.strip()
        bag.require(theirs.strip())
    return given


def _missing(bag: Bag, name: str, topic: str, taken: Collection[str]) -> str:
    ros_name, types = NAMES[name]
    state = "has no messages" if topic in bag.topics else "is not in the bag"
    others = [other for other, kind in bag.topics.items() if kind in types and bag.counts[other] and other not in taken]
    if others:
        more = f" (or {', '.join(others[1:4])})" if len(others) > 1 else ""
        parts = [f"{topic} {state}", f"remap one of the same type: --remap {ros_name}:={others[0]}{more}"]
    else:
        parts = [f"{topic} {state}, and no other topic is {' or '.join(types)}"]
    return "; ".join(parts + ([REMEDIES[name]] if name in REMEDIES else []))

"""Where the camera stands: through several frames, moving, and the same from /tf as from camera/pose."""

from __future__ import annotations

from types import SimpleNamespace as Fields

import numpy as np
import pytest
import replay_support as support
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.messages.camera_pose import KEEP, MAX_FRAMES, CameraPose, Transforms
from vla_nodes.poses import matrix_from, quaternion
from vla_nodes.replay.cli import main
from vla_nodes.rosbag.read import open_bag

TF = "tf2_msgs/msg/TFMessage"
numbers = st.floats(-2.0, 2.0).map(lambda v: round(v, 3))
poses = st.lists(numbers, min_size=7, max_size=7).filter(lambda v: np.linalg.norm(v[3:]) > 0.1)


def rigid(values) -> np.ndarray:
    v = np.array(values, float)
    return matrix_from([*v[:3], *(v[3:] / np.linalg.norm(v[3:]))])


def transform(parent: str, child: str, matrix: np.ndarray, stamp: float = 0.0):
    """A TransformStamped of plain fields."""
    q = quaternion(matrix[:3, :3])
    ns = round(stamp * 1e9)
    header = Fields(frame_id=parent, stamp=Fields(sec=ns // 10**9, nanosec=ns % 10**9))
    translation = Fields(**dict(zip("xyz", matrix[:3, 3], strict=True)))
    rotation = Fields(**dict(zip("xyzw", q, strict=True)))
    return Fields(header=header, child_frame_id=child, transform=Fields(translation=translation, rotation=rotation))


@settings(max_examples=50, deadline=None)
@given(chain=st.lists(poses, min_size=2, max_size=6), split=st.integers(0, 5))
def test_a_chain_of_frames_is_the_product_of_its_links(chain, split):
    """world -> ... -> base on one side, world -> ... -> camera on the other."""
    links = [rigid(values) for values in chain]
    split = min(split, len(links))
    known = Transforms()
    expected = np.eye(4)
    for side, part in (("base", links[:split]), ("camera", links[split:])):
        total = np.eye(4)
        for k, link in enumerate(part):
            known.add([transform(f"{side}{k - 1}" if k else "world", f"{side}{k}", link)], k % 2 == 0)
            total = total @ link
        expected = np.linalg.inv(total) if side == "base" else expected @ total
    base = f"base{split - 1}" if split else "world"
    frame = f"camera{len(links) - split - 1}" if split < len(links) else "world"
    np.testing.assert_allclose(known.find(base, frame, 0.0), expected, atol=1e-6)


def test_a_camera_that_moves_is_taken_where_it_was_at_the_image():
    camera = CameraPose("tf", "base")

    def at(t):  # 0.5 m/s along x, 1 rad/s about z
        turn = [0, 0, np.sin(t / 2), np.cos(t / 2)]
        return matrix_from([0.5 * t, 0, 1, *turn])

    mount = rigid([0.1, 0.2, 0.3, 1, 2, 3, 4])
    camera.transforms(Fields(transforms=[transform("hand", "optical", mount)]), True)
    order = np.random.default_rng(0).permutation(20)  # messages of several publishers come as they come
    for k in order:
        camera.transforms(Fields(transforms=[transform("base", "hand", at(0.05 * k), 0.05 * k)]), False)
    for t in (0.0, 0.012, 0.31, 0.95):
        np.testing.assert_allclose(camera.at(t, "optical"), at(t) @ mount, atol=1e-9)
    np.testing.assert_allclose(camera.at(1.2, "/optical"), at(0.95) @ mount, atol=1e-9)
    assert camera.at(2.0, "optical") is None and "older than the image" in camera.problem
    assert camera.at(-0.1, "optical") is None and "after the image" in camera.problem
    assert camera.at(0.5, "other") is None and "does not connect base and other" in camera.problem
    assert camera.at(0.5, "optical") is not None and camera.problem == ""
    camera.clear()
    assert camera.at(0.5, "optical") is None, "what moved before the clock was set back is not known"


def test_what_is_no_rigid_motion_loops_or_floods_does_no_harm():
    known = Transforms()
    known.add([transform("a", "b", np.eye(4)), transform("b", "a", np.eye(4))], True)
    np.testing.assert_allclose(known.find("a", "b", 0.0), np.eye(4))
    with pytest.raises(LookupError):
        known.find("base", "b", 0.0)
    bad = transform("base", "c", np.eye(4))
    bad.transform.rotation.w = float("nan")
    known.add([bad], False)
    with pytest.raises(LookupError):
        known.find("base", "c", 0.0)
    known.add([transform("base", f"f{k}", np.eye(4)) for k in range(2 * MAX_FRAMES)], False)
    assert len(known._links) == MAX_FRAMES
    for k in range(3000):
        known.add([transform("base", "f1", np.eye(4), 0.01 * k)], False)
    assert len(known._links["f1"].entries) <= KEEP / 0.01 + 2


def tf_message(*transforms):
    """As it stands in a bag: (parent, child, matrix, ns)."""
    made = []
    for parent, child, matrix, ns in transforms:
        t = transform(parent, child, matrix)
        vector = support.make("geometry_msgs/msg/Vector3", **vars(t.transform.translation))
        turn = support.make("geometry_msgs/msg/Quaternion", **vars(t.transform.rotation))
        motion = support.make("geometry_msgs/msg/Transform", translation=vector, rotation=turn)
        header = support.header(ns, parent)
        made.append(support.make("geometry_msgs/msg/TransformStamped", header=header, child_frame_id=child,
                                 transform=motion))  # fmt: skip
    return support.make(TF, transforms=made)


def test_a_bag_with_tf_replays_as_one_with_the_pose(tmp_path):
    """The camera hangs on a mast, the mast on a table that the robot stands on too; the mast's joint is published."""
    policy = support.write_checkpoint(tmp_path / "policy")
    rows = [row for row in support.recording() if row[2] < support.EPOCH + 600_000_000]
    pose = next(row[3] for row in rows if row[0] == "/camera/pose").pose
    p, o = pose.position, pose.orientation
    camera = matrix_from([p.x, p.y, p.z, o.x, o.y, o.z, o.w])
    table, mast = rigid([0.3, -0.2, 0.1, 0, 0, 1, 2]), rigid([1, 1, 1, 1, 0, 0, 3])
    last = np.linalg.inv(mast) @ np.linalg.inv(table) @ camera
    fixed = tf_message(("panda_link0", "table", table, support.EPOCH), ("mast", "camera", last, support.EPOCH))
    with_tf = [("/tf_static", TF, support.EPOCH, fixed)]
    for row in rows:
        if row[0] == support.JOINTS:
            stamp = row[3].header.stamp
            moving = tf_message(("table", "mast", mast, stamp.sec * 10**9 + stamp.nanosec))
            with_tf.append(("/tf", TF, row[2] - 1, moving))
        if row[0] != "/camera/pose":
            with_tf.append(row)
    chunks = []
    for name, recorded, arguments in (
        ("topic", rows, []), ("tf", with_tf, ["--set", "policy_node.camera_pose_source=tf"]),
    ):  # fmt: skip
        bag = support.write(tmp_path / name / "bag", recorded)
        words = ["--checkpoint", str(policy), "--engine", "torch", "--out", str(tmp_path / name / "out"), *arguments]
        assert main([str(bag), *words]) == 0
        with open_bag(tmp_path / name / "out/bag") as results:
            chunks.append([message.actions for _, _, message in results.messages(["/replay/vla/action_chunk"])])
    assert len(chunks[0]) == len(chunks[1]) >= 3
    np.testing.assert_allclose(chunks[1], chunks[0], atol=1e-5)

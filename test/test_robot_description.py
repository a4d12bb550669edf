"""config/panda/panda.urdf against an independent description of the same arm, and against what MuJoCo makes of it."""

import importlib.metadata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pinocchio
import pytest

from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.world import World
from vla_nodes.share import share_path, share_roots

URDF = share_path("config/panda/panda.urdf")
JOINTS = [f"panda_joint{i}" for i in range(1, 8)]
# FCI documentation, "Limits for Panda": rad and rad/s.
LOWER = [-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973]
UPPER = [2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973]
VELOCITY = [2.1750, 2.1750, 2.1750, 2.1750, 2.6100, 2.6100, 2.6100]
FRAMES = [f"panda_link{i}" for i in range(1, 9)] + ["panda_hand", "panda_leftfinger", "panda_rightfinger"]


def independent() -> Path:
    """The Panda of the PyPI package example-robot-data (130 MB, so it is used where it is installed)."""
    try:
        files = importlib.metadata.files("example-robot-data") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("example-robot-data is not installed: pip install --no-deps example-robot-data")
    found = [f for f in files if str(f).endswith("panda_description/urdf/panda.urdf")]
    assert found, "example-robot-data is installed, but its Panda is gone"
    return Path(found[0].locate())


def read(path: Path) -> pinocchio.Model:
    return pinocchio.buildModelFromXML(path.read_text())


def poses(model: pinocchio.Model, values: dict[str, float], frames: list[str]) -> dict[str, np.ndarray]:
    data, q = model.createData(), pinocchio.neutral(model)
    for name, value in values.items():
        if model.existJointName(name):
            q[model.joints[model.getJointId(name)].idx_q] = value
    pinocchio.framesForwardKinematics(model, data, q)
    return {name: data.oMf[model.getFrameId(name)].homogeneous for name in frames}


def configurations(count: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        finger = rng.uniform(0, 0.04)
        arm = dict(zip(JOINTS, rng.uniform(LOWER, UPPER), strict=True))
        rows.append({**arm, "panda_finger_joint1": finger, "panda_finger_joint2": finger})
    return rows


def limits(path: Path) -> dict[str, dict[str, str]]:
    joints = ElementTree.parse(path).getroot().iter("joint")
    return {j.get("name"): j.find("limit").attrib for j in joints if j.find("limit") is not None}


def test_limits_are_the_published_ones():
    ours = limits(URDF)
    for entry, published in (("lower", LOWER), ("upper", UPPER), ("velocity", VELOCITY)):
        assert [float(ours[name][entry]) for name in JOINTS] == published
    assert [float(ours["panda_finger_joint1"][k]) for k in ("lower", "upper", "velocity")] == [0.0, 0.04, 0.2]


def test_limits_equal_an_independent_urdf():
    ours, theirs = limits(URDF), limits(independent())
    for name in [*JOINTS, "panda_finger_joint1", "panda_finger_joint2"]:
        for entry in ("lower", "upper", "velocity"):
            assert float(ours[name][entry]) == pytest.approx(float(theirs[name][entry]), abs=1e-9), (name, entry)


def test_kinematics_equal_an_independent_urdf():
    theirs, ours = read(independent()), read(URDF)
    for values in configurations(50):
        a, b = poses(ours, values, FRAMES), poses(theirs, values, FRAMES)
        for name in FRAMES:
            np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)


def test_tool_frame_stands_between_the_finger_tips():
    pose = poses(read(URDF), configurations(1)[0], ["panda_hand", "panda_hand_tcp"])
    relative = np.linalg.inv(pose["panda_hand"]) @ pose["panda_hand_tcp"]
    np.testing.assert_allclose(relative[:3, 3], [0, 0, 0.1034], atol=1e-9)
    np.testing.assert_allclose(relative[:3, :3], np.eye(3), atol=1e-9)


def test_mujoco_reads_the_same_kinematics():
    world, model = World(Scene(0)), read(URDF)
    frames = [*FRAMES, "panda_hand_tcp"]
    for values in configurations(20):
        world.place_robot(np.array([values[j] for j in JOINTS]), values["panda_finger_joint1"])
        for name, pose in poses(model, values, frames).items():
            np.testing.assert_allclose(world.position(name), pose[:3, 3], atol=1e-6, err_msg=name)
            np.testing.assert_allclose(world.rotation(name), pose[:3, :3], atol=1e-6, err_msg=name)


def test_every_moving_link_can_be_simulated():
    """Positive masses, and principal inertias that a rigid body can have (triangle inequality)."""
    for link in ElementTree.parse(URDF).getroot().iter("link"):
        if link.find("inertial") is None:
            continue
        inertia = link.find("inertial/inertia").attrib
        x, y, z = sorted(float(inertia[k]) for k in ("ixx", "iyy", "izz"))
        assert float(link.find("inertial/mass").get("value")) > 0 and x > 0 and x + y >= z, link.get("name")


def test_a_missing_share_file_names_every_place(monkeypatch, tmp_path):
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        share_path("config/panda/none.urdf")
    assert all(str(root) in str(error.value) for root in share_roots())
    (tmp_path / "share/vla_nodes/config").mkdir(parents=True)
    (tmp_path / "share/vla_nodes/config/only_there.yaml").write_text("")
    assert share_path("config/only_there.yaml") == tmp_path / "share/vla_nodes/config/only_there.yaml"

"""Recordings to training data: what becomes an episode, what is dropped and why, and the way round through LeRobot."""

import json

import cv2
import mcap_variants
import numpy as np
import pytest
from dataset_support import (
    ARM,
    CAMERA,
    GRIPPER,
    NAMES,
    arm_at,
    plain,
    posed,
    spoken,
    tool_at,
    trajectory_message,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_tiny import CONTRACT, robot
from replay_support import COLOR, DEPTH, EPOCH, JOINTS, write_checkpoint

from vla_nodes.control.trajectory import Trajectory
from vla_nodes.datasets import cli
from vla_nodes.datasets import episode as episodes
from vla_nodes.datasets.actions_from_motion import STROKE, last_direction
from vla_nodes.datasets.from_rosbag import BuildSettings, build
from vla_nodes.envs.tabletop.rollout import panda
from vla_nodes.rosbag.read import BagError, open_bag
from vla_nodes.rosbag.repair import Scan

SENTENCE = "pick up the red block"
PERIOD, TICK, HORIZON = 0.05, 0.1, CONTRACT.actions.horizon


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture(scope="module")
def rows():
    return [*plain(), spoken(SENTENCE, 0.0)]


def built(path, **settings):
    """(result, episodes) of a bag."""
    made = []

    def emit(writer, header):
        target = path.parent / f"{path.name}_{len(made)}.safetensors"
        writer.write(target, header)
        made.append(episodes.read(target))

    with open_bag(path) as bag:
        return build(bag, robot(), panda(), BuildSettings(**settings), emit), made


def without(rows, topic, start, end):
    """Rows less those of a topic received between two times, s."""
    return [row for row in rows if row[0] != topic or not start <= (row[2] - EPOCH) * 1e-9 < end]


# -- one recording ---------------------------------------------------------------------------------------------------
def test_an_episode_is_what_was_recorded(rows, tmp_path):
    result, made = built(write(tmp_path / "bag", rows, outcome="success"))
    assert result.error == "" and result.episodes == len(made) == 1
    episode, arrays = made[0], made[0].arrays
    stamps = arrays["stamp"] - EPOCH * 1e-9
    np.testing.assert_allclose(np.diff(stamps), TICK, atol=1e-5)
    assert len(episode) == 50 and abs(stamps[0]) < 1e-5  # 5 s, to the end: the arm rests there
    header = episode.header
    assert header["instruction"] == SENTENCE and header["success"] is True and header["period"] == PERIOD
    assert header["gripper"] == "last direction" and header["motion"] == "measured"
    np.testing.assert_allclose(header["camera_pose"], CAMERA, atol=1e-9)
    for tick in (0, 13, 49):
        t = stamps[tick]
        np.testing.assert_allclose(arrays["joint_positions"][tick], arm_at(t)[:7], atol=1e-5)
        np.testing.assert_allclose(arrays["ee_pose"][tick], tool_at(t), atol=1e-5)
        places = tool_at(t)[:3, 3] + np.cumsum(arrays["actions"][tick, :, :3], axis=0)
        turn = tool_at(t)[:3, :3]
        for k in range(HORIZON):
            wanted = tool_at(min(t + (k + 1) * PERIOD, 4.99))
            np.testing.assert_allclose(places[k], wanted[:3, 3], atol=1e-4)
            turn = cv2.Rodrigues(arrays["actions"][tick, k, 3:6].astype(float))[0] @ turn
            np.testing.assert_allclose(turn, wanted[:3, :3], atol=1e-4)
    assert (arrays["primitive"] == -1).all()
    # The gripper closes half from 1.0 s on and stays there, on what it holds: closed is what was wanted.
    assert (arrays["actions"][:3, :, 6] == 1).all() and (arrays["actions"][12:, :, 6] == 0).all()
    np.testing.assert_allclose(arrays["gripper"][[0, 30]], [1.0, 0.5], atol=1e-6)


def test_images_are_as_the_policy_sees_them(rows, tmp_path):
    """The middle square of a wide image, resized; depth in range only; intrinsics that go with it."""
    _, made = built(write(tmp_path / "bag", rows))
    episode = made[0]
    color, depth = episode.color(3), episode.depth(3)  # tick 3 is image 6
    assert color.shape == (64, 64, 3) and depth.shape == (64, 64)
    assert (color[:, :, 0] == 6).all() and abs(int(color[32, 32, 1]) - 32 * 3) <= 3
    assert color[0, 0, 1] >= 8 * 3 - 3 and color[0, -1, 1] <= 56 * 3  # 8 columns were cut on either side
    assert (depth[0] == 0).all() and (depth[2] == 0).all() and abs(depth[30, 30] - 0.56) < 1e-3
    k = np.array(episode.header["intrinsics"])
    np.testing.assert_allclose(k[0, 0], 58 * 64 / 48, rtol=1e-6)
    np.testing.assert_allclose(k[:2, 2], (24.5 * 64 / 48 - 0.5), rtol=1e-6)


def test_one_episode_for_each_instruction(tmp_path):
    rows = [*plain(), spoken(SENTENCE, 0.0), spoken("open the drawer", 2.0), spoken("open the drawer", 3.0),
            spoken("", 4.0), spoken("x" * 300, 4.5)]  # fmt: skip
    result, made = built(write(tmp_path / "bag", rows))
    assert [e.header["instruction"] for e in made] == [SENTENCE, "open the drawer"]
    first, second = (e.arrays["stamp"] - EPOCH * 1e-9 for e in made)
    # What followed the last observations of the first one belongs to the second: 0.3 s (6 rows) are not known.
    assert 1.5 < first[-1] < 1.75 and 1.9 < second[0] < 2.2 and 3.85 < second[-1] < 4.1
    assert result.dropped["observation: the recording ends in motion: what followed is not known"] in (3, 4)
    assert sum(n for reason, n in result.dropped.items() if reason.startswith("instruction: it has 300")) == 1


def test_the_same_recording_gives_the_same_bytes(rows, tmp_path):
    path = write(tmp_path / "bag", rows)
    files = []
    for _ in range(2):
        _, made = built(path)
        files.append(made[0].path.read_bytes())
    assert files[0] == files[1]


def test_commands_are_taken_where_there_are_any(rows, tmp_path):
    """The gripper's from its trajectories, always; the arm's where asked for."""
    finger = Trajectory(("panda_finger_joint1",), np.array([0.3]), np.array([[0.01]]), None, None)
    goal = arm_at(4.0)[:7] + 0.1
    points = Trajectory(NAMES[:7], np.array([1.0]), goal[None], np.zeros((1, 7)), np.zeros((1, 7)))
    at = EPOCH + 3_500_000_000
    kind = "trajectory_msgs/msg/JointTrajectory"
    told = [*rows, (GRIPPER, kind, EPOCH + 500_000_000, trajectory_message(finger, 0)),
            (ARM, kind, at, trajectory_message(points, at))]  # fmt: skip
    path = write(tmp_path / "bag", told)
    _, made = built(path)
    actions = made[0].arrays["actions"]
    assert made[0].header["gripper"] == "commanded"
    assert (actions[0, :6, 6] == 1).all() and np.allclose(actions[6:, :, 6], 0.25)
    assert np.abs(actions[36:, :, :3]).max() < 1e-6  # measured: it never went there

    _, made = built(path, commanded=True)
    episode = made[0]
    assert episode.header["motion"] == "commanded"
    stamps = episode.arrays["stamp"] - EPOCH * 1e-9
    tick = int(np.argmin(np.abs(stamps - 4.4)))
    end = episode.arrays["ee_pose"][tick][:3, 3] + episode.arrays["actions"][tick, :, :3].sum(axis=0)
    np.testing.assert_allclose(end, panda().forward(goal)[:3, 3], atol=1e-3)
    with pytest.raises(BagError, match="--motion commanded"):
        built(write(tmp_path / "silent", rows), commanded=True)


BREAKS = {
    "images missing": (lambda rows: without(rows, COLOR, 3.2, 4.0), "episode cut: images missing", 2),
    "camera moved": (lambda rows: [*rows, posed(CAMERA + _shift(0.02), 3.5)],
                     "episode cut: camera moved", 2),
    "camera told again": (lambda rows: [*rows, posed(CAMERA, 3.5)], "", 1),
    "joints missing": (lambda rows: without(rows, JOINTS, 3.5, 3.9),
                       "observation: joint_states have a gap in what followed", 1),
    "a frame without depth": (lambda rows: without(rows, DEPTH, 3.40, 3.42), "", 1),
    "clock set back": (lambda rows: rows + [_later(row, 6.0) for row in rows], "episode cut: clock set back", 2),
}  # fmt: skip


def _shift(metres: float) -> np.ndarray:
    out = np.zeros((4, 4))
    out[0, 3] = metres
    return out


def _later(row, seconds: float):
    """The row received later, with the stamps it had: a bag that loops."""
    return (row[0], row[1], row[2] + round(seconds * 1e9), row[3])


@pytest.mark.parametrize("kind", BREAKS)
def test_breaks_and_gaps(rows, tmp_path, kind):
    change, reason, count = BREAKS[kind]
    result, made = built(write(tmp_path / "bag", change(rows)), clock="received")
    assert len(made) == count and (not reason or result.dropped[reason] >= 1), result.dropped
    for episode in made:
        gaps = np.diff(episode.arrays["stamp"])
        assert gaps.min() > 0.08 and gaps.max() < 0.5


def test_teleoperated_data_needs_nothing_of_ours(tmp_path):
    """A bag of somebody else's driver: other topics and joint names, no camera pose, no instruction, no depth."""
    mine = {COLOR: "/front/rgb", "/camera/color/camera_info": "/front/info", JOINTS: "/arm/joints"}
    rows = []
    for topic, kind, received, message in plain(depth=False):
        if topic in mine:
            if topic == JOINTS:
                message.name[:] = [name.replace("panda", "left") for name in message.name]
            rows.append((mine[topic], kind, received, message))
    path = write(tmp_path / "bag", rows)
    remaps = tuple(f"{ours.strip('/')}:={theirs}" for ours, theirs in mine.items())
    names = tuple(f"{name}:{name.replace('panda', 'left')}" for name in NAMES)
    result, made = built(path, remaps=remaps, joint_map=names, instruction="stack them", camera_pose=CAMERA,
                         use_depth=False)  # fmt: skip
    assert len(made) == 1 and len(made[0]) == 50 and not made[0].depth(0).any()
    assert made[0].header["instruction"] == "stack them" and result.outcome == "unmarked"
    with pytest.raises(BagError, match="color/image_raw"):
        built(path, instruction="x", camera_pose=CAMERA, use_depth=False)
    result, made = built(path, remaps=remaps, instruction="x", camera_pose=CAMERA, use_depth=False)
    assert not made and result.dropped["joints: unusable"] == 500 and "lacks panda_joint1" in " ".join(result.notes)


@given(st.lists(st.integers(0, 10**6).map(lambda n: n / 10**6), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_the_direction_follows_large_motions_only(opening):
    values = np.array(opening)
    wanted = last_direction(values)
    assert np.isin(wanted, (0, 1)).all()
    for i in range(1, len(values)):
        if wanted[i] != wanted[i - 1]:  # it turned against where it had gone, by more than the noise
            assert (values[i] < values[:i].max() - STROKE + 1e-12) if wanted[i] == 0 else (
                values[i] > values[:i].min() + STROKE - 1e-12)  # fmt: skip
    np.testing.assert_array_equal(last_direction(np.array([1, 0.6, 0.5, 0.5, 0.52, 0.49])), [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(last_direction(np.array([0.0, 0.0, 0.3, 0.6, 0.6])), [0, 0, 1, 1, 1])


# -- the command ------------------------------------------------------------------------------------------------------
def run(capsys, *args):
    """Exit code, output, error text."""
    code = cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_joint_state_that_is_cut_short_costs_one_joint_state(rows, tmp_path):
    whole = write(tmp_path / "whole", rows)
    (file,) = whole.glob("*.mcap")
    made = [(item.topic, item.message.log_time, item.message.data) for item in Scan(file)]
    at = [k for k, (declared, _, _) in enumerate(made) if declared.name == JOINTS][20]
    made[at] = (*made[at][:2], made[at][2][:-20])
    (tmp_path / "cut").mkdir()
    result, (episode,) = built(mcap_variants.write(tmp_path / "cut/cut.mcap", made))
    _, (expected,) = built(whole)
    assert len(episode) == len(expected) == 50
    assert not result.error and any("/joint_states: 1 of" in note for note in result.notes)


def test_build_says_what_it_did(rows, checkpoint, tmp_path, capsys):
    bags, out = tmp_path / "bags", tmp_path / "out"
    bags.mkdir()
    write(bags / "a", rows, outcome="success")
    write(bags / "b", rows, outcome="failure")
    write(bags / "c", rows, outcome="discarded")
    broken = write(bags / "d", rows, outcome="success")
    file = next(broken.glob("*.mcap"))
    file.write_bytes(file.read_bytes()[:20000])
    (write(bags / "e", rows) / "metadata.yaml").unlink()
    code, text, _ = run(capsys, "build", bags, "--out", out, "--checkpoint", checkpoint)
    assert code == 1 and "3 episodes, 150 observations (15.0 s)" in text and "recordings marked discarded" in text
    assert "error   " in text and "truncated" in text and "no metadata.yaml: read without it" in text
    assert [p.name for p in episodes.files(out)] == [f"000000{k}.safetensors" for k in (1, 2, 3)]
    assert [episodes.read_header(p)["success"] for p in episodes.files(out)][:2] == [True, False]

    code, _, error = run(capsys, "build", bags / "a", "--out", out, "--checkpoint", checkpoint)
    assert code == 2 and "--append" in error and error.count("\n") == 1
    code, text, _ = run(capsys, "build", bags / "a", bags / "b", "--out", out, "--checkpoint", checkpoint, "--append",
                        "--only-success")  # fmt: skip
    assert code == 0 and "left out 1 recordings marked failure" in text
    assert episodes.files(out)[-1].name == "0000004.safetensors" and len(episodes.files(out)) == 4


WRONG = {
    "no such bag": (None, [], "no such bag"),
    "no instruction": (lambda rows: [r for r in rows if "instruction" not in r[0]], [], "--instruction"),
    "no camera pose": (lambda rows: [r for r in rows if r[0] != "/camera/pose"], [], "--camera-pose"),
    "no depth": (lambda rows: [r for r in rows if r[0] != DEPTH], [], "aligned_depth"),
    "a pose that is none": (lambda rows: rows, ["--camera-pose", *"0000000"], "no unit quaternion"),
    "a joint that is none": (lambda rows: rows, ["--joint-map", "elbow:a"], "elbow"),
    "no such checkpoint": (lambda rows: rows, ["--checkpoint", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said_in_one_line(rows, checkpoint, tmp_path, capsys, kind):
    change, args, said = WRONG[kind]
    path = tmp_path / "bag" if change is None else write(tmp_path / "bag", change(rows))
    code, text, error = run(capsys, "build", path, "--out", tmp_path / "out", "--checkpoint", checkpoint, *args)
    assert code == 2 and said in text + error and "Traceback" not in text + error
    assert error.count("\n") == 1


def test_there_and_back_through_lerobot(rows, checkpoint, tmp_path, capsys):
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    fit = ["--checkpoint", checkpoint]
    path = write(tmp_path / "bag", [*rows, spoken("open the drawer", 3.0)], outcome="success")
    code, text, _ = run(capsys, "build", path, "--out", tmp_path / "a", "--lerobot", tmp_path / "lerobot", *fit)
    assert code == 0 and "LeRobotDataset v3.0" in text
    code, text, _ = run(capsys, "import", tmp_path / "lerobot", "--out", tmp_path / "b", *fit)
    assert code == 0 and "2 episodes" in text and "0 skipped" in text
    for before, after in zip(episodes.files(tmp_path / "a"), episodes.files(tmp_path / "b"), strict=True):
        a, b = episodes.read(before), episodes.read(after)
        assert a.header == b.header and set(a.arrays) == set(b.arrays)
        for name in ("stamp", "actions", "primitive"):
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])
        for name in ("joint_positions", "joint_velocities", "gripper", "ee_pose"):
            np.testing.assert_allclose(a.arrays[name], b.arrays[name], atol=1e-6)
        for t in range(0, len(a), 7):
            np.testing.assert_array_equal(a.depth(t), b.depth(t))
            assert np.abs(a.color(t).astype(int) - b.color(t)).mean() < 2
    # A damaged episode is left out, and said.
    episodes.files(tmp_path / "a")[0].write_bytes(b"rubbish")
    code, text, _ = run(capsys, "export", tmp_path / "a", "--out", tmp_path / "second", *fit)
    assert code == 0 and "skipped: " in text and "0000001" in text
    assert json.loads((tmp_path / "second/meta/info.json").read_text())["total_episodes"] == 1


def foreign(folder):
    """Make a folder as somebody else's recorder would: degrees, other names, no depth, nothing of ours."""
    import pyarrow.parquet as pq

    from vla_nodes.datasets.lerobot_write import HEADER

    info = json.loads((folder / "meta/info.json").read_text())
    depth = [key for key in info["features"] if key.endswith("_depth")]
    ours = ["vla.action_chunk", "vla.stamp", "vla.primitive", "observation.ee_pose", "observation.velocity"]
    for key in [*depth, *ours]:
        del info["features"][key]
    info["features"]["observation.state"]["names"] = [f"motor_{i}.pos" for i in range(8)]
    (folder / "meta/info.json").write_text(json.dumps(info))
    path = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    table = table.drop_columns([name for name in table.column_names if name.startswith("vla.")])
    state = np.array(table["observation.state"].to_pylist())
    state[:, :7] = np.rad2deg(state[:, :7])
    state[:, 7] = 100 - 80 * state[:, 7]  # 100 closed, 20 open
    at = table.column_names.index("observation.state")
    import pyarrow as pa

    pq.write_table(table.set_column(at, "observation.state", pa.array(state.astype(np.float32).tolist())), path)
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns([HEADER]), path)


def test_somebody_elses_folder_needs_to_be_explained(rows, checkpoint, tmp_path, capsys):
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    path, fit = write(tmp_path / "bag", rows), ["--checkpoint", checkpoint]
    run(capsys, "build", path, "--out", tmp_path / "a", "--lerobot", tmp_path / "lerobot", *fit)
    foreign(tmp_path / "lerobot")
    args = ["import", tmp_path / "lerobot", "--out", tmp_path / "b", *fit]
    steps = [  # each error names the flags that the next call adds
        ("--joint-map OURS:THEIRS", [f"--joint-map={name}:motor_{i}.pos" for i, name in enumerate(NAMES[:7])]),
        ("--gripper NAME", ["--gripper", "motor_7.pos"]),
        ("give --intrinsics", ["--intrinsics", "77", "77", "32", "32"]),
        ("give --camera-pose", ["--camera-pose", "0.5", "0", "0.8", "1", "0", "0", "0"]),
        ("--degrees", ["--degrees"]),
        ("--gripper-closed", ["--gripper-closed", "100", "--gripper-open", "20"]),
    ]
    for said, flags in steps:
        code, _, error = run(capsys, *args)
        assert code == 2 and said in error and error.count("\n") == 1, error
        args += flags
    code, text, _ = run(capsys, *args)
    assert code == 0 and "no depth" in text
    before, after = (episodes.read(episodes.files(tmp_path / name)[0]) for name in "ab")
    np.testing.assert_allclose(after.arrays["joint_positions"], before.arrays["joint_positions"], atol=1e-5)
    # Actions come from the motion at 10 frames a second now, the gripper's from the action column.
    np.testing.assert_allclose(after.arrays["actions"][:, :, :6], before.arrays["actions"][:, :, :6], atol=3e-3)
    assert after.header["instruction"] == SENTENCE and not after.depth(0).any()
    code, _, error = run(capsys, *args[:4], *fit, "--camera", "observation.images.wrist")
    assert code == 2 and "observation.images.camera" in error


def test_inspect_shows_each_kind(rows, checkpoint, tmp_path, capsys):
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    path = write(tmp_path / "bag", rows, outcome="success", instruction=SENTENCE)
    run(capsys, "build", path, "--out", tmp_path / "a", "--lerobot", tmp_path / "l", "--checkpoint", checkpoint)
    (tmp_path / "a/0000002.safetensors").write_bytes(b"rubbish")
    for place, said in {
        "a": ["1 episodes, 50 observations, 4.9 s", "10.00", "damaged: ", SENTENCE, "statistics", "success"],
        "l": ["LeRobot v3.0, 1 episodes, 50 frames, 10 fps", "observation.state", SENTENCE],
        "bag": ["outcome: success", "/joint_states", "100.0", "20.0", "camera_pose", SENTENCE],
    }.items():
        sheet = tmp_path / f"{place}.png"
        code, text, _ = run(capsys, "inspect", tmp_path / place, "--out", sheet)
        assert code == 0, text
        for words in said:
            assert words in text, (place, words, text)
        picture = cv2.imread(str(sheet))
        assert picture.shape[1] == 960 and picture.std() > 5
    code, _, error = run(capsys, "inspect", tmp_path / "nothing")
    assert code == 2 and error.count("\n") == 1
    code, _, error = run(capsys, "inspect", tmp_path)
    assert code == 2 and "neither" in error

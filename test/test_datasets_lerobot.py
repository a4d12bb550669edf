"""LeRobot folders: the documented layout, exact but for colour's video loss, and one clear line for what is broken."""

import json
import shutil
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.datasets import episode as episodes
from vla_nodes.datasets import lerobot_write, video_codec
from vla_nodes.datasets.episode import DataError, EpisodeWriter
from vla_nodes.datasets.lerobot_read import LeRobotFolder
from vla_nodes.datasets.lerobot_write import LeRobotWriter, frame_actions
from vla_nodes.datasets.video_codec import DepthCoding
from vla_nodes.poses import pose_rows, quaternion_matrix

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
av = pytest.importorskip("av")
JOINTS = tuple(f"panda_joint{i}" for i in range(1, 8))
SENTENCES = ("pick up the red block", "open the drawer", "pick up the red block")
HEIGHT, WIDTH, FPS = 64, 80, 10
COLOR, DEPTH = "observation.images.camera", "observation.images.camera_depth"


def make_episode(path, number: int, ticks: int = 5, size=(HEIGHT, WIDTH), **header):
    """Smooth moving pictures, as cameras give them, and motion at random."""
    rng, writer = np.random.default_rng(number), EpisodeWriter()
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    for t in range(ticks):
        phase = t + 7 * number
        red, green = 127 + 100 * np.sin(x / 17 + phase / 3), 127 + 90 * np.cos(y / 13 + phase / 5)
        color = np.stack([red, green, 40 + x + y], -1).clip(0, 255).astype(np.uint8)
        depth = (0.3 + 0.004 * x + 0.006 * y + 0.01 * t).astype(np.float32)
        depth[:3], depth[-1, -1] = 0, 7.0
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = cv2.Rodrigues(np.array([np.pi, 0.02 * t, 0.1 * t]))[0], rng.normal(size=3)
        writer.add(color, depth, stamp=1.76e9 + 0.1 * t, joint_positions=rng.normal(size=7),
                   joint_velocities=rng.normal(size=7), gripper=rng.random(), ee_pose=pose, primitive=-1,
                   actions=rng.normal(0, 0.01, (16, 7)).astype(np.float32))  # fmt: skip
    header = {"instruction": SENTENCES[number % 3], "intrinsics": np.eye(3).tolist(), "period": 0.05, "tick": 0.1,
              "camera_pose": np.eye(4).tolist(), **header}  # fmt: skip
    writer.write(path, header)
    return episodes.read(path)


def write(folder, made):
    writer = LeRobotWriter(folder, 0.1, 0.05, JOINTS)
    for episode in made:
        writer.add(episode)
    writer.close()
    return writer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("episodes")
    return [make_episode(root / f"{i}.safetensors", i, 5 + i) for i in range(3)]


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("lerobot") / "set"
    writer = write(path, made)
    assert writer.frames == 18 and writer.out_of_range == 18  # the one pixel 7 m away in every frame
    return path


def test_layout_is_the_documented_one(folder):
    """huggingface.co/docs/lerobot/lerobot-dataset-v3: file names, info.json, columns and their types."""
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    chunk = "chunk-000/file-000"
    assert files == {"meta/info.json", "meta/stats.json", "meta/tasks.parquet", f"meta/episodes/{chunk}.parquet",
                     f"data/{chunk}.parquet", f"videos/{COLOR}/{chunk}.mp4", f"videos/{DEPTH}/{chunk}.mp4"}  # fmt: skip
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == FPS and info["splits"] == {"train": "0:3"}
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 18, 2)
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["video_path"] == "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    features = info["features"]
    assert features[COLOR]["shape"] == [HEIGHT, WIDTH, 3] and features[DEPTH]["shape"] == [HEIGHT, WIDTH, 1]
    assert features[DEPTH]["info"]["is_depth_map"] and features[DEPTH]["info"]["depth_unit"] == "mm"
    assert features["observation.state"]["names"] == [*JOINTS, "gripper"]
    assert not any("/" in name for name in features)

    data = pq.read_table(folder / f"data/{chunk}.parquet")
    assert set(data.column_names) == {name for name, f in features.items() if f["dtype"] != "video"}
    assert data.schema.field("action").type == pa.list_(pa.float32(), 7)
    assert data.schema.field("timestamp").type == pa.float32() and data.schema.field("index").type == pa.int64()
    assert data["index"].to_pylist() == list(range(18))
    frames = np.concatenate([np.arange(5), np.arange(6), np.arange(7)])
    assert data["frame_index"].to_pylist() == frames.tolist()
    np.testing.assert_allclose(data["timestamp"].to_numpy(), frames / FPS, atol=1e-6)
    assert data["task_index"].to_pylist() == [0] * 5 + [1] * 6 + [0] * 7

    tasks = pq.read_table(folder / "meta/tasks.parquet")
    assert tasks["task"].to_pylist() == ["pick up the red block", "open the drawer"]
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]

    rows = pq.read_table(folder / f"meta/episodes/{chunk}.parquet").to_pylist()
    assert [(r["dataset_from_index"], r["dataset_to_index"], r["length"]) for r in rows] == [
        (0, 5, 5), (5, 11, 6), (11, 18, 7)]  # fmt: skip
    assert [r["tasks"] for r in rows] == [["pick up the red block"], ["open the drawer"], ["pick up the red block"]]
    for key in (COLOR, DEPTH):
        spans = [(r[f"videos/{key}/from_timestamp"], r[f"videos/{key}/to_timestamp"]) for r in rows]
        np.testing.assert_allclose(spans, [(0, 0.5), (0.5, 1.1), (1.1, 1.8)])
        with av.open(str(folder / f"videos/{key}/{chunk}.mp4")) as file:
            assert file.streams.video[0].frames == 18 and file.streams.video[0].average_rate == FPS
    stats = json.loads((folder / "meta/stats.json").read_text())
    for name in features:
        assert set(stats[name]) == {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}
    assert np.shape(stats[COLOR]["mean"]) == (3, 1, 1) and 0 < stats[COLOR]["mean"][0][0][0] < 1
    assert np.shape(stats[DEPTH]["max"]) == (1, 1, 1) and 300 < stats[DEPTH]["mean"][0][0][0] < 1000  # mm
    state = np.array(data["observation.state"].to_pylist())
    np.testing.assert_allclose(stats["observation.state"]["mean"], state.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["observation.state"]["std"], state.std(0), atol=1e-6)
    assert stats["observation.state"]["count"] == [18]


def test_what_was_written_comes_back(folder, made):
    read = LeRobotFolder(folder)
    assert len(read) == 3 and read.cameras() == [COLOR] and read.cameras(depth=True) == [DEPTH]
    assert read.tasks == {0: "pick up the red block", 1: "open the drawer"}
    for index, episode in enumerate(made):
        rows = read.columns(index, ["vla.action_chunk", "vla.stamp", "observation.state", "observation.ee_pose"])
        np.testing.assert_array_equal(rows["vla.action_chunk"], episode.arrays["actions"])
        np.testing.assert_array_equal(rows["vla.stamp"], episode.arrays["stamp"])
        np.testing.assert_allclose(rows["observation.state"][:, :7], episode.arrays["joint_positions"], atol=1e-6)
        turned = quaternion_matrix(rows["observation.ee_pose"][:, 3:].astype(float))
        np.testing.assert_allclose(turned, episode.arrays["ee_pose"][:, :3, :3], atol=1e-6)
        colors, depths = list(read.images(index, COLOR)), list(read.images(index, DEPTH))
        assert len(colors) == len(depths) == len(episode)
        for t in range(len(episode)):
            wanted = episode.depth(t)
            np.testing.assert_allclose(depths[t], np.where(wanted > 4.096, 0, wanted), atol=1e-6)  # exact, in mm
            assert np.abs(colors[t].astype(int) - episode.color(t)).mean() < 3
        # Neighbouring frames differ by more than the loss: these are the right ones.
        assert np.abs(colors[0].astype(int) - episode.color(2)).mean() > 8


def test_lerobots_own_reader_opens_it(folder, made):
    """Runs where lerobot is installed beside this package (see docs/from_bags.md)."""
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    data = module.LeRobotDataset("local/test", root=folder, video_backend="pyav")
    assert len(data) == 18 and data.num_episodes == 3 and data.fps == FPS
    for at, (index, tick) in {0: (0, 0), 4: (0, 4), 5: (1, 0), 10: (1, 5), 11: (2, 0), 17: (2, 6)}.items():
        item, episode = data[at], made[index]
        assert item["task"] == episode.header["instruction"] and int(item["episode_index"]) == index
        color = item[COLOR].permute(1, 2, 0).numpy() * 255
        assert color.shape == (HEIGHT, WIDTH, 3) and np.abs(color - episode.color(tick)).mean() < 3
        np.testing.assert_array_equal(item["vla.action_chunk"].numpy(), episode.arrays["actions"][tick])
        joints = item["observation.state"][:7].numpy()
        np.testing.assert_allclose(joints, episode.arrays["joint_positions"][tick], atol=1e-6)
        if getattr(data.meta, "depth_keys", None):  # since lerobot 0.6; before, depth was not known
            wanted = episode.depth(tick) * 1000
            np.testing.assert_allclose(item[DEPTH][0].numpy(), np.where(wanted > 4096, 0, wanted), atol=1e-2)


def test_many_files_when_they_grow_large(made, tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_write, "DATA_MB", 0)
    monkeypatch.setattr(lerobot_write, "VIDEO_MB", 0)
    monkeypatch.setattr(lerobot_write, "CHUNK_FILES", 2)
    write(tmp_path / "set", made)
    for part in ("data", f"videos/{COLOR}", f"videos/{DEPTH}"):
        place = tmp_path / "set" / part
        found = sorted(str(p.relative_to(place).with_suffix("")) for p in place.rglob("*.*"))
        assert found == ["chunk-000/file-000", "chunk-000/file-001", "chunk-001/file-000"]
    read = LeRobotFolder(tmp_path / "set")
    for index, episode in enumerate(made):
        np.testing.assert_array_equal(
            read.columns(index, ["vla.action_chunk"])["vla.action_chunk"], episode.arrays["actions"]
        )
        for t, depth in enumerate(read.images(index, DEPTH)):
            assert abs(depth[20, 20] - episode.depth(t)[20, 20]) < 1e-6


def test_the_same_episodes_give_the_same_folder(folder, made, tmp_path):
    write(tmp_path / "again", made)
    for path in folder.rglob("*.*"):
        name = path.relative_to(folder)
        if path.is_file() and DEPTH not in name.parts:
            assert path.read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    for index in range(3):  # x265's bytes differ from run to run, what they decode to does not
        pairs = zip(*(LeRobotFolder(f).images(index, DEPTH) for f in (folder, tmp_path / "again")), strict=True)
        assert all((a == b).all() for a, b in pairs)


def test_the_same_pictures_give_the_same_video_whatever_lies_in_memory(tmp_path):
    rng, tiles = np.random.default_rng(0), np.ones((8, 8, 1), np.uint8)
    pictures = [np.kron(rng.integers(0, 255, (28, 28, 3)).astype(np.uint8), tiles) for _ in range(6)]
    kept, seen = [], set()
    for _ in range(40):
        kept = [rng.integers(1, 255, rng.integers(1, 200_000), np.uint8) for _ in range(100)] + kept[::2][:100]
        writer = video_codec.VideoWriter(tmp_path / "v.mp4", 20, 224, 224, "color")
        for picture in pictures:
            writer.add(picture.copy())
        writer.close()
        seen.add((tmp_path / "v.mp4").read_bytes())
    assert len(seen) == 1


def test_depth_codes():
    linear = DepthCoding()
    metres = np.arange(4096, dtype=np.float32) * np.float32(1e-3)
    codes, lost = linear.encode(metres)
    np.testing.assert_array_equal(codes, np.arange(4096))
    np.testing.assert_allclose(linear.decode(codes), metres, atol=1e-6)
    assert lost == 0 and linear.encode(np.array([4.2], np.float32)) == (np.array([0]), 1)
    log = DepthCoding(0.01, 10.0, 3.5, True)  # LeRobot's defaults
    # rint(4095 (ln(1 + 3.5) - ln(0.01 + 3.5)) / (ln(10 + 3.5) - ln(0.01 + 3.5))), worked out by hand
    assert log.encode(np.array([1.0, 0.01, 10.0], np.float32))[0].tolist() == [755, 0, 4095]
    far = np.linspace(0.1, 9.9, 500, dtype=np.float32)
    assert np.abs(log.decode(log.encode(far)[0]) - far).max() < 0.5 * 1.3471 / 4095 * 13.5 * 1.01  # half a code
    for wrong in ({"near": 1.0, "far": 1.0}, {"near": 0.0, "log": True}, {"far": float("nan")}, {"near": -1.0}):
        with pytest.raises(DataError, match="impossible"):
            DepthCoding(**wrong)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-3.1, 3.1)] * 3), min_size=1, max_size=6))
def test_quaternions_turn_as_the_matrices_do(vectors):
    poses = np.tile(np.eye(4), (len(vectors), 1, 1))
    poses[:, :3, :3] = [cv2.Rodrigues(np.array(v))[0] for v in vectors]
    rows = pose_rows(poses)
    np.testing.assert_allclose(quaternion_matrix(rows[:, 3:]), poses[:, :3, :3], atol=1e-9)
    assert ((rows[1:, 3:] * rows[:-1, 3:]).sum(1) >= -1e-9).all()  # the nearer of the two signs


def test_quaternions_do_not_jump_where_the_tool_points_down():
    angles = np.pi + np.linspace(-0.05, 0.05, 21)
    poses = np.tile(np.eye(4), (21, 1, 1))
    poses[:, :3, :3] = [cv2.Rodrigues(np.array([a, 0.0, 0.0]))[0] for a in angles]
    assert np.abs(np.diff(pose_rows(poses)[:, 3:], axis=0)).max() < 0.005


def test_frame_action_is_where_its_rows_lead():
    rng = np.random.default_rng(0)
    chunk = rng.normal(0, 0.3, (1, 5, 7))
    action = frame_actions(chunk, 3)[0]
    turn = np.eye(3)
    for row in chunk[0, :3]:
        turn = cv2.Rodrigues(row[3:6])[0] @ turn
    np.testing.assert_allclose(action[:3], chunk[0, :3, :3].sum(0))
    np.testing.assert_allclose(cv2.Rodrigues(action[3:6])[0], turn, atol=1e-9)
    assert action[6] == chunk[0, 2, 6]


def rewrite(path, **columns):
    """A parquet file with columns replaced (None removes one)."""
    table = pq.read_table(path)
    for name, values in columns.items():
        name = name.replace("__", "/")
        table = table.drop_columns([name])
        if values is not None:
            table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)


def edit_info(folder, **changes):
    path = folder / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path, share=0.5):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO = f"videos/{COLOR}/chunk-000/file-000.mp4"
BEGINS = f"videos__{COLOR}__from_timestamp"
ABROAD = {"../x": {"dtype": "video", "shape": [1]}}
PLAYLIST = "ffconcat version 1.0\nfile /etc/passwd\n"
DAMAGE = {
    "no folder at all": (lambda f: shutil.rmtree(f), "no LeRobot folder"),
    "info is no JSON": (lambda f: cut(f / "meta/info.json"), "info.json: not readable"),
    "info without fps": (lambda f: edit_info(f, fps=None), "info.json"),
    "an older format": (lambda f: edit_info(f, codebase_version="v2.1"), "convert"),
    "a path that leads out": (lambda f: edit_info(f, data_path="../../{chunk_index}{file_index}"), "data_path"),
    "a video path that leads out": (lambda f: edit_info(f, video_path="/etc/{video_key}"), "video_path"),
    "a feature that leads out": (lambda f: edit_info(f, features=ABROAD), "feature"),
    "data cut short": (lambda f: cut(f / DATA), "not a readable parquet"),
    "data missing": (lambda f: (f / DATA).unlink(), "not a readable parquet"),
    "a column missing": (lambda f: rewrite(f / DATA, **{"vla.stamp": None}), "no column vla.stamp"),
    "rows of another width": (lambda f: rewrite(f / DATA, **{"action": [[1.0, 2.0]] * 18}), "info.json says"),
    "ragged rows": (lambda f: rewrite(f / DATA, **{"action": [[1.0] * (1 + i % 2) for i in range(18)]}), "episode 0"),
    "too few rows": (lambda f: rewrite(f / DATA, episode_index=[0] + [1] * 17), "1 rows"),
    "tasks cut short": (lambda f: cut(f / "meta/tasks.parquet"), "tasks.parquet"),
    "no episodes": (lambda f: (f / EPISODES).unlink(), "no episodes"),
    "no place of the data": (lambda f: rewrite(f / EPISODES, data__file_index=None), "data/file_index"),
    "no place of the video": (lambda f: rewrite(f / EPISODES, **{BEGINS: None}), "place"),
    "video missing": (lambda f: (f / VIDEO).unlink(), "is missing"),
    "video cut short": (lambda f: cut(f / VIDEO), "not a readable video"),
    "video empty": (lambda f: (f / VIDEO).write_bytes(b""), "not a readable video"),
    "a playlist in its place": (lambda f: (f / VIDEO).write_text(PLAYLIST), "video"),
    "longer than its video": (lambda f: rewrite(f / EPISODES, **{BEGINS: [1.7] * 3}), "short"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damage_is_one_line_that_names_the_place(folder, tmp_path, kind):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage, said = DAMAGE[kind]
    damage(copy)
    with pytest.raises(DataError) as caught:
        read = LeRobotFolder(copy)
        read.columns(0, ["action", "vla.stamp"])
        list(read.images(0, COLOR))
    assert said in str(caught.value) and str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_are_bounded(folder, monkeypatch):
    from vla_nodes.datasets import lerobot_read

    monkeypatch.setattr(video_codec, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(DataError, match="pixels"):
        list(LeRobotFolder(folder).images(0, COLOR))
    monkeypatch.setattr(lerobot_read, "MAX_EPISODES", 2)
    with pytest.raises(DataError, match="more than 2 episodes"):
        LeRobotFolder(folder)
    monkeypatch.setattr(lerobot_read, "MAX_PARQUET", 100)
    with pytest.raises(DataError, match="larger than 100 bytes"):
        LeRobotFolder(folder)
    monkeypatch.setattr(lerobot_read, "MAX_JSON", 100)
    with pytest.raises(DataError, match=r"info.json.*larger"):
        LeRobotFolder(folder)


def test_what_cannot_be_written_is_said_and_leaves_nothing(made, folder, tmp_path):
    with pytest.raises(DataError, match="not empty"):
        LeRobotWriter(folder, 0.1, 0.05, JOINTS)
    with pytest.raises(DataError, match="whole number of frames"):
        LeRobotWriter(tmp_path / "set", 0.07, 0.05, JOINTS)
    odd = make_episode(tmp_path / "9.safetensors", 1, 3, size=(65, 80))
    writer = LeRobotWriter(tmp_path / "set", 0.1, 0.05, JOINTS)
    with pytest.raises(DataError, match="even height and width"):
        writer.add(odd)
    writer.abort()
    writer = LeRobotWriter(tmp_path / "set", 0.1, 0.05, JOINTS)
    writer.add(made[0])
    with pytest.raises(DataError, match="one size a folder"):
        writer.add(make_episode(tmp_path / "8.safetensors", 1, 3, size=(32, 32)))
    writer.abort()
    with pytest.raises(DataError, match="no episodes"):
        LeRobotWriter(tmp_path / "set", 0.1, 0.05, JOINTS).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["8.safetensors", "9.safetensors"]


def test_missing_libraries_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"vla_nodes\[lerobot\]"):
        LeRobotFolder(tmp_path)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"vla_nodes\[lerobot\]"):
        list(video_codec.read_video(tmp_path / "x.mp4", 0.0, 1, "color", 10))

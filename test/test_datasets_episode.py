"""Episodes on disk: exact, whole or not at all, and never a crash when something else lies there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from vla_nodes.datasets import episode as episodes
from vla_nodes.datasets.episode import DataError, EpisodeWriter

rng = np.random.default_rng(0)
COLOR = rng.integers(0, 256, (3, 12, 16, 3), dtype=np.uint8)
DEPTH = rng.uniform(0.2, 3.0, (3, 12, 16)).astype(np.float32)


def make(path, header=None):
    writer = EpisodeWriter()
    for t in range(3):
        writer.add(COLOR[t], DEPTH[t], stamp=0.1 * t, gripper=0.5, actions=np.full((16, 7), t, np.float32))
    writer.write(path, header or {"instruction": "grab the red block"})
    return path


@pytest.fixture
def path(tmp_path):
    return make(tmp_path / "0000001.safetensors")


def altered(path, header="{}", **changes):
    """The episode with some arrays replaced (None removes one)."""
    arrays = {k: v for k, v in {**load_file(path), **changes}.items() if v is not None}
    save_file(arrays, path, metadata={"episode": header})
    return path


def test_round_trip(path):
    episode = episodes.read(path)
    assert len(episode) == 3 and episode.header == episodes.read_header(path) == {"instruction": "grab the red block"}
    for t in range(3):
        np.testing.assert_array_equal(episode.color(t), COLOR[t])
        assert np.abs(episode.depth(t) - DEPTH[t]).max() <= 0.0005 + 1e-6
        assert (episode.arrays["actions"][t] == t).all()
    assert episode.depth(0).dtype == np.float32


def test_depth_without_a_reading_stays_without(tmp_path):
    writer = EpisodeWriter()
    depth = np.array([[np.nan, np.inf, -np.inf, 0.0, -1.0, 70.0, 65.5, 0.0004]], np.float32)
    writer.add(np.zeros((1, 8, 3), np.uint8), depth, stamp=0.0)
    writer.write(tmp_path / "a.safetensors", {})
    read = episodes.read(tmp_path / "a.safetensors").depth(0)[0]
    np.testing.assert_allclose(read, [0, 0, 0, 0, 0, 0, 65.5, 0], atol=5e-4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_is_a_data_error_that_names_it(tmp_path_factory, data):
    path = make(tmp_path_factory.mktemp("damage") / "x.safetensors")
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "truncated"):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1), "length")]
    else:
        head = int.from_bytes(raw[:8], "little") + 8
        for _ in range(data.draw(st.integers(1, 6), "bytes")):
            at = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, head), "where")
            raw[at] = data.draw(st.integers(0, 255), "value")
    path.write_bytes(raw)
    try:
        episode = episodes.read(path)
        for t in range(len(episode)):
            episode.color(t), episode.depth(t)
    except DataError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("changes", [
    {"stamp": None}, {"stamp": np.zeros(2)}, {"stamp": np.array(1.0)}, {"color_png": None}, {"depth_offsets": None},
    {"color_offsets": np.array([0, 5, 2**40, 7])}, {"color_offsets": np.zeros(4, np.int64)},
    {"depth_png": np.zeros(30, np.float32)}, {"gripper": np.zeros((4, 1))},
], ids=lambda c: "{}-{}".format(*[(k, None if v is None else v.shape) for k, v in c.items()][0]))  # fmt: skip
def test_inconsistent_arrays(path, changes):
    with pytest.raises(DataError, match="0000001.safetensors"):
        episodes.read(altered(path, **changes))


@pytest.mark.parametrize("header", ["[1, 2]", "3", "{", ""])
def test_a_header_that_is_none(path, header):
    altered(path, header)
    for read in (episodes.read, episodes.read_header):
        with pytest.raises(DataError, match="0000001.safetensors"):
            read(path)


def test_foreign_missing_and_oversized_files(path, tmp_path, monkeypatch):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": np.zeros(3)}, foreign)  # somebody's model
    with pytest.raises(DataError, match="foreign"):
        episodes.read(foreign)
    with pytest.raises(DataError, match="nowhere"):
        episodes.read(tmp_path / "nowhere.safetensors")
    monkeypatch.setattr(episodes, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(DataError, match=r"0000001.*more than"):
        episodes.read(path)


def test_a_png_that_claims_too_many_pixels_is_not_decoded(path, monkeypatch):
    monkeypatch.setattr(episodes, "MAX_PIXELS", 12 * 16 - 1)
    with pytest.raises(DataError, match=r"0000001.*color image 0"):
        episodes.read(path).color(0)


def test_colour_in_place_of_depth_is_refused(path):
    arrays = load_file(path)
    altered(path, depth_png=arrays["color_png"], depth_offsets=arrays["color_offsets"])
    with pytest.raises(DataError, match="depth image 0"):
        episodes.read(path).depth(0)


def test_writing_leaves_the_whole_file_or_none(tmp_path, monkeypatch):
    target = make(tmp_path / "1.safetensors", {"n": 1})

    def fails(arrays, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(episodes, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        make(target, {"n": 2})
    assert episodes.read_header(target) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["1.safetensors"]


def test_ticks_that_lack_something_are_not_written(tmp_path):
    writer = EpisodeWriter()
    with pytest.raises(DataError, match="0 ticks"):
        writer.write(tmp_path / "1.safetensors", {})
    writer.add(COLOR[0], DEPTH[0], stamp=0.0, gripper=1.0)
    writer.add(COLOR[1], DEPTH[1], stamp=0.1)
    with pytest.raises(DataError, match="gripper"):
        writer.write(tmp_path / "1.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_folder(path, tmp_path):
    (tmp_path / "0000000.partial").write_bytes(b"")
    assert episodes.files(tmp_path) == [path]
    with pytest.raises(DataError, match="no episodes"):
        episodes.files(tmp_path / "empty")
    with pytest.raises(DataError, match=r"0000001.*no segmentation"):
        episodes.read(path).require("instruction", "stamp", "segmentation")

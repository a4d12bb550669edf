"""The bag reader: every kind of rosbag2 recording, and one clear line for each that is broken."""

from __future__ import annotations

import shutil

import made_bags
import numpy as np
import pytest
import robots
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from vla_nodes.messages.convert import chunk_from
from vla_nodes.rosbag import mcap_records
from vla_nodes.rosbag.message_definitions import topic
from vla_nodes.rosbag.read import BagError, open_bag, typestore
from vla_nodes.rosbag.repair import Scan
from vla_nodes.rosbag.write import BagWriter
from vla_nodes.share import share_path

STORE = typestore()
Time = STORE.types["builtin_interfaces/msg/Time"]
Header = STORE.types["std_msgs/msg/Header"]


def joint_state(stamp: int, value: float = 0.0):
    header, none = Header(Time(stamp // 10**9, stamp % 10**9), ""), np.zeros(0)
    return STORE.types["sensor_msgs/msg/JointState"](header, ["a", "b"], np.array([value, 1.0]), none, none)


def write(path, messages, version=8, plugin=StoragePlugin.MCAP, mode=CompressionMode.NONE, custom=()):
    """A bag of (topic, type, stamp in ns, message)."""
    writer = Writer(path, version=version, storage_plugin=plugin)
    if mode is not CompressionMode.NONE:
        writer.set_compression(mode, CompressionFormat.ZSTD)
    for key, value in custom:
        writer.set_custom_data(key, value)
    with writer:
        connections = {}
        for topic, kind, stamp, message in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(connections[topic], stamp, STORE.serialize_cdr(message, kind))
    return path


def joints(n=20, start=10**9, topic="/joint_states"):
    stamps = [start + k * 10**7 for k in range(n)]
    return [(topic, "sensor_msgs/msg/JointState", t, joint_state(t, k)) for k, t in enumerate(stamps)]


KINDS = [
    (StoragePlugin.MCAP, CompressionMode.NONE, 8),
    (StoragePlugin.MCAP, CompressionMode.NONE, 9),
    (StoragePlugin.MCAP, CompressionMode.STORAGE, 9),
    (StoragePlugin.MCAP, CompressionMode.FILE, 8),
    (StoragePlugin.MCAP, CompressionMode.MESSAGE, 8),
    (StoragePlugin.SQLITE3, CompressionMode.NONE, 8),
    (StoragePlugin.SQLITE3, CompressionMode.FILE, 9),
    (StoragePlugin.SQLITE3, CompressionMode.MESSAGE, 9),
]


@pytest.mark.parametrize("plugin, mode, version", KINDS, ids=lambda v: getattr(v, "name", str(v)))
def test_every_storage_and_compression_gives_the_messages_back(tmp_path, plugin, mode, version):
    path = write(tmp_path / "bag", joints(), version, plugin, mode, [("task", "test")])
    with open_bag(path) as bag:
        assert bag.topics == {"/joint_states": "sensor_msgs/msg/JointState"}
        assert bag.counts == {"/joint_states": 20} and bag.custom == {"task": "test"}
        assert (bag.start, bag.end) == (10**9, 10**9 + 19 * 10**7)
        read = list(bag.messages(["/joint_states"]))
        assert [stamp for _, stamp, _ in read] == [10**9 + k * 10**7 for k in range(20)]
        assert [m.position[0] for _, _, m in read] == list(range(20))
        assert len(list(bag.messages())) == 20


def test_what_was_unpacked_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    path = write(tmp_path / "bag", joints(), mode=CompressionMode.FILE)
    with open_bag(path):
        assert list((tmp_path / "tmp").iterdir())
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("suffix", ["mcap", "db3"])
def test_a_storage_file_is_read_by_itself(tmp_path, suffix):
    plugin = StoragePlugin.MCAP if suffix == "mcap" else StoragePlugin.SQLITE3
    path = write(tmp_path / "bag", joints(), plugin=plugin)
    with open_bag(path / f"bag.{suffix}") as bag:
        assert len(list(bag.messages())) == 20


def test_split_files_follow_each_other(tmp_path):
    first = write(tmp_path / "first", joints(5))
    second = write(tmp_path / "second", joints(5, 2 * 10**9))
    shutil.copy(second / "second.mcap", first)
    text = (first / "metadata.yaml").read_text()
    assert "- first.mcap" in text
    (first / "metadata.yaml").write_text(text.replace("- first.mcap", "- first.mcap\n  - second.mcap"))
    with open_bag(first) as bag:
        stamps = [stamp for _, stamp, _ in bag.messages()]
        assert len(stamps) == 10 and stamps == sorted(stamps) and bag.counts["/joint_states"] == 10


def test_iterators_are_independent(tmp_path):
    with open_bag(write(tmp_path / "bag", joints())) as bag:
        one, two = bag.messages(), bag.messages()
        pairs = [(next(one)[1], next(two)[1]) for _ in range(20)]
        assert all(a == b for a, b in pairs) and pairs[-1][0] == bag.end


def test_messages_of_this_package_are_known(tmp_path):
    kind = "vla_nodes/msg/ActionChunk"
    chunk = STORE.types[kind](
        Header(Time(1, 2), "base"), "go", 0.1, "ee_delta", ["a", "b"], ["b"], 1, 2, np.ones(2, np.float32)
    )
    with open_bag(write(tmp_path / "bag", [("/vla/action_chunk", kind, 5, chunk)])) as bag:
        ((_, _, back),) = bag.messages()
        assert back.instruction == "go" and back.actions.tolist() == [1.0, 1.0]
        text, digest = bag.definition("/vla/action_chunk")
        assert "string[] grippers" in text and digest.startswith("RIHS01_")


SAMPLE = share_path("resource/bags/pick_red_block")


def test_chunks_of_the_former_definition_are_brought_up_to_date(tmp_path):
    """The sample bag was recorded when the last column was always the gripper, and no field said so."""
    topic = "/vla/action_chunk"
    with open_bag(SAMPLE) as bag:
        chunks = [message for _, _, message in bag.messages([topic])]
        assert len(chunks) == bag.counts[topic] > 20 and topic in bag.readable()
        text, digest = bag.definition(topic)
        assert "grippers" not in text  # its bytes are copied as they are
        raw = [(stamp, data) for _, stamp, data in bag.raw([topic])]
    for chunk in chunks:
        assert list(chunk.names) == ["dx", "dy", "dz", "rx", "ry", "rz", "gripper"] and list(chunk.grippers) == [
            "gripper"
        ]
        ours = chunk_from(chunk, robots.panda())
        assert ours.grippers == ("gripper",) and ours.problem(robots.panda().joint_names, ours.grippers) is None
        np.testing.assert_array_equal(ours.openings[:, 0], chunk.actions.reshape(16, 7)[:, 6])
    copy = Writer(tmp_path / "copy", version=8, storage_plugin=StoragePlugin.MCAP)
    with copy:
        connection = copy.add_connection(topic, "vla_nodes/msg/ActionChunk", msgdef=text, rihs01=digest)
        for stamp, data in raw:
            copy.write(connection, stamp, data)
    with open_bag(tmp_path / "copy") as bag:
        again = [message for _, _, message in bag.messages([topic])]
    assert [str(a) for a in again] == [str(b) for b in chunks]


def fails(path, *words):
    with pytest.raises(BagError) as caught:
        with open_bag(path) as bag:
            list(bag.messages(["/joint_states"]))
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    for word in words:
        assert word in line, line


def test_what_is_no_bag_is_said_in_one_line(tmp_path):
    fails(tmp_path / "absent", "no such bag")
    (tmp_path / "text.txt").write_text("hello")
    fails(tmp_path / "text.txt", "not a rosbag2 recording")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "not a rosbag2 recording")
    (tmp_path / "fake.mcap").write_text("hello, this is no mcap file at all, only text of some length")
    fails(tmp_path / "fake.mcap", "not an MCAP file")
    (tmp_path / "fake.db3").write_text("hello")
    fails(tmp_path / "fake.db3", "not a sqlite3 file")
    (tmp_path / "zero.mcap").write_bytes(b"")
    fails(tmp_path / "zero.mcap", "empty")


def test_an_empty_bag_is_said_to_be_empty(tmp_path):
    fails(write(tmp_path / "bag", []), "holds no messages")


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3], ids=lambda p: p.name)
@pytest.mark.parametrize("mode", [CompressionMode.NONE, CompressionMode.FILE, CompressionMode.MESSAGE])
def test_a_bag_without_metadata_opens_and_says_so(tmp_path, plugin, mode):
    path = write(tmp_path / "bag", joints(), plugin=plugin, mode=mode)
    (path / "metadata.yaml").unlink()
    with open_bag(path) as bag:
        assert bag.counts == {"/joint_states": 20} and len(list(bag.messages())) == 20
        assert len(bag.notes) == 1 and "no metadata.yaml: read without it, from bag." in bag.notes[0]


INFO = "rosbag2_bagfile_information: "
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no key rosbag2_bagfile_information"),
        (INFO + "{version: 8}", "no key 'storage_identifier'"),
        (INFO + "{version: .inf, storage_identifier: mcap, relative_file_paths: [a]}", "version is 'inf', which is no"),
        (INFO + "{version: 8, storage_identifier: [mcap], relative_file_paths: [a]}", "storage_identifier is"),
        (INFO + "{version: 8, storage_identifier: mcap, relative_file_paths: a}", "relative_file_paths is 'a'"),
        (INFO + "{version: 8, storage_identifier: mcap, relative_file_paths: [a], custom_data: 5}", "custom_data"),
        (INFO + "{version: 8, storage_identifier: '', relative_file_paths: [bag.mcap]}", "does not name its storage"),
        ("a: [", "not YAML"),
        ("[" * 100_000, "nested more than"),
        (BOMB, "more than 150000 values"),
        ("\udcff\udcfe", "not UTF-8"),
    ],
)  # fmt: skip
def test_a_bag_with_broken_metadata_opens_and_says_what_was_wrong(tmp_path, text, words):
    path = write(tmp_path / "bag", joints())
    (path / "metadata.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with open_bag(path) as bag:
        assert bag.counts == {"/joint_states": 20} and len(list(bag.messages())) == 20
        (note,) = bag.notes
        assert words in note and "\n" not in note and len(note) < 400


@pytest.mark.parametrize(
    "text, words",
    [
        ("{version: 99, storage_identifier: x, relative_file_paths: [a]}", "version 99"),
        ("{version: 8, storage_identifier: x, relative_file_paths: [a]}", "storage 'x'"),
        ("{version: 8, storage_identifier: mcap, relative_file_paths: []}", "no messages"),
        ("{version: 8, storage_identifier: mcap, relative_file_paths: [../../x]}", "x"),
        ("{version: 8, storage_identifier: mcap, relative_file_paths: [metadata.yaml]}", "no .mcap or .db3"),
        ("{version: 8, storage_identifier: mcap, relative_file_paths: [bag.mcap],"
         " compression_mode: FILE, compression_format: lz4}", "'lz4'"),
    ],
)  # fmt: skip
def test_what_metadata_tells_and_cannot_be_is_said_in_one_line(tmp_path, text, words):
    path = write(tmp_path / "bag", joints())
    (path / "metadata.yaml").write_text(INFO + text)
    fails(path, words)


def test_broken_metadata_and_no_recording_is_one_line(tmp_path):
    (tmp_path / "metadata.yaml").write_text("version: .inf")
    fails(tmp_path, "no key rosbag2_bagfile_information", "no .mcap or .db3 file")


def test_a_folder_of_loose_files_is_read_in_order_of_time(tmp_path):
    late = write(tmp_path / "a", joints(5, 3 * 10**9))
    for name, start in (("b", 10**9), ("c", 2 * 10**9)):
        shutil.copy(write(tmp_path / name, joints(5, start)) / f"{name}.mcap", late)
    (late / "metadata.yaml").unlink()
    with open_bag(late) as bag:
        stamps = [stamp for _, stamp, _ in bag.messages()]
        assert len(stamps) == 15 and stamps == sorted(stamps)


def test_a_ros1_bag_names_the_command_that_converts_it(tmp_path):
    (tmp_path / "old.bag").write_bytes(b"#ROSBAG V2.0\n" + bytes(4096))
    command = f"rosbags-convert --src {tmp_path / 'old.bag'} --dst {tmp_path / 'old'}"
    fails(tmp_path / "old.bag", "ROS 1", command)
    fails(tmp_path, "ROS 1", command)


def test_a_lone_file_keeps_what_the_recorder_noted(tmp_path):
    path = write(tmp_path / "bag", joints(), custom=[("outcome", "success")])
    with open_bag(path / "bag.mcap") as bag:  # beside its metadata.yaml
        assert bag.custom == {"outcome": "success"} and not bag.notes
    made_bags.write(tmp_path / "ours", seconds=0.5)
    copy = shutil.copy(tmp_path / "ours/ours_0.mcap", tmp_path / "lone.mcap")
    with open_bag(copy) as bag:
        assert bag.custom == {}
    with BagWriter(tmp_path / "noted", custom={"outcome": "failure"}, background=False, min_free=0) as writer:
        writer.add_topic(topic("/a", "std_msgs/msg/String"))
        writer.write(
            "/a", 5, bytes(STORE.serialize_cdr(STORE.types["std_msgs/msg/String"]("x"), "std_msgs/msg/String"))
        )
    with open_bag(shutil.copy(tmp_path / "noted/noted_0.mcap", tmp_path / "lone2.mcap")) as bag:
        assert bag.custom == {"outcome": "failure"}


def test_type_names_of_two_parts_are_those_of_three(tmp_path):
    path = tmp_path / "bag"
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection("/joint_states", "sensor_msgs/msg/JointState", typestore=STORE)
        writer.write(connection, 7, STORE.serialize_cdr(joint_state(7), "sensor_msgs/msg/JointState"))
    file = path / "bag.mcap"
    whole = list(Scan(file))
    records = mcap_records.schema(
        mcap_records.Schema(1, "sensor_msgs/JointState", "ros2msg", whole[0].topic.definition.encode())
    ) + mcap_records.channel(mcap_records.Channel(1, 1, "/joint_states", "cdr", {}))
    data = whole[0].message.data
    records += mcap_records.message_prefix(1, 0, 7, 7, len(data)) + data
    chunk = mcap_records.chunk(records, 7, 7, "zstd", 1)
    file.write_bytes(mcap_records.MAGIC + mcap_records.header("") + chunk + mcap_records.TAIL)
    with open_bag(path) as bag:
        assert bag.topics == {"/joint_states": "sensor_msgs/msg/JointState"}
        assert bag.require("/joint_states", "sensor_msgs/msg/JointState")
        assert next(iter(bag.messages()))[2].name == ["a", "b"]


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3], ids=lambda p: p.name)
def test_a_truncated_file_is_said_to_be_truncated_wherever_it_ends(tmp_path, plugin):
    path = write(tmp_path / "bag", joints(2000), plugin=plugin)
    file = next(path.glob("bag.*"))
    whole = file.read_bytes()
    for share in (0.0, 0.001, 0.3, 0.7, 0.999):
        file.write_bytes(whole[: int(share * len(whole))])
        fails(path, file.name)


def test_a_damaged_chunk_is_one_line_after_what_came_before(tmp_path):
    path = write(tmp_path / "bag", joints(40000), mode=CompressionMode.STORAGE)
    file = path / "bag.mcap"
    data = bytearray(file.read_bytes())
    middle = data.index(b"\x28\xb5\x2f\xfd", len(data) // 2)  # the start of a zstd frame
    data[middle : middle + 64] = bytes(64)
    file.write_bytes(data)
    read, line = 0, ""
    with open_bag(path) as bag:
        try:
            for _ in bag.messages():
                read += 1
        except BagError as error:
            line = str(error)
    assert read > 1000 and "damaged" in line and "\n" not in line


def cut_short(path, cut):
    """A bag of 422 messages, those numbered in `cut` without their last 20 bytes."""
    kind = "sensor_msgs/msg/JointState"
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection("/joint_states", kind, typestore=STORE)
        for k in range(422):
            data = bytes(STORE.serialize_cdr(joint_state(k), kind))
            writer.write(connection, k, data[:-20] if k in cut else data)
    return path


def test_messages_that_are_cut_short_are_left_out_and_counted(tmp_path):
    with open_bag(cut_short(tmp_path / "bag", (7, 9))) as bag:
        for _ in range(2):  # the second pass does not count them again
            stamps = [stamp for _, stamp, _ in bag.messages()]
            assert stamps == [k for k in range(422) if k not in (7, 9)]
            (note,) = bag.notes
            assert note.startswith("/joint_states: 2 of 422 messages cannot be decoded and are left out (first: ")
            assert "/joint_states at 7: not a sensor_msgs/msg/JointState" in note


def test_a_topic_without_a_message_that_can_be_decoded_is_an_error(tmp_path):
    path = cut_short(tmp_path / "bag", range(422))
    fails(path, "/joint_states at 0", "not a sensor_msgs/msg/JointState", "all 422 messages")


def test_a_type_that_the_bag_defines_otherwise_is_refused(tmp_path):
    path = tmp_path / "bag"
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        kind = "sensor_msgs/msg/JointState"
        connection = writer.add_connection("/joint_states", kind, msgdef="float64[] position", rihs01="RIHS01_0")
        writer.write(connection, 7, STORE.serialize_cdr(joint_state(7), kind))
    fails(path, "/joint_states", "other fields")
    with open_bag(path) as bag:
        assert bag.readable() == []


def test_an_unknown_type_is_refused_where_it_is_asked_for(tmp_path):
    path = tmp_path / "bag"
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection("/joint_states", "mine/msg/New", msgdef="uint8 x", rihs01="RIHS01_0")
        writer.write(connection, 7, b"\x00\x01\x00\x00\x05")
    fails(path, "mine/msg/New")


def test_require_names_what_is_there(tmp_path):
    with open_bag(write(tmp_path / "bag", joints())) as bag:
        assert bag.require("/joint_states", "sensor_msgs/msg/JointState")
        with pytest.raises(BagError, match="did you mean /joint_states"):
            bag.require("/joint_state")
        with pytest.raises(BagError, match="is sensor_msgs/msg/JointState, needed is sensor_msgs/msg/Image"):
            bag.require("/joint_states", "sensor_msgs/msg/Image")

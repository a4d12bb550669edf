"""Recordings that are broken or unusual: one clear line and a status, or a result that says what it lacks."""

from __future__ import annotations

import json
import random
import sqlite3
import time

import numpy as np
import pytest
import replay_support as support
from rosbags.interfaces import Connection, ConnectionExtRosbag2, MessageDefinition, MessageDefinitionFormat
from rosbags.rosbag2 import StoragePlugin, Writer

from vla_nodes.replay.cli import main
from vla_nodes.rosbag.read import open_bag

STRING = "std_msgs/msg/String"
STAMPED = [support.COLOR, support.DEPTH, support.INFO, support.JOINTS]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return support.write_checkpoint(tmp_path_factory.mktemp("broken") / "policy")


def run(policy, bag, out, *arguments):
    return main([str(bag), "--checkpoint", str(policy), "--engine", "torch", "--out", str(out), *arguments])


def refused(policy, capsys, bag, *words, arguments=()):
    assert run(policy, bag, bag.parent / "out", *arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("vla_nodes replay: ") and line.count("\n") == 1 and len(line) < 500
    for word in words:
        assert word in line, line
    assert not (bag.parent / "out").exists()


def report(bag):
    return json.loads((bag.parent / "out/report.json").read_text())


def short(change=None, **kwargs):
    """The first 0.8 s, changed."""
    rows = [row for row in support.recording() if row[2] < support.EPOCH + 800_000_000]
    return rows if change is None else [new for row in rows for new in change(row)]


def without(topic):
    return short(lambda row: [] if row[0] == topic else [row])


@pytest.mark.parametrize(
    "topic, words",
    [
        (support.INFO, "camera_info is not in the bag, and no other topic is sensor_msgs/msg/CameraInfo; record it"),
        (support.COLOR, "color/image_raw is not in the bag"),
        (support.DEPTH, "--set policy_node.use_depth=false"),
        (support.JOINTS, "/joint_states is not in the bag"),
        ("/camera/pose", "give --camera-pose X Y Z QX QY QZ QW"),
        ("/instruction", "--instruction"),
    ],
)
def test_a_missing_input_is_named_with_the_remedy(tmp_path, policy, capsys, topic, words):
    refused(policy, capsys, support.write(tmp_path / "bag", without(topic)), words)


def test_what_is_missing_can_be_given(tmp_path, policy):
    rows = short(lambda row: [] if row[0] in ("/camera/pose", "/instruction", support.DEPTH) else [row])
    bag = support.write(tmp_path / "bag", rows)
    given = ["--instruction", "pick up the red block", "--set", "policy_node.use_depth=false"]
    pose = ["--camera-pose", *"1 0 0.8 0 1 0 0".split()]
    assert run(policy, bag, tmp_path / "out", *given, *pose) == 0
    assert report(bag)["policy"]["steps"] >= 6 and report(bag)["settings"]["instruction"] == "pick up the red block"


def test_an_input_of_another_type_is_refused(tmp_path, policy, capsys):
    def change(row):
        return [(row[0], STRING, row[2], support.text("x"))] if row[0] == support.COLOR else [row]

    bag = support.write(tmp_path / "bag", short(change))
    refused(policy, capsys, bag, "/camera/color/image_raw is std_msgs/msg/String", "sensor_msgs/msg/Image")


def test_remaps_and_namespaces(tmp_path, policy, capsys):
    rows = short(lambda row: [("/left" + row[0], *row[1:])])
    bag = support.write(tmp_path / "bag", rows)
    refused(policy, capsys, bag, "is not in the bag")
    assert run(policy, bag, tmp_path / "out", "--namespace", "left") == 0
    rows = short(lambda row: [("/front/rgb" if row[0] == support.COLOR else row[0], *row[1:])])
    bag = support.write(tmp_path / "second/bag", rows)
    assert run(policy, bag, tmp_path / "second/out", "--remap", "camera/color/image_raw:=/front/rgb") == 0
    refused(policy, capsys, support.write(tmp_path / "third/bag", rows), "no topic /front/rbg: did you mean /front/rgb",
            arguments=["--remap", "camera/color/image_raw:=/front/rbg"])  # fmt: skip
    refused(policy, capsys, support.write(tmp_path / "fourth/bag", rows), "is not TOPIC:=BAG_TOPIC",
            arguments=["--remap", "nonsense"])  # fmt: skip


def restamped(row, offset, zero=False):
    """The row with its header moved by `offset` ns, received as before."""
    topic, kind, received, message = row
    if not hasattr(message, "header"):
        return row
    raw = support.STORE.deserialize_cdr(support.STORE.serialize_cdr(message, kind), kind)
    ns = 0 if zero else raw.header.stamp.sec * 10**9 + raw.header.stamp.nanosec + offset
    raw.header.stamp.sec, raw.header.stamp.nanosec = ns // 10**9, ns % 10**9
    return (topic, kind, received, raw)


@pytest.mark.parametrize("topics", [[t] for t in STAMPED] + [STAMPED], ids=lambda t: t[0] if len(t) == 1 else "all")
def test_messages_without_stamps_are_refused(tmp_path, policy, capsys, topics):
    bag = support.write(tmp_path / "bag", short(lambda row: [restamped(row, 0, zero=row[0] in topics)]))
    refused(policy, capsys, bag, f"{', '.join(topics)}: header stamps are 0")


@pytest.mark.parametrize("received", [0, support.EPOCH - 3600 * 10**9])
def test_a_recorder_whose_clock_was_wrong_goes_by_the_stamps(tmp_path, policy, received):
    rows = [(*row[:2], received + (row[2] - support.EPOCH if received else 0), row[3]) for row in short()]
    assert run(policy, support.write(tmp_path / "bag", rows), tmp_path / "out") == 0
    made = report(tmp_path / "bag")
    assert made["settings"]["clock"] == "header" and made["policy"]["steps"] >= 6 and made["duration_s"] < 1.0


def test_frames_of_one_stamp_are_one_frame(tmp_path, policy):
    def change(row):
        if row[0] not in STAMPED:
            return [row]
        stamp = row[3].header.stamp
        return [restamped(row, support.EPOCH + 10**7 - (stamp.sec * 10**9 + stamp.nanosec))]

    bag = support.write(tmp_path / "bag", short(change))
    assert run(policy, bag, tmp_path / "out") == 0
    made = report(bag)
    assert made["policy"]["steps"] == 1 and sum(made["frames"]["dropped"].values()) > 40


def test_every_message_twice_is_every_message_once(tmp_path, policy):
    once, twice = (support.write(tmp_path / name / "bag", rows) for name, rows in
                   (("once", short()), ("twice", short(lambda row: [row, row]))))  # fmt: skip
    assert run(policy, once, tmp_path / "once/out") == run(policy, twice, tmp_path / "twice/out") == 0
    assert report(once)["policy"] == report(twice)["policy"]
    assert report(twice)["frames"]["dropped"]["color: stamp repeated"] >= report(once)["messages"]["color"]


def test_depth_in_millimetres_is_depth_in_metres(tmp_path, policy):
    def change(row):
        if row[0] != support.DEPTH:
            return [row]
        m = row[3]
        depth = np.rint(m.data.view("<f4").reshape(m.height, m.width) * 1000).astype(np.uint16)
        ns = m.header.stamp.sec * 10**9 + m.header.stamp.nanosec
        return [(*row[:3], support.image(depth, "16UC1", ns))]

    metres, millimetres = support.write(tmp_path / "m/bag", short()), support.write(tmp_path / "mm/bag", short(change))
    assert run(policy, metres, tmp_path / "m/out") == run(policy, millimetres, tmp_path / "mm/out") == 0
    assert report(metres)["policy"] == report(millimetres)["policy"]
    actions = [[m.actions for _, _, m in open_bag(tmp_path / f"{name}/out/bag").messages(["/replay/vla/action_chunk"])]
               for name in ("m", "mm")]  # fmt: skip
    assert len(actions[0]) > 4 and np.abs(np.array(actions[0]) - np.array(actions[1])).max() < 1e-4


@pytest.mark.parametrize("topic, encoding", [(support.DEPTH, "rgb8"), (support.COLOR, "bayer_rggb8")])
def test_images_that_cannot_be_decoded_are_said_to_be(tmp_path, policy, capsys, topic, encoding):
    def change(row):
        m = row[3]
        same = {name: getattr(m, name) for name in ("header", "height", "width", "is_bigendian", "step", "data")} \
            if row[0] == topic else {}  # fmt: skip
        return [(*row[:3], support.make("sensor_msgs/msg/Image", encoding=encoding, **same))] if same else [row]

    bag = support.write(tmp_path / "bag", short(change))
    assert run(policy, bag, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and f"every policy step failed: encoding '{encoding}'" in said.err
    assert sum(line.startswith("problem") and encoding in line for line in said.out.splitlines()) == 1


def test_a_simulated_recording_without_clock_goes_by_its_stamps(tmp_path, policy):
    bag = support.write(tmp_path / "bag", short(lambda row: [restamped(row, -support.EPOCH)]))
    assert run(policy, bag, tmp_path / "out") == 0
    made = report(bag)
    assert made["settings"]["clock"] == "header" and any("no /clock" in note for note in made["notes"])
    assert made["policy"]["steps"] >= 6


def test_a_simulated_recording_with_clock_goes_by_it(tmp_path, policy):
    kind = "rosgraph_msgs/msg/Clock"

    def change(row):
        rows = [restamped(row, -support.EPOCH)]
        if row[0] == support.JOINTS:
            stamp = rows[0][3].header.stamp
            rows.insert(0, ("/clock", kind, row[2] - 10, support.make(kind, clock=stamp)))
        return rows

    bag = support.write(tmp_path / "bag", short(change))
    assert run(policy, bag, tmp_path / "out") == 0
    made = report(bag)
    assert made["settings"]["clock"] == "topic" and made["policy"]["steps"] >= 6 and made["duration_s"] < 1.0


def test_a_clock_set_back_begins_anew(tmp_path, policy):
    kind = "rosgraph_msgs/msg/Clock"

    def change(row):
        late = row[2] > support.EPOCH + 500_000_000
        new = restamped(row, -support.EPOCH - (400_000_000 if late else 0))
        if row[0] != support.JOINTS:
            return [new]
        return [("/clock", kind, row[2] - 10, support.make(kind, clock=new[3].header.stamp)), new]

    bag = support.write(tmp_path / "bag", short(change))
    assert run(policy, bag, tmp_path / "out") == 0
    made = report(bag)
    assert made["frames"]["clock_set_back"] == 1 and any("set back" in text for text in made["problems"])
    assert made["policy"]["steps"] >= 4


def test_messages_out_of_order_are_counted_and_do_no_harm(tmp_path, policy):
    rows, generator = short(), random.Random(0)
    moved = sorted(rows, key=lambda row: row[2] + generator.randrange(0, 60_000_000))
    times = sorted(row[2] for row in rows)
    shuffled = [(row[0], row[1], t, row[3]) for row, t in zip(moved, times, strict=True)]
    bag = support.write(tmp_path / "bag", shuffled)
    assert run(policy, bag, tmp_path / "out") == 0
    made = report(bag)
    assert made["policy"]["steps"] >= 4 and made["complete"]
    assert made["frames"]["dropped"]["joints: out of order"] > 0


def test_joints_of_another_robot_are_a_result_that_says_so(tmp_path, policy, capsys):
    def change(row):
        if row[0] != support.JOINTS:
            return [row]
        m = row[3]
        names = [f"other_{k}" for k in range(8)]
        return [(*row[:3], support.joint_state(names, m.position, m.velocity, m.header.stamp.sec * 10**9 + 1))]

    bag = support.write(tmp_path / "bag", short(change))
    assert run(policy, bag, tmp_path / "out") == 1
    assert "no policy step was taken: joint_states lacks panda_joint1" in capsys.readouterr().err
    assert report(bag)["frames"]["joint_states_unusable"] > 10


def test_a_camera_info_of_another_size_holds_and_says_why(tmp_path, policy):
    def change(row):
        if row[0] != support.INFO:
            return [row]
        stamp = row[3].header.stamp
        return [(*row[:3], support.info(row[3].k.reshape(3, 3), 640, 480, stamp.sec * 10**9 + stamp.nanosec))]

    bag = support.write(tmp_path / "bag", short(change))
    assert run(policy, bag, tmp_path / "out") == 1
    made = report(bag)
    assert "640x480" in made["nothing_done"] and made["policy"]["chunks"] == 0


def test_a_truncated_recording_names_the_repair(tmp_path, policy, capsys):
    bag = support.write(tmp_path / "bag", short())
    file = bag / "bag.mcap"
    file.write_bytes(file.read_bytes()[:-200])
    refused(policy, capsys, bag, "truncated", "record --repair")


def test_a_truncated_database_is_said_to_be(tmp_path, policy, capsys):
    file = support.write(tmp_path / "bag", short(), StoragePlugin.SQLITE3) / "bag.db3"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(policy, capsys, tmp_path / "bag", "bag.db3: truncated or damaged", ".recover")


def test_a_recording_that_ends_in_damage_gives_what_came_before(tmp_path, policy, capsys):
    bag = support.write(tmp_path / "bag", support.recording())
    file = bag / "bag.mcap"
    data = bytearray(file.read_bytes())
    middle = data.index(b"\x28\xb5\x2f\xfd", len(data) // 3)
    data[middle : middle + 64] = bytes(64)
    file.write_bytes(data)
    assert run(policy, bag, tmp_path / "out") == 1
    made = report(bag)
    assert not made["complete"] and "damaged" in made["ended"] and 0 < made["messages"]["color"] < 40
    assert "damaged" in capsys.readouterr().err
    with open_bag(tmp_path / "out/bag") as results:
        assert results.counts["/joint_states"] == made["messages"]["joints"]


def test_ten_thousand_topics_in_sqlite3(tmp_path, policy):
    bag = support.write(tmp_path / "bag", short(), StoragePlugin.SQLITE3)
    with sqlite3.connect(bag / "bag.db3") as database:
        rows = [(100 + k, f"/extra/t{k:05d}", STRING, "cdr", "", "") for k in range(10_000)]
        database.executemany("INSERT INTO topics VALUES(?, ?, ?, ?, ?, ?)", rows)
        stamps = [(100 + k, support.EPOCH + k, b"\x00\x01\x00\x00\x02\x00\x00\x00x\x00") for k in range(10_000)]
        database.executemany("INSERT INTO messages (topic_id, timestamp, data) VALUES(?, ?, ?)", stamps)
    crowded(policy, bag, tmp_path)


def test_ten_thousand_topics_in_mcap(tmp_path, policy):
    with Writer(tmp_path / "bag", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for topic, kind, received, message in short():
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=support.STORE)
            writer.write(connections[topic], received, support.STORE.serialize_cdr(message, kind))
        for k in range(10_000):  # Writer.add_connection looks through all others: the storage is asked directly
            none, ext = MessageDefinition(MessageDefinitionFormat.NONE, ""), ConnectionExtRosbag2("cdr", [])
            extra = Connection(100 + k, f"/extra/t{k:05d}", STRING, none, "", 0, ext, writer)
            writer.storage.add_connection(extra, "")
            writer.storage.write(extra, support.EPOCH + k, b"\x00\x01\x00\x00\x02\x00\x00\x00x\x00")
    crowded(policy, tmp_path / "bag", tmp_path)


def crowded(policy, bag, folder):
    begin = time.process_time()
    assert run(policy, bag, folder / "out") == 0
    assert report(bag)["policy"]["steps"] >= 6
    assert time.process_time() - begin < 30
    with open_bag(bag) as opened, open_bag(folder / "out/bag") as results:
        assert len(opened.topics) > 10_000 and len(results.topics) < 100


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "policy_node.slopp=1"], "no parameter 'slopp': slop?"),
        (["--set", "policy_node.slop=wide"], "must be float"),
        (["--set", "action_node.velocity_scale=nan"], "velocity_scale"),
        (["--set", "slop=1"], "NODE.PARAMETER=VALUE"),
        (["--set", "policy_node.camera_pose_source=tf"], "neither /tf nor /tf_static is in the bag"),
        (["--camera-pose", "0", "0", "0", "0", "0", "0", "0"], "quaternion"),
        (["--instruction", "x" * 1000], "instruction refused"),
        (["--latency", "-1"], "--latency"),
        (["--update"], "--golden"),
        (["--clock", "topic"], "no /clock"),
        (["--params", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, policy, capsys, arguments, words):
    refused(policy, capsys, support.write(tmp_path / "bag", short()), words, arguments=arguments)


def test_a_checkpoint_that_is_none_is_one_line(tmp_path, capsys):
    bag = support.write(tmp_path / "bag", short())
    refused(tmp_path / "nothing", capsys, bag, "nothing")


def test_results_never_overwrite_another_bag(tmp_path, policy, capsys):
    bag = support.write(tmp_path / "bag", short())
    (tmp_path / "out/bag").mkdir(parents=True)
    (tmp_path / "out/bag/precious.txt").write_text("x")
    assert run(policy, bag, tmp_path / "out") == 2
    assert "name another --out" in capsys.readouterr().err and (tmp_path / "out/bag/precious.txt").exists()
    assert run(policy, bag, tmp_path) == 2  # report/bag would be the recording itself
    assert (bag / "bag.mcap").exists()

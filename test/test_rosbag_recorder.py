"""Recordings that survive what ends them: SIGKILL, a full disk, damage; and the repair of those that did not."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soak
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rosbags.rosbag2 import Reader

from vla_nodes.nodes.record import main as record
from vla_nodes.rosbag import mcap_records, metadata, write
from vla_nodes.rosbag.append_file import LiveFile
from vla_nodes.rosbag.message_definitions import definition, topic
from vla_nodes.rosbag.metadata import Qos, Topic
from vla_nodes.rosbag.read import open_bag, typestore
from vla_nodes.rosbag.recorder import Recording, RecordingError
from vla_nodes.rosbag.repair import RepairError, Scan, repair
from vla_nodes.rosbag.write import BagWriter

KILLS = soak.amount(4, 20)
"""Times that the recorder is killed."""
TEXT = "std_msgs/msg/String"


def text(value: str) -> bytes:
    store = typestore()
    return bytes(store.serialize_cdr(store.types[TEXT](data=value), TEXT))


def messages(path: Path) -> list[tuple[str, int, bytes]]:
    """As an independent library reads them, from the folder."""
    with Reader(path) as reader:
        return [(c.topic, t, bytes(data)) for c, t, data in reader.messages()]


def small_bag(folder: Path, count: int = 60, **options) -> list[tuple[str, int, bytes]]:
    """A finished bag of several chunks; returns what was written."""
    rng = np.random.default_rng(1)
    wrote = []
    with BagWriter(folder, **{"background": False, "chunk_bytes": 2000, "min_free": 0, **options}) as bag:
        for name in ("/a", "/b"):
            bag.add_topic(topic(name, TEXT))
        for k in range(count):
            data = text(f"{k} " + rng.bytes(40).hex())
            wrote.append((("/a", "/b")[k % 2], 1_000_000_000 + k * 1_000_000, data))
            assert bag.write(*wrote[-1])
    return wrote


# -- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", mcap_records.COMPRESSIONS)
def test_what_is_written_is_read_by_others(tmp_path, compression):
    wrote = small_bag(tmp_path / "bag", compression=compression, custom={"instruction": "pick up the red block"})
    assert messages(tmp_path / "bag") == wrote
    assert messages(tmp_path / "bag/bag_0.mcap") == wrote
    with open_bag(tmp_path / "bag") as bag:
        assert list(bag.raw()) == wrote
        assert bag.custom == {"instruction": "pick up the red block"} and not bag.notes
        assert next(iter(bag.messages()))[2].data.startswith("0 ")
    with Reader(tmp_path / "bag") as reader:
        assert reader.message_count == 60 and reader.duration == 59_000_001
        assert {c.digest for c in reader.connections} == {definition(TEXT)[1]}


def test_an_independent_reader_checks_every_checksum(tmp_path):
    reader = pytest.importorskip("mcap.reader", reason="the mcap package is not installed: tools/setup --tests")
    wrote = small_bag(tmp_path / "bag")
    with open(tmp_path / "bag/bag_0.mcap", "rb") as file:
        opened = reader.make_reader(file, validate_crcs=True)
        assert [(c.topic, m.log_time, m.data) for _, c, m in opened.iter_messages()] == wrote
        summary = opened.get_summary()
        assert summary.statistics.message_count == 60
        assert len(summary.chunk_indexes) == summary.statistics.chunk_count > 3
        assert [m.name for m in opened.iter_metadata()] == ["rosbag2"]


def test_the_file_is_complete_after_every_single_write(tmp_path, monkeypatch):
    """A kill comes between two system calls; after each of them the file is opened by an independent library."""
    states: list[int] = []
    path = tmp_path / "bag/bag_0.mcap"
    original, committed = os.pwrite, [0]

    def pwrite(fd, data, at):
        done = original(fd, data, at)
        copy = tmp_path / f"state{len(states)}.mcap"
        shutil.copyfile(path, copy)
        states.append(committed[0])
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)
    append = LiveFile.append
    monkeypatch.setattr(
        LiveFile, "append", lambda self, data: (append(self, data), committed.append(committed.pop() + 1))
    )
    monkeypatch.setattr(write, "LiveFile", lambda p, library: LiveFile(p, library, 3000))
    wrote = small_bag(tmp_path / "bag", 40, chunk_bytes=600)
    assert len(states) > 20 and committed[0] > 5
    chunk_ends = _chunk_ends(path)
    for number, done in enumerate(states):
        got = messages(tmp_path / f"state{number}.mcap")
        least = chunk_ends[min(done, len(chunk_ends)) - 1] if done else 0
        assert got == wrote[: len(got)] and len(got) >= least
        scan = Scan(tmp_path / f"state{number}.mcap")
        assert len(list(scan)) == len(got) and scan.found.complete and not scan.found.damage


def _chunk_ends(path: Path) -> list[int]:
    """Messages up to the end of each chunk."""
    ends, total = [], 0
    with open(path, "rb") as file:
        data = file.read()
    for opcode, content in mcap_records.records_in(data[len(mcap_records.MAGIC) :]):
        if opcode == mcap_records.CHUNK:
            head = mcap_records.read_chunk_head(bytes(content[:64]))
            inner = mcap_records.decompress_prefix(bytes(content[head.offset :]), head.compression, head.size)
            total += sum(opcode == mcap_records.MESSAGE for opcode, _ in mcap_records.records_in(inner))
            ends.append(total)
        elif opcode == mcap_records.DATA_END:
            break
    return ends


def _record_forever(folder: Path, written, began) -> None:
    """30 Hz RGB-D, until killed."""
    rng = np.random.default_rng(0)
    color = rng.integers(0, 255, 240 * 320 * 3, np.uint8)
    depth = rng.integers(0, 4000, 240 * 320, np.uint16)
    bag = BagWriter(folder, min_free=0)
    for name in ("/color", "/depth"):
        bag.add_topic(Topic(name, "sensor_msgs/msg/Image", *definition("sensor_msgs/msg/Image")))
    began.value = start = time.monotonic_ns()
    for k in range(10_000):
        while (left := start + k * 33_333_333 - time.monotonic_ns()) > 0:
            time.sleep(left * 1e-9)
        now = time.monotonic_ns()
        bag.write("/color", now, np.roll(color, 7 * k).tobytes())
        bag.write("/depth", now, np.roll(depth, 3 * k).tobytes())
        written.value = now


def _starved(process: int) -> list[int]:
    """ns that each thread was ready to run and got no processor so far."""
    files = sorted(Path(f"/proc/{process}/task").glob("*/schedstat"), key=lambda file: int(file.parent.name))
    return [int(file.read_text().split()[1]) for file in files]


def test_killed_at_random_moments(tmp_path):
    """Every file opens as it is, and at most the last second is missing of what the recorder was given.

    On a machine that is busy with other things, besides the time in that second that the recorder waited for a
    processor: so the kernel counts it, and on a quiet machine it is a few ms.
    """
    context = multiprocessing.get_context("fork")
    definition("sensor_msgs/msg/Image")
    chance = random.Random(0)
    losses, waits = [], []
    for number in range(KILLS):
        written, began = (context.Value("q", 0, lock=False) for _ in range(2))
        folder = tmp_path / f"bag{number}"
        process = context.Process(target=_record_forever, args=(folder, written, began))
        process.start()
        while not began.value:
            time.sleep(0.005)
        alive = chance.uniform(0.1, 2.5)
        time.sleep(max(0.0, alive - 1.0))
        before = _starved(process.pid)
        time.sleep(min(alive, 1.0))
        waits.append(1e-9 * max(b - a for a, b in zip(before, _starved(process.pid), strict=True)))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with Reader(folder) as reader:
            got = [(c.topic, t) for c, t, _ in reader.messages()]
        last = got[-1][1] if got else began.value
        losses.append((written.value - last) * 1e-9)
        if got:
            with open_bag(folder) as bag:
                assert len(list(bag.raw())) == len(got)
            stamps = [t for name, t in got if name == "/color"]
            assert len(stamps) >= len(got) // 2 and stamps == sorted(stamps)
        shutil.rmtree(folder)
    print(
        f"{KILLS} kills, {KILLS} files open: lost {max(losses):.2f} s at most, {np.mean(losses):.2f} s on average; "
        f"waited {max(waits):.2f} s for a processor"
    )
    assert all(loss <= 1.0 + wait for loss, wait in zip(losses, waits, strict=True))


# -- a full disk, a slow disk --------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_recording_and_keeps_what_was_flushed(tmp_path, monkeypatch):
    room = [12_000]
    original = os.pwrite

    def pwrite(fd, data, at):
        if len(data) > 200:
            if room[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[: room[0]]  # a disk takes what still fits, and refuses then
            room[0] -= len(data)
        return original(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    bag = BagWriter(tmp_path / "bag", background=False, chunk_bytes=2000, min_free=0, compression="none")
    bag.add_topic(topic("/a", TEXT))
    wrote = []
    for k in range(400):
        data = text(f"{k} " + "x" * 60)
        if not bag.write("/a", k + 1, data):
            break
        wrote.append(data)
    assert "the disk is full" in bag.error and "\n" not in bag.error and str(bag.messages) in bag.error
    assert not bag.write("/a", 10_000, text("more"))
    bag.close()
    got = messages(tmp_path / "bag")
    assert 0 < len(got) == bag.messages < len(wrote) + 1
    assert [data for _, _, data in got] == wrote[: len(got)]


def test_space_is_left_to_others(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(write.shutil, "disk_usage", lambda folder: usage(10**9, 9 * 10**8, 10**6))
    with BagWriter(tmp_path / "bag", background=False, chunk_bytes=100, min_free=2 * 10**6) as bag:
        bag.add_topic(topic("/a", TEXT))
        bag.write("/a", 1, text("x" * 200))
        assert "the disk is full" in bag.error


def test_a_slow_disk_costs_messages_not_memory(tmp_path, monkeypatch):
    append = LiveFile.append
    monkeypatch.setattr(LiveFile, "append", lambda self, data: (time.sleep(0.05), append(self, data)))
    with BagWriter(tmp_path / "bag", chunk_bytes=10_000, backlog_bytes=60_000, min_free=0) as bag:
        bag.add_topic(topic("/a", TEXT))
        taken = sum(bag.write("/a", k + 1, text("x" * 5000)) for k in range(100))
        assert bag.dropped == 100 - taken > 0
    assert len(messages(tmp_path / "bag")) == taken == bag.messages


# -- repair --------------------------------------------------------------------------------------------------------


class Whole:
    """A bag: what was written, the file's bytes, messages up to the end of each chunk."""

    def __init__(self, wrote, data, ends):
        self.wrote, self.data, self.ends = wrote, data, ends


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "bag"
    return Whole(small_bag(folder), (folder / "bag_0.mcap").read_bytes(), _chunk_ends(folder / "bag_0.mcap"))


SLOW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(part=st.integers(0, 10**6).map(lambda n: n / 10**6))
def test_a_file_cut_anywhere_gives_what_came_before(whole, tmp_path, part):
    wrote, data = whole.wrote, whole.data
    cut = round(part * (len(data) - 1))
    file = tmp_path / "cut.mcap"
    file.write_bytes(data[:cut])
    out = tmp_path / f"out{time.monotonic_ns()}"
    try:
        folder, founds, lines = repair(file, out)
    except RepairError as error:
        assert "\n" not in str(error) and not out.exists()
        assert cut < 1500  # the first chunk's definitions are not complete yet
        return
    got = messages(folder)
    assert got == wrote[: len(got)] and founds[0].messages == len(got)
    assert len(got) >= len(wrote) * (cut / len(data)) ** 2 - 25
    assert "cut off" in "".join(lines)
    assert file.read_bytes() == data[:cut]


@SLOW
@given(places=st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 255)), min_size=1, max_size=4))
def test_damage_anywhere_is_told_and_the_rest_is_kept(whole, tmp_path, places):
    wrote, data, ends = whole.wrote, whole.data, whole.ends
    damaged = bytearray(data)
    for at, bits in places:
        damaged[at % len(data)] ^= bits
    file = tmp_path / "damaged.mcap"
    file.write_bytes(damaged)
    scan = Scan(file)
    try:
        got = [(i.topic.name, i.message.log_time, i.message.data) for i in scan]
    except RepairError:
        assert damaged[:8] != data[:8]
        return
    right = set(wrote)
    assert scan.found.damage or scan.found.unnamed or got == wrote or set(got) <= right
    lost = len(wrote) - len(right & set(got))
    largest = max(np.diff([0, *ends]))
    assert lost <= (largest + 1) * len(places)


def test_repair_of_a_bag_without_index_or_metadata(tmp_path):
    bag = BagWriter(tmp_path / "bag", min_free=0, custom={"outcome": "success"})
    bag.add_topic(topic("/a", TEXT, Qos(latched=True)))
    bag.add_metadata("robot_description", {"urdf": "<robot/>"})
    for k in range(5):
        bag.write("/a", k + 1, text(str(k)))
    bag.flush()
    # As SIGKILL would have left it, but for what the writer is renaming at this moment.
    shutil.copytree(tmp_path / "bag", tmp_path / "killed", ignore=shutil.ignore_patterns("*.partial"))
    bag.close()
    folder, _, lines = repair(tmp_path / "killed")
    assert folder == tmp_path / "killed_repaired"
    assert messages(folder) == messages(tmp_path / "bag")
    assert "no index" in "".join(lines)
    custom = metadata.read(folder)["custom_data"]
    assert custom["outcome"] == "success" and custom["repaired_from"] == "killed"
    with Reader(folder) as reader:
        assert reader.connections[0].ext.offered_qos_profiles[0].durability.name == "TRANSIENT_LOCAL"
    (tmp_path / "killed/metadata.yaml").write_text("{")
    assert messages(repair(tmp_path / "killed", tmp_path / "again")[0]) == messages(tmp_path / "bag")
    scan = Scan(folder / "killed_repaired_0.mcap")
    assert len(list(scan)) == 5 and scan.found.intact
    assert ("robot_description", {"urdf": "<robot/>"}) in scan.metadata


@pytest.mark.parametrize("text", [None, "a: [", "rosbag2_bagfile_information: {version: .inf}"])
def test_repair_writes_metadata_anew(tmp_path, capsys, text):
    wrote = small_bag(tmp_path / "bag")
    (tmp_path / "bag/metadata.yaml").unlink()
    if text is not None:
        (tmp_path / "bag/metadata.yaml").write_text(text)
    assert record(["--repair", str(tmp_path / "bag")]) == 0
    assert "metadata.yaml is written anew: " in capsys.readouterr().out
    assert messages(tmp_path / "bag_repaired") == wrote
    with open_bag(tmp_path / "bag_repaired") as bag:
        assert not bag.notes


def test_repair_says_what_it_cannot_do(tmp_path, capsys):
    small_bag(tmp_path / "good")
    assert record(["--repair", str(tmp_path / "good")]) == 0
    assert "nothing to repair" in capsys.readouterr().out and not (tmp_path / "good_repaired").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mcap").write_text("no bag at all")
    (tmp_path / "taken").mkdir()
    for bag, out, why in (
        ("nowhere", "x", "no such bag"), ("empty", "x", "no .mcap file"), ("text.mcap", "x", "not an MCAP file"),
        ("good", "taken", "exists"),
    ):  # fmt: skip
        assert record(["--repair", str(tmp_path / bag), "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1
        assert not (tmp_path / "x").exists()


# -- episodes ------------------------------------------------------------------------------------------------------


def test_episodes_are_bags_with_their_outcome(tmp_path):
    said: list[str] = []
    recording = Recording(tmp_path, said.append, min_free=0)
    recording.declare(topic("/latched", TEXT, Qos(latched=True)))
    recording.declare(topic("/a", TEXT))
    recording.take("/latched", 5, text("before"))
    with pytest.raises(RecordingError, match="nothing is being recorded"):
        recording.stop()
    with pytest.raises(RecordingError, match="no episode"):
        recording.mark("success")
    recording.start()
    with pytest.raises(RecordingError, match="is being recorded"):
        recording.start()
    recording.note(instruction="pick up the red block")
    recording.take("/a", 0, text("the clock is not running"))
    recording.take("/a", 10, text("one"))
    recording.mark("success")
    recording.start()
    recording.take("/a", 20, text("two"))
    recording.restart("the clock was set back")
    recording.take("/a", 1, text("three"))
    recording.stop()
    recording.mark("failure")
    recording.start()
    recording.take("/a", 30, text("four"))
    recording.mark("discarded")
    bags = sorted(p for p in tmp_path.iterdir() if p.name != "discarded")
    assert len(bags) == 3 and len(list((tmp_path / "discarded").iterdir())) == 1
    outcomes = [metadata.read(p)["custom_data"] for p in bags]
    assert [c["outcome"] for c in outcomes] == ["success", "unmarked", "failure"]
    assert [c["ended"] for c in outcomes] == ["success", "the clock was set back", "stop"]
    assert {c["instruction"] for c in outcomes} == {"pick up the red block"}
    assert [(n, d) for n, _, d in messages(bags[0])] == [("/latched", text("before")), ("/a", text("one"))]
    assert [d for _, _, d in messages(bags[2])] == [text("before"), text("three")]
    with pytest.raises(RecordingError, match="no outcome"):
        recording.mark("perfect")


def test_a_topic_of_two_types_keeps_the_first(tmp_path):
    recording = Recording(tmp_path, print, min_free=0)
    recording.declare(topic("/a", TEXT))
    with pytest.raises(ValueError, match="/a is std_msgs/msg/String"):
        recording.declare(topic("/a", "std_msgs/msg/Bool"))


def test_types_that_are_installed_here_only(tmp_path, monkeypatch):
    folder = tmp_path / "share/odd_msgs/msg"
    folder.mkdir(parents=True)
    (folder / "Outer.msg").write_text("std_msgs/Header header\nInner[] parts  # some\nfloat64[<=3] values\n")
    (folder / "Inner.msg").write_text("string<=10 name\n")
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    definition.cache_clear()
    words, digest = definition("odd_msgs/msg/Outer")
    assert "odd_msgs/Inner" in words and "std_msgs/Header" in words and digest.startswith("RIHS01_")
    assert definition("odd_msgs/msg/Missing") == ("", "")


def test_recording_without_ros_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "rclpy", None)
    assert record(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "needs ROS 2" in error and error.count("\n") == 1

"""Recordings made to do harm: bounded memory, one line, never a traceback or a signal."""

from __future__ import annotations

import random
import sqlite3
import struct
import subprocess
import sys
import textwrap

import mcap_variants
import pytest
import soak
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from test_rosbag_variants import TEXT, rows, text

from vla_nodes.rosbag import bounds, mcap_records
from vla_nodes.rosbag.message_definitions import topic
from vla_nodes.rosbag.read import BagError, open_bag, typestore
from vla_nodes.rosbag.repair import RepairError, Scan

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MB = 1 << 20


def packed(begin: bytes, body: bytes, times: int, compression: str = "zstd") -> tuple[bytes, int]:
    """(compressed bytes, unpacked size) of `begin` and so many times `body`, never held unpacked."""
    if compression == "zstd":
        maker = zstd.ZstdCompressor(level=3)
        parts = [maker.compress(begin), *(maker.compress(body) for _ in range(times)), maker.flush()]
    else:
        import lz4.frame

        maker = lz4.frame.LZ4FrameCompressor()
        parts = [maker.begin(), maker.compress(begin), *(maker.compress(body) for _ in range(times)), maker.flush()]
    return b"".join(parts), len(begin) + len(body) * times


def chunk(data: bytes, size: int, compression: str = "zstd", times: tuple[int, int] = (1, 2)) -> bytes:
    """A chunk record that says so of itself; no checksum."""
    head = struct.pack("<QQQI", *times, size, 0) + mcap_records.string(compression) + struct.pack("<Q", len(data))
    return mcap_records.record(mcap_records.CHUNK, head + data)


def mcap(path, *chunks: bytes):
    declared = topic("/a", TEXT)
    schema = mcap_records.schema(mcap_records.Schema(1, TEXT, "ros2msg", declared.definition.encode()))
    channel = mcap_records.channel(mcap_records.Channel(1, 1, "/a", "cdr", {}))
    data = mcap_records.MAGIC + mcap_records.header("") + schema + channel
    path.write_bytes(data + b"".join(chunks) + mcap_records.TAIL)
    return path


def message(size: int, stamp: int = 1) -> bytes:
    return mcap_records.message_prefix(1, 0, stamp, stamp, size)


def filler(size: int) -> bytes:
    return mcap_records.prefix(mcap_records.PADDING, size)


def one_chunk(path):
    data, size = packed(filler(900 * MB), bytes(MB), 900)
    return mcap(path, chunk(data, size))


def one_that_lies(path):
    data, size = packed(filler(900 * MB), bytes(MB), 900)
    return mcap(path, chunk(data, 100 * MB))


def one_that_lies_in_lz4(path):
    data, size = packed(filler(600 * MB), bytes(MB), 600, "lz4")
    return mcap(path, chunk(data, 100 * MB, "lz4"))


def many_chunks(path):
    data, size = packed(message(200 * MB), bytes(MB), 200)
    return mcap(path, *[chunk(data, size)] * 8)


def overlapping(path):
    records, size = packed(message(50 * MB) + bytes(50 * MB) + message(50 * MB, 9), bytes(MB), 50)
    return mcap(path, *[chunk(records, size, times=(1, 9))] * 5)


def tiny_messages(path):
    body = (message(5) + b"\0\1\0\0\0") * 10_000
    data, size = packed(b"", body, 250 * MB // len(body))
    return mcap(path, chunk(data, size))


def tiny_records(path):
    return mcap(path, filler(0) * 5_000_000)


def definitions(path):
    chunks = []
    for k in range(20):
        name = mcap_records.string("a") + mcap_records.string("ros2msg")
        begin = struct.pack("<H", k + 2) + name + struct.pack("<I", 4 * MB)
        data, size = packed(mcap_records.prefix(mcap_records.SCHEMA, len(begin) + 4 * MB) + begin, b"#" * MB, 4)
        chunks.append(chunk(data, size))
    return mcap(path, *chunks)


def zeros_that_fit(path):
    data, size = packed(message(250 * MB), bytes(MB), 250)
    return mcap(path, chunk(data, size))


def zeros_that_fit_in_lz4(path):
    data, size = packed(message(250 * MB), bytes(MB), 250, "lz4")
    return mcap(path, chunk(data, size, "lz4"))


def tables(path, *more: str):
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE topics(id INTEGER PRIMARY KEY,name TEXT NOT NULL,type TEXT NOT NULL,"
            "serialization_format TEXT NOT NULL,offered_qos_profiles TEXT NOT NULL)"
        )
        database.execute(f"INSERT INTO topics VALUES (1, '/a', '{TEXT}', 'cdr', '')")
        for command in more:
            database.execute(command)
    return path


def endless_view(path):
    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x"
    return tables(path, f"CREATE VIEW messages AS {endless} AS id, 1 AS topic_id, x AS timestamp, x'00' AS data FROM r")


def large_column(path):
    columns = "id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, data AS (zeroblob(900000000))"
    return tables(path, f"CREATE TABLE messages({columns})", "INSERT INTO messages VALUES (1, 1, 5)")


CASES = [
    (one_chunk, "a chunk of 943718409 bytes, at most 268435456 are unpacked"),
    (one_that_lies, "unpacks to more"),
    (one_that_lies_in_lz4, "unpacks to more"),
    (many_chunks, "would unpack to more than"),
    (overlapping, "overlap in time hold more than"),
    (tiny_messages, "more than 20"),
    (tiny_records, "records"),
    (definitions, "bytes of message definitions"),
    (zeros_that_fit, "/a at 1: not a std_msgs/msg/String"),
    (zeros_that_fit_in_lz4, "/a at 1: not a std_msgs/msg/String"),
    (endless_view, "its view messages is nothing that a recording has"),
    (large_column, "too big"),
]


@pytest.mark.parametrize("make, said", CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_hostile_file_is_read_or_refused_within_one_gigabyte(tmp_path, make, said):
    """In a process of its own, whose resident memory the kernel tells in the end."""
    path = make(tmp_path / ("a.db3" if make in (endless_view, large_column) else "a.mcap"))
    assert path.stat().st_size < 50 * MB
    code = textwrap.dedent(f"""
        from pathlib import Path
        from vla_nodes.rosbag.read import BagError, open_bag
        try:
            with open_bag({str(path)!r}) as bag:
                print(sum(1 for _ in bag.messages()))
        except BagError as error:
            print(error)
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(int(peak.split()[1]) >> 10)  # not ru_maxrss, in which Linux counts the process that started this one
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    line, megabytes = done.stdout.splitlines()
    assert said in line and str(path) in line and len(line) < 500
    assert int(megabytes) < 1000, megabytes


@pytest.mark.parametrize("make, said", [(many_chunks, "far more"), (tiny_messages, "more than 20")])
def test_repair_refuses_it_too(tmp_path, make, said):
    with pytest.raises(RepairError, match=said):
        sum(1 for _ in Scan(make(tmp_path / "a.mcap")))


def test_what_a_packed_file_unpacks_to_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "most_unpacked", lambda size: 10 * MB)
    (tmp_path / "a.mcap.zstd").write_bytes(zstd.compress(bytes(20 * MB)))
    with pytest.raises(BagError, match="unpacks to more than"):
        open_bag(tmp_path)


def test_what_packed_messages_unpack_to_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "most_unpacked", lambda size: 10 * MB)
    writer = Writer(tmp_path / "bag", version=8, storage_plugin=StoragePlugin.SQLITE3)
    writer.set_compression(CompressionMode.MESSAGE, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection("/a", TEXT, typestore=typestore())
        for k in range(20):
            writer.write(connection, k, text("0" * MB))
    with open_bag(tmp_path / "bag") as bag:
        with pytest.raises(BagError, match="more than the file's size allows"):
            list(bag.raw())


# -- anything at all -----------------------------------------------------------------------------------------------
EXTREMES = [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 33, 2**63 - 1, 2**63, 2**64 - 1]
TOKENS = "[ ] { } : , - & * ! | > ' \" # % @ ? a \n \t .inf .nan ~ 1e999 0x7f &a *a <<: rosbag2 !!python".split(" ")


def wrong(random_: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them flipped, cut, moved, or taken by a number of extreme size."""
    changed = bytearray(data)
    for _ in range(random_.randrange(1, 5)):
        at = random_.randrange(len(changed)) if random_.random() < 0.7 else random_.randrange(min(200, len(changed)))
        kind = random_.randrange(5)
        if kind == 0:
            changed[at] ^= random_.randrange(1, 256)
        elif kind == 1:
            changed[at : at + 8] = struct.pack("<Q", random_.choice(EXTREMES))
        elif kind == 2:
            changed[at : at + 4] = struct.pack("<I", random_.choice(EXTREMES) & 0xFFFFFFFF)
        elif kind == 3:
            del changed[at : at + random_.randrange(1, 40)]
        else:
            changed[at:at] = changed[random_.randrange(len(changed)) :][: random_.randrange(1, 100)]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Folders of one storage file and metadata.yaml, to be spoiled."""
    folder = tmp_path_factory.mktemp("wholes")
    made = []
    for k, (no, compression) in enumerate(
        [([], "zstd"), ([], "lz4"), ([], "none"), (["noSummary"], "none"), (["noChunking"], "none"),
         (["noMessageIndex", "noChunkCRC"], "none"), (["noRepeatedSchemas"], "lz4")]
    ):  # fmt: skip
        made.append((f"{k}.mcap", mcap_variants.write(folder / f"{k}.mcap", rows(k, 60), no, compression).read_bytes()))
    with Writer(folder / "bag", version=8, storage_plugin=StoragePlugin.SQLITE3) as writer:
        connections = {}
        for declared, stamp, data in rows(0, 60):
            if declared.name not in connections:
                connections[declared.name] = writer.add_connection(declared.name, TEXT, typestore=typestore())
            writer.write(connections[declared.name], stamp, data)
    made.append(("bag.db3", (folder / "bag/bag.db3").read_bytes()))
    return made, (folder / "bag/metadata.yaml").read_text()


@pytest.mark.parametrize("part", range(10))
def test_whatever_is_wrong_is_one_line(tmp_path, wholes, part):
    made, metadata = wholes
    for k in range(soak.amount(20, 100)):
        random_ = random.Random(f"{soak.first_seed} {part} {k}")
        folder = tmp_path / str(k)
        folder.mkdir()
        name, data = random_.choice(made)
        storage = "mcap" if name.endswith("mcap") else "sqlite3"
        told = metadata.replace("sqlite3", storage).replace("bag.db3", name)
        which = random_.randrange(4)
        (folder / name).write_bytes(data if which == 0 else wrong(random_, data))
        if which == 0:
            told = wrong(random_, told.encode()).decode(errors="replace")
            at = random_.randrange(len(told))
            told = told[:at] + "".join(random_.choices(TOKENS, k=random_.randrange(1, 30))) + told[at:]
        if which != 1:
            (folder / "metadata.yaml").write_text(told)
        try:
            with open_bag(folder) as bag:
                bag.require(next(iter(bag.topics)))
                sum(1 for _ in bag.messages())
                assert all("\n" not in note for note in bag.notes)
        except BagError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        if storage == "mcap":
            try:
                sum(1 for _ in Scan(folder / name))
            except RepairError as error:
                assert "\n" not in str(error)

"""Bags laid out as rosbag2 of each distro writes them: metadata.yaml of versions 4 to 9, both storages, zstd.

The layouts are those of rosbag2's own sources: rosbag2_storage/yaml.hpp and qos.cpp (metadata.yaml),
sqlite_storage.cpp (tables), mcap_storage.cpp (channels), compression_utils (files and messages as zstd).
"""

from __future__ import annotations

import sqlite3
import sys

import pytest
import replay_support as support
from rosbags.interfaces import MessageDefinitionFormat

from vla_nodes.replay.cli import main
from vla_nodes.rosbag import mcap_records
from vla_nodes.rosbag.read import BagError, open_bag

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DISTROS = {4: "foxy", 5: "humble", 6: "rolling", 7: "iron", 8: "rolling", 9: "jazzy"}
FOREVER = {4: (2147483647, 4294967295)}
"""(s, ns) of an infinite duration, where it is not Duration.max."""
WORDS = {"history": "unknown", "reliability": "reliable", "durability": "volatile", "liveliness": "automatic"}
NUMBERS = {"history": 3, "reliability": 1, "durability": 2, "liveliness": 1}
TABLES = (
    "CREATE TABLE topics(id INTEGER PRIMARY KEY,name TEXT NOT NULL,type TEXT NOT NULL,"
    "serialization_format TEXT NOT NULL,offered_qos_profiles TEXT NOT NULL{hash});"
    "CREATE TABLE messages(id INTEGER PRIMARY KEY,topic_id INTEGER NOT NULL,timestamp INTEGER NOT NULL, "
    "data BLOB NOT NULL);CREATE INDEX timestamp_idx ON messages (timestamp ASC);"
)
SCHEMA = (
    "CREATE TABLE schema(schema_version INTEGER PRIMARY KEY,ros_distro TEXT NOT NULL);"
    "CREATE TABLE metadata(id INTEGER PRIMARY KEY,metadata_version INTEGER NOT NULL,metadata TEXT NOT NULL);"
)
DEFINITIONS = (
    "CREATE TABLE message_definitions(id INTEGER PRIMARY KEY,topic_type TEXT NOT NULL,encoding TEXT NOT NULL,"
    "encoded_message_definition TEXT NOT NULL,type_description_hash TEXT NOT NULL);"
)


def qos(version: int, indent: str = "") -> str:
    """Offered QoS as a YAML list: numbers before version 9, words since."""
    values = WORDS if version >= 9 else NUMBERS
    sec, nsec = FOREVER.get(version, (9223372036, 854775807))
    span = f"\n    sec: {sec}\n    nsec: {nsec}"
    lines = [
        f"- history: {values['history']}", "  depth: 0", f"  reliability: {values['reliability']}",
        f"  durability: {values['durability']}", f"  deadline:{span}", f"  lifespan:{span}",
        f"  liveliness: {values['liveliness']}", f"  liveliness_lease_duration:{span}",
        "  avoid_ros_namespace_conventions: false",
    ]  # fmt: skip
    return "\n".join(indent + line for line in "\n".join(lines).splitlines())


def metadata(version: int, storage: str, files: list[str], rows: list, mode: str) -> str:
    """metadata.yaml, key by key as rosbag2 prints it."""
    start, end, count = rows[0][2], rows[-1][2], len(rows)
    times = f"  duration:\n    nanoseconds: {end - start}\n  starting_time:\n    nanoseconds_since_epoch: {start}\n"
    listed = "".join(f"    - {'bag/' if version < 5 else ''}{name}\n" for name in files)
    paths = f"  relative_file_paths:\n{listed}"
    text = f"rosbag2_bagfile_information:\n  version: {version}\n  storage_identifier: {storage}\n"
    text += paths + times if version < 5 else times
    text += f"  message_count: {count}\n  topics_with_message_count:\n"
    for topic, kind in {row[0]: row[1] for row in rows}.items():
        flat = qos(version).replace("\n", "\\n")
        profiles = f"\n{qos(version, ' ' * 10)}" if version >= 9 else f' "{flat}"'
        text += f"    - topic_metadata:\n        name: {topic}\n        type: {kind}\n"
        text += "        serialization_format: cdr\n"
        text += f"        offered_qos_profiles:{profiles}\n"
        text += f"        type_description_hash: {digest(kind)}\n" if version >= 7 else ""
        text += f"      message_count: {sum(row[0] == topic for row in rows)}\n"
    text += f"  compression_format: {'zstd' if mode else chr(34) * 2}\n  compression_mode: {mode or chr(34) * 2}\n"
    text += "" if version < 5 else paths
    if version >= 5:
        text += f"  files:\n    - path: {files[0]}\n      starting_time:\n        nanoseconds_since_epoch: {start}\n"
        text += f"      duration:\n        nanoseconds: {end - start}\n      message_count: {count}\n"
    text += "  custom_data: ~\n" if version >= 6 else ""
    return text + (f"  ros_distro: {DISTROS[version]}" if version >= 8 else "")


def digest(kind: str) -> str:
    return support.STORE.hash_rihs01(kind) if kind in support.STORE.fielddefs else ""


def definition(kind: str) -> str:
    return support.STORE.generate_msgdef(kind, ros_version=2)[0] if kind in support.STORE.fielddefs else ""


def write_sqlite3(file, version: int, rows: list, encoding: str = "ros2msg") -> None:
    with sqlite3.connect(file) as database:
        database.executescript(SCHEMA if version >= 5 else "")
        database.executescript(TABLES.format(hash=",type_description_hash TEXT NOT NULL" if version >= 7 else ""))
        if version >= 7:
            database.executescript(DEFINITIONS)
        if version >= 5:
            database.execute("INSERT INTO schema VALUES (?, ?)", (4 if version >= 7 else 3, DISTROS[version]))
        topics = {row[0]: row[1] for row in rows}
        for number, (topic, kind) in enumerate(topics.items(), 1):
            values = (number, topic, kind, "cdr", qos(min(version, 8)), *((digest(kind),) if version >= 7 else ()))
            database.execute(f"INSERT INTO topics VALUES ({', '.join('?' * len(values))})", values)
        if version >= 7:
            for kind in dict.fromkeys(topics.values()):
                values = (kind, encoding if definition(kind) else "unknown", definition(kind), digest(kind))
                database.execute("INSERT INTO message_definitions VALUES (NULL, ?, ?, ?, ?)", values)
        numbers = {topic: number for number, topic in enumerate(topics, 1)}
        stored = [(numbers[topic], stamp, data) for topic, _, stamp, data in rows]
        database.executemany("INSERT INTO messages (topic_id, timestamp, data) VALUES (?, ?, ?)", stored)


def write_mcap(file, version: int, rows: list) -> None:
    """One chunk, no summary: readers scan it."""
    topics = {row[0]: row[1] for row in rows}
    kinds = list(dict.fromkeys(topics.values()))
    records = b""
    for number, kind in enumerate(kinds, 1):
        encoding = "ros2msg" if definition(kind) else "unknown"
        records += mcap_records.schema(mcap_records.Schema(number, kind, encoding, definition(kind).encode()))
    for number, (topic, kind) in enumerate(topics.items(), 1):
        values = {"offered_qos_profiles": qos(version)}
        if version >= 7:
            values["topic_type_hash"] = digest(kind)
        records += mcap_records.channel(mcap_records.Channel(number, kinds.index(kind) + 1, topic, "cdr", values))
    numbers = {topic: number for number, topic in enumerate(topics, 1)}
    for sequence, (topic, _, stamp, data) in enumerate(rows):
        records += mcap_records.message_prefix(numbers[topic], sequence, stamp, stamp, len(data)) + data
    chunk = mcap_records.chunk(records, rows[0][2], rows[-1][2], "none", 0)
    file.write_bytes(mcap_records.MAGIC + mcap_records.header("libmcap 1.1.0") + chunk + mcap_records.TAIL)


def write(folder, version: int, storage: str, rows, mode: str = ""):
    """A folder `bag` of (topic, type, stamp in ns, message). mode: "", FILE or MESSAGE."""
    rows = [(topic, kind, t, m if isinstance(m, bytes) else bytes(support.STORE.serialize_cdr(m, kind)))
            for topic, kind, t, m in rows]  # fmt: skip
    bag = folder / "bag"
    bag.mkdir(parents=True)
    stored = [(*row[:3], zstd.compress(row[3], 1)) for row in rows] if mode == "MESSAGE" else rows
    file = bag / ("bag_0.mcap" if storage == "mcap" else "bag_0.db3")
    (write_mcap if storage == "mcap" else write_sqlite3)(file, version, stored)
    name = file.name
    if mode == "FILE":
        name += ".zstd"
        (bag / name).write_bytes(zstd.compress(file.read_bytes(), 1))
        file.unlink()
    (bag / "metadata.yaml").write_text(metadata(version, storage, [name], rows, mode))
    return bag


KINDS = [
    *((version, "sqlite3", mode) for version in DISTROS for mode in ("", "FILE", "MESSAGE")),
    *((version, "mcap", mode) for version in (5, 6, 7, 8, 9) for mode in ("", "FILE")),  # its plugin came with Humble
]


@pytest.mark.parametrize("version, storage, mode", KINDS)
def test_every_version_and_storage_gives_the_messages_back(tmp_path, version, storage, mode):
    rows = [row for row in support.recording() if row[2] < support.EPOCH + 200_000_000]
    with open_bag(write(tmp_path, version, storage, rows, mode)) as bag:
        assert bag.topics == {row[0]: row[1] for row in rows} and not bag.notes
        got = [(topic, t, bytes(support.STORE.serialize_cdr(m, bag.topics[topic]))) for topic, t, m in bag.messages()]
    expected = [(topic, t, bytes(support.STORE.serialize_cdr(m, kind))) for topic, kind, t, m in rows]
    assert got == expected


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return support.write_checkpoint(tmp_path_factory.mktemp("rosbag2") / "policy")


def test_every_distros_bag_replays_to_the_same_result(tmp_path, policy):
    rows = [row for row in support.recording() if row[2] < support.EPOCH + 600_000_000]
    kinds = [(5, "sqlite3", ""), (5, "mcap", ""), (9, "sqlite3", "MESSAGE"), (9, "mcap", "FILE"), (9, "mcap", "")]
    reports = []
    for version, storage, mode in kinds:
        folder = tmp_path / f"{version}{storage}{mode}"
        bag = write(folder, version, storage, rows, mode)
        assert main([str(bag), "--checkpoint", str(policy), "--engine", "torch", "--out", str(folder / "out")]) == 0
        reports.append((folder / "out/report.json").read_text())
    assert '"steps": 0' not in reports[0] and len(set(reports)) == 1


@pytest.mark.parametrize("storage", ["sqlite3", "mcap"])
def test_topics_without_a_definition_do_no_harm(tmp_path, storage):
    """rosbag2 since Iron notes encoding "unknown" for a type whose definition it does not find, as for actions."""
    rows = [row for row in support.recording() if row[2] < support.EPOCH + 200_000_000]
    feedback = ("/move/_action/feedback", "control_msgs/action/FollowJointTrajectory_FeedbackMessage", rows[-1][2], b"")
    with open_bag(write(tmp_path, 9, storage, [*rows, feedback])) as bag:
        assert len(bag.topics) == len({row[0] for row in rows}) + 1
        assert sum(1 for _ in bag.messages()) == len(rows)
        with pytest.raises(BagError, match="no type of ROS 2 Jazzy"):
            bag.check(feedback[0])


def test_definitions_that_are_none_are_said_in_one_line(tmp_path):
    rows = [row for row in support.recording() if row[0] == support.JOINTS][:3]
    bag = write(tmp_path, 9, "sqlite3", rows)
    with sqlite3.connect(bag / "bag_0.db3") as database:
        database.execute("UPDATE message_definitions SET encoded_message_definition = '%$ no definition ]['")
    with open_bag(bag) as opened:
        assert opened._connections[support.JOINTS].msgdef.format is MessageDefinitionFormat.MSG
        with pytest.raises(BagError, match="definition in this bag cannot be read"):
            opened.check(support.JOINTS)
        assert opened.readable() == []

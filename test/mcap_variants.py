"""Writes an MCAP file with what the format and the options of rosbag2_storage_mcap let a writer leave out."""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from vla_nodes.rosbag import mcap_records as mcap
from vla_nodes.rosbag.mcap_summary import ChunkIndex
from vla_nodes.rosbag.metadata import Topic

OPTIONS = (
    "noChunkCRC", "noChunking", "noMessageIndex", "noSummary", "noRepeatedSchemas", "noRepeatedChannels",
    "noChunkIndex", "noStatistics", "noSummaryOffsets", "noMetadataIndex", "noProfile",
)  # fmt: skip
"""As rosbag2_storage_mcap names them; noProfile: as tools that know nothing of ROS write the header."""

Row = tuple[Topic, int, bytes]


def write(file: Path, rows: Sequence[Row], no: Collection[str] = (), compression: str = "zstd", per: int = 20) -> Path:
    """The messages (topic, log time in ns, data) in chunks of `per`, without what `no` names."""
    topics = list(dict.fromkeys(topic for topic, _, _ in rows))
    schemas = [mcap.schema(mcap.Schema(k, t.type, t.encoding, t.definition.encode())) for k, t in enumerate(topics, 1)]
    channels = [mcap.channel(mcap.Channel(k, k, t.name, "cdr", {})) for k, t in enumerate(topics, 1)]
    numbers = {topic: k for k, topic in enumerate(topics, 1)}
    header = mcap.record(mcap.HEADER, mcap.string("" if "noProfile" in no else "ros2") + mcap.string("test"))
    data = bytearray(mcap.MAGIC + header)
    indexes: list[ChunkIndex] = []
    told: set[int] = set()
    for at in range(0, len(rows), per):
        records, entries = bytearray(), defaultdict(list)
        for topic, stamp, content in rows[at : at + per]:
            number = numbers[topic]
            if number not in told:
                told.add(number)
                records += schemas[number - 1] + channels[number - 1]
            entries[number].append((stamp, len(records)))
            records += mcap.message_prefix(number, at, stamp, stamp, len(content)) + content
        if "noChunking" in no:
            data += records
            continue
        stamps = [stamp for _, stamp, _ in rows[at : at + per]]
        chunk = bytearray(mcap.chunk(records, min(stamps), max(stamps), compression, 1))
        if "noChunkCRC" in no:
            chunk[mcap.PREFIX + 24 : mcap.PREFIX + 28] = bytes(4)
        offset, offsets = len(data), {}
        data += chunk
        begin = len(data)
        if "noMessageIndex" not in no:
            for number, listed in entries.items():
                offsets[number] = len(data)
                data += mcap.message_index(number, listed)
        name = "" if compression == "none" else compression
        compressed = mcap.read_chunk_head(bytes(chunk[mcap.PREFIX :])).compressed
        indexes.append(
            ChunkIndex(
                min(stamps), max(stamps), offset, len(chunk), offsets, len(data) - begin, name, compressed, len(records)
            )
        )
    data += _ending(len(data), rows, numbers, schemas, channels, indexes, no)
    file.write_bytes(data)
    return file


def _ending(at, rows, numbers, schemas, channels, indexes, no) -> bytes:
    if "noSummary" in no:
        return mcap.TAIL
    counts = Counter(numbers[topic] for topic, _, _ in rows)
    stamps = [stamp for _, stamp, _ in rows]
    table = b"".join(struct.pack("<HQ", *entry) for entry in counts.items())
    fields = (len(rows), len(schemas), len(channels), 0, 0, len(indexes), min(stamps), max(stamps))
    groups = {
        "noRepeatedSchemas": b"".join(schemas),
        "noRepeatedChannels": b"".join(channels),
        "noStatistics": mcap.record(
            mcap.STATISTICS, struct.pack("<QHIIIIQQ", *fields) + struct.pack("<I", len(table)) + table
        ),
        "noChunkIndex": b"".join(index.record() for index in indexes),
    }
    summary = b"".join(group for option, group in groups.items() if option not in no)
    if not summary:
        return mcap.TAIL
    begin = at + len(mcap.data_end())
    return mcap.data_end() + summary + mcap.footer(begin) + mcap.MAGIC

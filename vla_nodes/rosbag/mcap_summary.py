"""The summary at the end of a finished MCAP file: where its chunks are and what they hold (https://mcap.dev/spec)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vla_nodes.rosbag import mcap_records as mcap


@dataclass(frozen=True)
class ChunkIndex:
    """Where a chunk stands, and where the index of each of its channels."""

    start: int
    end: int
    offset: int
    length: int
    indexes: dict[int, int]
    indexes_length: int
    compression: str
    compressed: int
    size: int

    def record(self) -> bytes:
        offsets = b"".join(struct.pack("<HQ", c, o) for c, o in self.indexes.items())
        return mcap.record(
            mcap.CHUNK_INDEX,
            struct.pack("<QQQQ", self.start, self.end, self.offset, self.length)
            + struct.pack("<I", len(offsets)) + offsets
            + struct.pack("<Q", self.indexes_length)
            + mcap.string(self.compression)
            + struct.pack("<QQ", self.compressed, self.size),
        )  # fmt: skip


@dataclass
class Summary:
    """Collects while a file is written; `ending` is what the file ends with."""

    chunks: list[ChunkIndex] = field(default_factory=list)
    metadata: list[tuple[str, int, int]] = field(default_factory=list)
    """(name, offset, length) of each metadata record"""

    def ending(
        self,
        at: int,
        schemas: Sequence[bytes],
        channels: Sequence[bytes],
        counts: Mapping[int, int],
        start: int,
        end: int,
    ) -> bytes:
        """End of data, summary, footer and magic.

        Args:
            at: offset at which they will stand.
            schemas, channels: their records.
            counts: messages of each channel id.
            start, end: ns, first and last log time.
        """
        finish = mcap.data_end()
        summary_at = at + len(finish)
        total = sum(counts.values())
        table = b"".join(struct.pack("<HQ", *entry) for entry in counts.items())
        statistics = (total, len(schemas), len(channels), 0, len(self.metadata), len(self.chunks), start, end)
        content = struct.pack("<QHIIIIQQ", *statistics) + struct.pack("<I", len(table)) + table
        groups = {
            mcap.SCHEMA: b"".join(schemas),
            mcap.CHANNEL: b"".join(channels),
            mcap.STATISTICS: mcap.record(mcap.STATISTICS, content),
            mcap.CHUNK_INDEX: b"".join(index.record() for index in self.chunks),
            mcap.METADATA_INDEX: b"".join(
                mcap.record(mcap.METADATA_INDEX, struct.pack("<QQ", offset, length) + mcap.string(name))
                for name, offset, length in self.metadata
            ),
        }
        summary, offsets = b"", b""
        for opcode, group in groups.items():
            if group:
                place = struct.pack("<BQQ", opcode, summary_at + len(summary), len(group))
                offsets += mcap.record(mcap.SUMMARY_OFFSET, place)
            summary += group
        offsets_at = summary_at + len(summary)
        crc = zlib.crc32(summary + offsets + mcap.footer(summary_at, offsets_at)[:-4])
        return b"".join((finish, summary, offsets, mcap.footer(summary_at, offsets_at, crc), mcap.MAGIC))

"""Reads MCAP recordings with or without an index, with bounded memory.

Everything that the format leaves out at a writer's choice (https://mcap.dev/spec, and the options of
rosbag2_storage_mcap) is found out by reading the file once from its beginning: the summary, its chunk and message
indexes, its repeated schemas and channels, and the chunks themselves. Messages come in the order of their log time.
What a file declares about sizes is held against `bounds` before anything is unpacked.
"""

from __future__ import annotations

import heapq
import struct
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rosbags.interfaces import Connection, ConnectionExtRosbag2, MessageDefinition, MessageDefinitionFormat

from vla_nodes.rosbag import bounds
from vla_nodes.rosbag import mcap_records as mcap

FORMATS = {
    "ros2msg": MessageDefinitionFormat.MSG,
    "ros2idl": MessageDefinitionFormat.IDL,
    "omgidl": MessageDefinitionFormat.IDL,
}
"""Of message definitions. rosbag2 since Iron writes "unknown" or "" where it does not find one."""
PROFILES = ("ros2", "")
"""Of the header; tools other than rosbag2 leave it empty."""
METADATA = "rosbag2"
"""Name of the metadata record in which rosbag2 repeats metadata.yaml."""
_FOOTER = struct.Struct("<QQI")
_MESSAGE_HEAD = struct.Struct("<BQHIQ")
_STATISTICS = struct.Struct("<QHIIIIQQ")
_COUNT = struct.Struct("<HQ")
_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_INDEX = struct.Struct("<QQQQ")


@dataclass(frozen=True)
class _Source:
    """A chunk, or all messages that stand outside of chunks, with the channels it holds (None: not known).

    start: ns, of its first message; offset: of the chunk record; size: bytes, unpacked."""

    start: int
    offset: int
    size: int
    channels: frozenset[int] | None = None


class McapFile:
    """One MCAP file. Holds no file open; iterators are independent of each other.

    connections: one for each channel, as the rosbags library describes them; message_count; start_time, end_time: ns,
    of the first message and 1 after the last; serialized_metadata: rosbag2's copy of metadata.yaml in the file, or "".
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError, McapError for what cannot be read and TooLarge for what must not, each with one line."""
        self.path = path
        self.serialized_metadata = ""
        self.start_time, self.end_time = 2**63 - 1, 0
        self._size = path.stat().st_size
        self._schemas: dict[int, mcap.Schema] = {}
        self._channels: dict[int, mcap.Channel] = {}
        self._counts: Counter[int] = Counter()
        self._sources: list[_Source] = []
        self._loose: tuple[array, array] = (array("Q"), array("Q"))  # log time and offset outside of chunks
        self._kept = 0  # bytes of schemas and channels
        with path.open("rb") as file:
            self._read_header(file)
            if not self._read_summary(file):
                self._scan(file)
        self._sources.sort(key=lambda source: (source.start, source.offset))
        self.message_count = sum(self._counts.values())
        if sum(source.size for source in self._sources) > bounds.most_unpacked(self._size):
            raise bounds.TooLarge(
                f"{self._size} bytes that would unpack to more than {bounds.most_unpacked(self._size)}"
            )
        self.connections = [self._connection(channel) for channel in self._channels.values()]

    def close(self) -> None:
        """Nothing is held open; here for the same use as a reader of the rosbags library."""

    def messages(self, connections: Collection[Connection]) -> Iterator[tuple[Connection, int, bytes]]:
        """(connection, log time in ns, bytes) by log time. Raises McapError where it is damaged, and TooLarge."""
        wanted = {connection.id: connection for connection in connections}
        sources = [s for s in self._sources if s.channels is None or not s.channels.isdisjoint(wanted)]
        heap: list[tuple[int, int, int, bytes, Iterator, int]] = []  # (log time, number of the source, ...)
        at, unpacked, budget = 0, 0, bounds.Records(self._size)
        with self.path.open("rb") as file:
            while at < len(sources) or heap:
                while at < len(sources) and (not heap or sources[at].start <= heap[0][0]):
                    source = sources[at]
                    unpacked += source.size
                    if unpacked > bounds.MAX_OPEN:
                        raise bounds.TooLarge(f"chunks that overlap in time hold more than {bounds.MAX_OPEN} bytes")
                    messages = self._messages(file, source, wanted, budget)
                    first = next(messages, None)
                    if first is None:
                        unpacked -= source.size
                    else:
                        heapq.heappush(heap, (first[0], at, *first[1:], messages, source.size))
                    at += 1
                if not heap:
                    return
                stamp, number, channel, data, messages, size = heap[0]
                following = next(messages, None)
                if following is None:
                    heapq.heappop(heap)
                    unpacked -= size
                else:
                    heapq.heapreplace(heap, (following[0], number, *following[1:], messages, size))
                yield wanted[channel], stamp, data

    # -- opening ---------------------------------------------------------------------------------------------------
    def _read_header(self, file: BinaryIO) -> None:
        begin = file.read(len(mcap.MAGIC))
        if not self._size:
            raise mcap.McapError("the file is empty, the recording was cut off")
        if begin != mcap.MAGIC:
            raise mcap.McapError("not an MCAP file")
        opcode, content = self._record(file, len(mcap.MAGIC), 1 << 16)
        if opcode != mcap.HEADER:
            raise mcap.McapError("damaged: the file does not begin with a header")
        profile = mcap.Fields(content).text()
        if profile not in PROFILES:
            raise mcap.McapError(f"an MCAP file of another robot framework (its profile is '{profile[:20]}', not ros2)")

    def _read_summary(self, file: BinaryIO) -> bool:
        """Whether the summary says all that is needed to find the messages and their types."""
        tail = mcap.PREFIX + _FOOTER.size + len(mcap.MAGIC)
        file.seek(max(0, self._size - tail))
        data = file.read(tail)
        if len(data) < tail or not data.endswith(mcap.MAGIC) or data[:1] != bytes([mcap.FOOTER]):
            raise mcap.McapError("truncated, the recording was cut off (the file does not end with a footer)")
        summary, offsets, _ = _FOOTER.unpack_from(data, mcap.PREFIX)
        if not summary:
            return False
        if not len(mcap.MAGIC) <= summary <= self._size - tail:
            raise mcap.McapError("damaged: the footer names a summary outside of the file")
        statistics, budget = None, bounds.Records(self._size)
        at = summary
        while at < self._size - tail:
            budget.take()
            opcode, content = self._record(file, at, bounds.MAX_DEFINITIONS)
            at += mcap.PREFIX + len(content)
            if opcode in (mcap.SCHEMA, mcap.CHANNEL):
                self._define(opcode, content)
            elif opcode == mcap.CHUNK_INDEX:
                self._sources.append(_read_chunk_index(content))
            elif opcode == mcap.STATISTICS:
                statistics = content
            elif opcode == mcap.METADATA_INDEX:
                self._read_metadata_index(file, content)
            elif opcode == mcap.SUMMARY_OFFSET or opcode == mcap.FOOTER:
                break
        return statistics is not None and self._is_enough(statistics)

    def _is_enough(self, statistics: bytes) -> bool:
        fields = mcap.Fields(statistics)
        total, _, _, _, _, chunks, start, end = fields.take(_STATISTICS)
        (length,) = fields.take(_U32)
        counts = dict(fields.take(_COUNT) for _ in range(min(length, len(statistics)) // _COUNT.size))
        named = all(c in self._channels and self._channels[c].schema in (0, *self._schemas) for c in counts)
        if (
            not total
            or not chunks
            or chunks != len(self._sources)
            or sum(counts.values()) != total
            or not named
            or start > end
        ):
            return False
        self._counts.update(counts)
        self.start_time, self.end_time = start, end + 1
        return True

    def _read_metadata_index(self, file: BinaryIO, content: bytes) -> None:
        fields = mcap.Fields(content)
        (offset,), _ = fields.take(_U64), fields.take(_U64)
        if fields.text() == METADATA:
            opcode, record = self._record(file, offset, bounds.MAX_DEFINITIONS)
            if opcode == mcap.METADATA:
                self._read_metadata(record)

    def _read_metadata(self, content: bytes) -> None:
        if content.startswith(mcap.string(METADATA)):
            self.serialized_metadata = mcap.read_metadata(content)[1].get("serialized_metadata", "")

    def _scan(self, file: BinaryIO) -> None:
        """Read the whole file once; every record of it is looked at, one chunk at a time."""
        self._sources, self._counts, budget = [], Counter(), bounds.Records(self._size)
        at, unpacked = len(mcap.MAGIC), 0
        while at < self._size:
            budget.take()
            opcode, length = self._prefix(file, at)
            if opcode in (mcap.DATA_END, mcap.FOOTER):
                break
            if opcode == mcap.CHUNK:
                head = self._chunk_head(file, at)
                unpacked += head.size
                if unpacked > bounds.most_unpacked(self._size):
                    raise bounds.TooLarge(f"{self._size} bytes that would unpack to more than {unpacked}")
                self._sources.append(self._scan_chunk(file, at, head, budget))
            elif opcode == mcap.MESSAGE:
                if length < mcap.MESSAGE_HEAD:
                    raise mcap.McapError(f"damaged: a message of {length} bytes at byte {at}")
                channel, _, log_time = _MESSAGE_HEAD.unpack(mcap.prefix(opcode, length) + self._at(file, 14))[2:]
                self._count(channel, log_time)
                self._loose[0].append(log_time)
                self._loose[1].append(at)
            elif opcode in (mcap.SCHEMA, mcap.CHANNEL):
                self._define(opcode, self._record(file, at, bounds.MAX_DEFINITIONS)[1])
            elif opcode == mcap.METADATA and length <= bounds.MAX_DEFINITIONS:
                self._read_metadata(self._record(file, at, bounds.MAX_DEFINITIONS)[1])
            at += mcap.PREFIX + length
        if self._loose[0]:
            self._sources.append(_Source(min(self._loose[0]), 0, 0))
        if self._counts:
            self.end_time += 1

    def _scan_chunk(self, file: BinaryIO, at: int, head: mcap.ChunkHead, budget: bounds.Records) -> _Source:
        records, start, channels = self._unpack(file, at, head), 2**64 - 1, set()
        for opcode, begin, end in _records(records, budget):
            if opcode == mcap.MESSAGE:
                _, _, channel, _, log_time = _MESSAGE_HEAD.unpack_from(records, begin - mcap.PREFIX)
                self._count(channel, log_time)
                channels.add(channel)
                start = min(start, log_time)
            elif opcode in (mcap.SCHEMA, mcap.CHANNEL):
                self._define(opcode, records[begin:end])
        return _Source(start, at, head.size, frozenset(channels))

    def _count(self, channel: int, log_time: int) -> None:
        self._counts[channel] += 1
        self.start_time, self.end_time = min(self.start_time, log_time), max(self.end_time, log_time)

    def _define(self, opcode: int, content: bytes) -> None:
        known: mcap.Schema | mcap.Channel
        new: mcap.Schema | mcap.Channel
        if opcode == mcap.SCHEMA:
            new = mcap.read_schema(content)
            known = self._schemas.setdefault(new.id, new)
        else:
            fields = mcap.Fields(content)
            (number,), (schema,) = fields.take(_U16), fields.take(_U16)
            new = mcap.Channel(number, schema, fields.text(), fields.text(), {})  # its own notes are nobody's concern
            known = self._channels.setdefault(number, new)
        if known is new:
            self._kept += len(content)
            if self._kept > bounds.MAX_DEFINITIONS:
                raise bounds.TooLarge(f"more than {bounds.MAX_DEFINITIONS} bytes of message definitions")
        elif known != new:
            kind = "schema" if opcode == mcap.SCHEMA else "channel"
            raise mcap.McapError(f"damaged: {kind} {new.id} is defined twice, and not the same")

    def _connection(self, channel: mcap.Channel) -> Connection:
        schema = self._schemas.get(channel.schema, mcap.Schema(0, "__schemaless__", "", b""))
        form = FORMATS.get(schema.encoding, MessageDefinitionFormat.NONE)
        text = schema.data.decode(errors="replace") if form is not MessageDefinitionFormat.NONE else ""
        ext = ConnectionExtRosbag2(channel.encoding, [])
        count = self._counts[channel.id]
        return Connection(channel.id, channel.topic, schema.name, MessageDefinition(form, text), "", count, ext, self)

    # -- reading ---------------------------------------------------------------------------------------------------
    def _messages(
        self, file: BinaryIO, source: _Source, wanted: Collection[int], budget: bounds.Records
    ) -> Iterator[tuple[int, int, bytes]]:
        """(log time, channel, data) of one source, by log time."""
        if not source.offset:
            yield from self._loose_messages(file, wanted)
            return
        head = self._chunk_head(file, source.offset)
        if head.size > source.size:
            raise mcap.McapError(f"damaged: the chunk at byte {source.offset} is larger than its index says")
        records = self._unpack(file, source.offset, head)
        times, places = array("Q"), array("Q")
        for opcode, begin, _ in _records(records, budget):
            if opcode == mcap.MESSAGE:
                _, _, channel, _, log_time = _MESSAGE_HEAD.unpack_from(records, begin - mcap.PREFIX)
                if channel in wanted:
                    times.append(log_time)
                    places.append(begin)
        for k in _order(times):
            begin = places[k]
            _, length, channel, _, log_time = _MESSAGE_HEAD.unpack_from(records, begin - mcap.PREFIX)
            yield log_time, channel, records[begin + mcap.MESSAGE_HEAD : begin + length]

    def _loose_messages(self, file: BinaryIO, wanted: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        times, places = self._loose
        for k in _order(times):
            content = self._record(file, places[k], bounds.MAX_MESSAGE + mcap.MESSAGE_HEAD)[1]
            message = mcap.read_message(content)
            if message.channel in wanted:
                yield message.log_time, message.channel, message.data

    def _chunk_head(self, file: BinaryIO, at: int) -> mcap.ChunkHead:
        opcode, length = self._prefix(file, at)
        if opcode != mcap.CHUNK:
            raise mcap.McapError(f"damaged: no chunk at byte {at}, where the index names one")
        head = mcap.read_chunk_head(self._at(file, min(64, length)))
        if head.offset + head.compressed > length:
            raise mcap.McapError(f"damaged: the chunk at byte {at} is larger than its record")
        if head.size > bounds.MAX_CHUNK:
            raise bounds.TooLarge(f"a chunk of {head.size} bytes, at most {bounds.MAX_CHUNK} are unpacked")
        return head

    def _unpack(self, file: BinaryIO, at: int, head: mcap.ChunkHead) -> bytes:
        file.seek(at + mcap.PREFIX + head.offset)
        records = mcap.decompress(self._at(file, head.compressed), head.compression, head.size)
        if len(records) != head.size or (head.crc and zlib.crc32(records) != head.crc):
            raise mcap.McapError(f"damaged: the chunk at byte {at} does not fit its size or checksum")
        return records

    def _prefix(self, file: BinaryIO, at: int) -> tuple[int, int]:
        """(opcode, length) of the record at `at`; `file` stands at its content then."""
        file.seek(at)
        prefix = file.read(mcap.PREFIX)
        if len(prefix) < mcap.PREFIX:
            raise mcap.McapError(f"truncated: it ends inside the record at byte {at}")
        opcode, length = mcap.read_prefix(prefix)
        if at + mcap.PREFIX + length > self._size:
            raise mcap.McapError(f"truncated or damaged: the record at byte {at} reaches past the end")
        return opcode, length

    def _record(self, file: BinaryIO, at: int, most: int) -> tuple[int, bytes]:
        opcode, length = self._prefix(file, at)
        if length > most:
            raise bounds.TooLarge(f"a record of {length} bytes at byte {at}, at most {most} are read")
        return opcode, self._at(file, length)

    def _at(self, file: BinaryIO, size: int) -> bytes:
        data = file.read(size)
        if len(data) < size:
            raise mcap.McapError("truncated: it ends inside a record")
        return data


def _records(data: bytes, budget: bounds.Records) -> Iterator[tuple[int, int, int]]:
    """(opcode, begin, end) of the content of each record of an unpacked chunk."""
    at, size = 0, len(data)
    while at < size:
        budget.take()
        if at + mcap.PREFIX > size:
            raise mcap.McapError("damaged: a chunk ends inside a record")
        opcode, length = mcap.read_prefix_at(data, at)
        begin = at + mcap.PREFIX
        at = begin + length
        if at > size or (opcode == mcap.MESSAGE and length < mcap.MESSAGE_HEAD):
            raise mcap.McapError("damaged: a chunk ends inside a record")
        yield opcode, begin, at


def _order(times: array) -> Iterator[int]:
    """The places of `times` by time; equal ones as they stand."""
    if len(times) < 2:
        return iter(range(len(times)))
    values = np.frombuffer(times, np.uint64)
    if (values[1:] >= values[:-1]).all():
        return iter(range(len(times)))
    return map(int, np.argsort(values, kind="stable"))


def _read_chunk_index(content: bytes) -> _Source:
    fields = mcap.Fields(content)
    start, _, offset, _ = fields.take(_INDEX)
    offsets = fields.blob()
    channels = frozenset(channel for channel, _ in _COUNT.iter_unpack(offsets[: len(offsets) // 10 * 10]))
    fields.take(_U64)
    fields.text()
    _, size = fields.take(struct.Struct("<QQ"))
    return _Source(start, offset, size, channels or None)

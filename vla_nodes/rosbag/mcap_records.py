"""MCAP records as bytes: what the writer and the repair need of the format, and nothing else.

Format: https://mcap.dev/spec (version 0, as rosbag2 writes it). Integers are little-endian; a string is a uint32 length
and UTF-8; a record is an opcode, a uint64 length and the content. Readers skip records whose opcode they do not know.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import lz4.frame

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = b"\x89MCAP0\r\n"
HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, CHUNK_INDEX = range(0x01, 0x09)
STATISTICS, METADATA, METADATA_INDEX, SUMMARY_OFFSET, DATA_END = 0x0B, 0x0C, 0x0D, 0x0E, 0x0F
PADDING = 0x80
"""First opcode that the format leaves to applications: space that a recording in progress writes its next chunk to."""
PREFIX = 9
"""Bytes of opcode and length before a record's content."""
MESSAGE_HEAD = 22
"""Bytes of a message record's content before its data."""
COMPRESSIONS = ("zstd", "lz4", "none")

_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_PREFIX = struct.Struct("<BQ")
_MESSAGE = struct.Struct("<HIQQ")
_CHUNK = struct.Struct("<QQQI")


class McapError(ValueError):
    """Bytes that are no valid MCAP record."""


@dataclass(frozen=True)
class Schema:
    id: int
    name: str
    encoding: str
    data: bytes


@dataclass(frozen=True)
class Channel:
    id: int
    schema: int
    topic: str
    encoding: str
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Message:
    channel: int
    sequence: int
    log_time: int
    publish_time: int
    data: bytes


@dataclass(frozen=True)
class ChunkHead:
    """The fields of a chunk record before its compressed bytes."""

    start: int
    end: int
    size: int
    crc: int
    compression: str
    compressed: int
    offset: int
    """of the compressed bytes in the chunk's content"""


# -- bytes out -----------------------------------------------------------------------------------------------------


def prefix(opcode: int, length: int) -> bytes:
    return _PREFIX.pack(opcode, length)


def record(opcode: int, content: bytes) -> bytes:
    return _PREFIX.pack(opcode, len(content)) + content


def string(text: str) -> bytes:
    data = text.encode()
    return _U32.pack(len(data)) + data


def mapping(values: Mapping[str, str]) -> bytes:
    data = b"".join(string(k) + string(v) for k, v in values.items())
    return _U32.pack(len(data)) + data


def header(library: str) -> bytes:
    return record(HEADER, string("ros2") + string(library))


def schema(s: Schema) -> bytes:
    content = _U16.pack(s.id) + string(s.name) + string(s.encoding) + _U32.pack(len(s.data)) + s.data
    return record(SCHEMA, content)


def channel(c: Channel) -> bytes:
    content = _U16.pack(c.id) + _U16.pack(c.schema) + string(c.topic) + string(c.encoding) + mapping(c.metadata)
    return record(CHANNEL, content)


def message_prefix(channel_id: int, sequence: int, log_time: int, publish_time: int, size: int) -> bytes:
    """The bytes of a message record before its data. Without the data, an image is copied only once."""
    return _PREFIX.pack(MESSAGE, size + _MESSAGE.size) + _MESSAGE.pack(channel_id, sequence, log_time, publish_time)


def chunk(records: bytes | bytearray, start: int, end: int, compression: str, level: int) -> bytes:
    """A chunk record of records; `compression` is one of COMPRESSIONS."""
    data = compress(records, compression, level)
    name = "" if compression == "none" else compression
    head = _CHUNK.pack(start, end, len(records), zlib.crc32(records)) + string(name) + _U64.pack(len(data))
    return b"".join((_PREFIX.pack(CHUNK, len(head) + len(data)), head, data))


def message_index(channel_id: int, entries: Iterable[tuple[int, int]]) -> bytes:
    """entries: (log time, offset of the message record in the uncompressed chunk)."""
    data = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    return record(MESSAGE_INDEX, _U16.pack(channel_id) + _U32.pack(len(data)) + data)


def metadata(name: str, values: Mapping[str, str]) -> bytes:
    return record(METADATA, string(name) + mapping(values))


def footer(summary: int = 0, offsets: int = 0, crc: int = 0) -> bytes:
    return record(FOOTER, struct.pack("<QQI", summary, offsets, crc))


def data_end() -> bytes:
    return record(DATA_END, _U32.pack(0))


TAIL = data_end() + footer() + MAGIC
"""The shortest end of a complete file: no summary, so that readers scan it."""


# -- bytes in ------------------------------------------------------------------------------------------------------


class Fields:
    """Reads the fields of a record's content in order; McapError where it ends too early."""

    def __init__(self, data: bytes | memoryview, at: int = 0) -> None:
        self._data, self.at = data, at

    def take(self, layout: struct.Struct) -> tuple:
        try:
            values = layout.unpack_from(self._data, self.at)
        except struct.error:
            raise McapError("a record ends in the middle of a field") from None
        self.at += layout.size
        return values

    def blob(self) -> bytes:
        (size,) = self.take(_U32)
        data = bytes(self._data[self.at : self.at + size])
        if len(data) != size:
            raise McapError("a record ends in the middle of a string")
        self.at += size
        return data

    def text(self) -> str:
        try:
            return self.blob().decode()
        except UnicodeDecodeError:
            raise McapError("a string is not UTF-8") from None

    def map(self) -> dict[str, str]:
        inner = Fields(self.blob())
        values = {}
        while inner.at < len(inner._data):
            key = inner.text()
            values[key] = inner.text()
        return values


def read_prefix(data: bytes) -> tuple[int, int]:
    """(opcode, length) of the 9 bytes before a record's content."""
    return _PREFIX.unpack(data)


def read_prefix_at(data: bytes, at: int) -> tuple[int, int]:
    """The same of a record that begins at `at`; 9 bytes must be there."""
    return _PREFIX.unpack_from(data, at)


def read_schema(content: bytes) -> Schema:
    f = Fields(content)
    return Schema(f.take(_U16)[0], f.text(), f.text(), f.blob())


def read_channel(content: bytes) -> Channel:
    f = Fields(content)
    return Channel(f.take(_U16)[0], f.take(_U16)[0], f.text(), f.text(), f.map())


def read_message(content: bytes | memoryview) -> Message:
    f = Fields(content)
    return Message(*f.take(_MESSAGE), bytes(content[f.at :]))


def read_metadata(content: bytes) -> tuple[str, dict[str, str]]:
    f = Fields(content)
    return f.text(), f.map()


def read_chunk_head(content: bytes) -> ChunkHead:
    """Of the first bytes of a chunk's content (64 are enough); McapError for what no chunk begins with."""
    f = Fields(content)
    start, end, size, crc = f.take(_CHUNK)
    compression = f.text() or "none"
    (compressed,) = f.take(_U64)
    if compression not in COMPRESSIONS:
        raise McapError(f"chunk compression '{compression[:20]}' is none of {', '.join(COMPRESSIONS)}")
    return ChunkHead(start, end, size, crc, compression, compressed, f.at)


def records_in(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """(opcode, content) of the complete records at the beginning of `data`; what is cut off at its end is left out."""
    view, at = memoryview(data), 0
    while at + PREFIX <= len(data):
        opcode, length = _PREFIX.unpack_from(data, at)
        if at + PREFIX + length > len(data):
            return
        yield opcode, view[at + PREFIX : at + PREFIX + length]
        at += PREFIX + length


# -- compression ---------------------------------------------------------------------------------------------------


def compress(data: bytes | bytearray, compression: str, level: int) -> bytes:
    if compression == "zstd":
        return zstd.compress(data, level)
    if compression == "lz4":
        return lz4.frame.compress(data, compression_level=level)
    return bytes(data)


def decompress(data: bytes, compression: str, size: int) -> bytes:
    """A chunk that unpacks to `size` bytes; McapError where it does not. Never more than one byte more is unpacked."""
    if compression == "none":
        return data
    decoder = zstd.ZstdDecompressor() if compression == "zstd" else lz4.frame.LZ4FrameDecompressor()
    try:
        records = decoder.decompress(data, size + 1)
    except (zstd.ZstdError, RuntimeError, EOFError, MemoryError) as error:
        raise McapError(f"damaged: a chunk is not {compression} ({error})") from None
    if len(records) != size:
        found = "more" if len(records) > size else len(records)
        raise McapError(f"damaged: a chunk of {size} bytes unpacks to {found}")
    return records


def decompress_prefix(data: bytes, compression: str, most: int) -> bytes:
    """As many uncompressed bytes, `most` at most, as the beginning of a compressed chunk gives: all of them if it is
    whole, those of the blocks before the damage if it is not."""
    if compression == "none":
        return data[:most]
    out, step = bytearray(), 1 << 14
    # Blocks are decoded as they come: a damaged one raises and leaves what came before. A decoder that was cut off
    # simply waits for more, so nothing is to be done for a chunk whose end is missing.
    decoder = zstd.ZstdDecompressor() if compression == "zstd" else lz4.frame.LZ4FrameDecompressor()
    for at in range(0, len(data), step):
        try:
            out += decoder.decompress(data[at : at + step], most - len(out))
            while len(out) < most and not decoder.eof and not decoder.needs_input:
                out += decoder.decompress(b"", most - len(out))
        except (zstd.ZstdError, RuntimeError, EOFError):
            break
        if decoder.eof or len(out) >= most:
            break
    return bytes(out)

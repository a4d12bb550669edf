"""Recovers a damaged MCAP recording into a new bag, and says what was kept and what was lost.

The file is read from its beginning, record by record, whether it has an index or not. A chunk that is cut off, or
whose checksum does not fit, gives the messages before the damage; after one in the middle the next chunk is searched.
The original is only read. Works for every rosbag2 MCAP file, not only for our own recorder's.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vla_nodes.rosbag import bounds, metadata
from vla_nodes.rosbag import mcap_records as mcap
from vla_nodes.rosbag.folder import BagError, find
from vla_nodes.rosbag.metadata import Topic
from vla_nodes.rosbag.write import BagWriter

SEARCH = 1 << 20
"""Bytes looked through at a time for the next chunk after a damage."""


class RepairError(ValueError):
    """Nothing to recover; one line says why."""


@dataclass
class Found:
    """What a scan of one file found, kept and lost."""

    messages: int = 0
    topics: Counter[str] = field(default_factory=Counter)
    start: int = 0
    end: int = 0
    chunks: int = 0
    partial: int = 0
    """chunks of which only the beginning could be read"""
    unreadable: int = 0
    """bytes that gave nothing"""
    unnamed: int = 0
    """messages whose channel stood in the damaged part, so that nobody knows what they are"""
    damage: list[str] = field(default_factory=list)
    complete: bool = False
    """the file ends as it should"""
    indexed: bool = False
    """and has a summary"""

    @property
    def intact(self) -> bool:
        return self.complete and self.indexed and not self.damage and not self.unnamed


@dataclass(frozen=True)
class Item:
    """A message with the topic it belongs to."""

    topic: Topic
    message: mcap.Message


class Scan:
    """Iterates over the messages of an MCAP file as far as they can be read; `found` and `metadata` fill meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = Found()
        self.metadata: list[tuple[str, dict[str, str]]] = []
        self._schemas: dict[int, mcap.Schema] = {}
        self._channels: dict[int, mcap.Channel] = {}
        self._topics: dict[int, Topic] = {}

    def __iter__(self) -> Iterator[Item]:
        """Raises RepairError for what is no MCAP file at all, or unpacks to more than `bounds` allow."""
        self._size = self.path.stat().st_size
        self._records, self._left = bounds.Records(self._size), bounds.most_unpacked(self._size)
        with open(self.path, "rb") as self._file:
            if self._file.read(len(mcap.MAGIC)) != mcap.MAGIC:
                raise RepairError(f"{self.path}: not an MCAP file ({self._size} bytes)")
            tail = self._read(max(0, self._size - len(mcap.TAIL)), len(mcap.TAIL))
            self.found.complete = tail.endswith(mcap.MAGIC)
            self.found.indexed = self.found.complete and tail != mcap.TAIL
            at, self._over = len(mcap.MAGIC), False
            try:
                while at < self._size and not self._over:
                    at = yield from self._record(at)
            except bounds.TooLarge as error:
                raise RepairError(f"{self.path}: {error}") from None

    def _record(self, at: int) -> Iterator[Item]:
        """Handle the record at `at`; returns where the next is."""
        self._records.take()
        prefix = self._read(at, mcap.PREFIX)
        if len(prefix) < mcap.PREFIX:
            return self._lost(at, self._size, "the file ends inside a record")
        opcode, length = mcap.read_prefix(prefix)
        body, end = at + mcap.PREFIX, at + mcap.PREFIX + length
        if opcode in (mcap.DATA_END, mcap.FOOTER) and end <= self._size:
            self._over = True
        elif opcode == mcap.CHUNK and self._plausible(body, length):
            return (yield from self._chunk(at, body, length))
        elif opcode == mcap.CHUNK or not (0 < opcode <= mcap.DATA_END or opcode == mcap.PADDING):
            return self._resume(at)
        elif end > self._size:
            return self._resume(at)
        elif opcode != mcap.PADDING and length <= bounds.MAX_CHUNK:
            try:
                yield from self._inner(opcode, self._read(body, length))
            except mcap.McapError as error:
                return self._lost(at, end, str(error))
        return end

    def _chunk(self, at: int, body: int, length: int) -> Iterator[Item]:
        head = mcap.read_chunk_head(self._read(body, 64))
        self._left -= head.size
        if self._left < 0:
            raise bounds.TooLarge(f"{self._size} bytes that would unpack to far more")
        data = self._read(body + head.offset, head.compressed)
        records = mcap.decompress_prefix(data, head.compression, head.size)
        whole = len(records) == head.size and (not head.crc or zlib.crc32(records) == head.crc)
        end = min(body + length, self._size)
        before = self.found.messages
        for opcode, content in mcap.records_in(records):
            self._records.take()
            try:
                yield from self._inner(opcode, content)
            except mcap.McapError:
                whole = False
                break
        self.found.chunks += 1
        if whole:
            return end
        self.found.partial += 1
        cut = "is cut off" if len(data) < head.compressed else "does not fit its checksum"
        part = len(records) / max(1, head.size)
        text = f"the chunk at byte {at} {cut}: {self.found.messages - before} messages of {part:.0%} of it are kept"
        if len(data) == head.compressed:
            text += ", of which some may hold wrong bytes"
        self.found.damage.append(text)
        self.found.unreadable += round((1 - part) * (end - at))
        return end

    def _inner(self, opcode: int, content: bytes | memoryview) -> Iterator[Item]:
        if opcode == mcap.SCHEMA:
            schema = mcap.read_schema(bytes(content))
            self._schemas[schema.id] = schema
        elif opcode == mcap.CHANNEL:
            channel = mcap.read_channel(bytes(content))
            if self._channels.get(channel.id) != channel:
                self._channels[channel.id] = channel
                self._topics.pop(channel.id, None)
        elif opcode == mcap.METADATA:
            self.metadata.append(mcap.read_metadata(bytes(content)))
        elif opcode == mcap.MESSAGE:
            message = mcap.read_message(content)
            topic = self._topic(message.channel)
            if topic is None:
                self.found.unnamed += 1
                return
            found = self.found
            found.start = message.log_time if not found.messages else min(found.start, message.log_time)
            found.end = max(found.end, message.log_time)
            found.messages += 1
            found.topics[topic.name] += 1
            yield Item(topic, message)

    def _topic(self, channel_id: int) -> Topic | None:
        topic = self._topics.get(channel_id)
        channel = self._channels.get(channel_id)
        if topic is None and channel is not None:
            schema = self._schemas.get(channel.schema)
            if schema is None:
                return None
            meta = channel.metadata
            text = schema.data.decode(errors="replace")
            topic = Topic(
                channel.topic, schema.name, text, meta.get("topic_type_hash", ""),
                profiles=meta.get("offered_qos_profiles", ""), encoding=schema.encoding or "ros2msg",
            )  # fmt: skip
            self._topics[channel_id] = topic
        return topic

    def _plausible(self, body: int, length: int) -> bool:
        """Whether a chunk's own fields fit its length: 1 in 2^60 bytes of noise do."""
        try:
            head = mcap.read_chunk_head(self._read(body, 64))
        except mcap.McapError:
            return False
        return head.offset + head.compressed == length and head.start <= head.end and 0 < head.size <= bounds.MAX_CHUNK

    def _resume(self, at: int) -> int:
        """The record at `at` is damaged: where the next chunk, or the end of the data, is."""
        place, last = at + 1, at
        while place < self._size:
            data = self._read(place, SEARCH + 64)
            last = max(last, place + len(data.rstrip(b"\0")))
            for offset in self._candidates(data):
                start = place + offset
                opcode, length = mcap.read_prefix(data[offset : offset + mcap.PREFIX])
                if opcode == mcap.CHUNK and self._plausible(start + mcap.PREFIX, length):
                    return self._lost(at, start, "a damaged record")
            place += SEARCH
        rest = self._read(max(at + mcap.PREFIX, last - len(mcap.TAIL)), last)[: len(mcap.TAIL)]
        if self._read(at, 1) == bytes([mcap.PADDING]) and (last <= at + mcap.PREFIX or mcap.TAIL.endswith(rest)):
            return self._size  # the preallocated space at the end of a recording that was still being written
        self._lost(at, last, "nothing readable after a damaged record")
        return self._size

    @staticmethod
    def _candidates(data: bytes) -> Iterator[int]:
        offset = data.find(mcap.CHUNK)
        while 0 <= offset < min(SEARCH, len(data) - mcap.PREFIX):
            if data[offset + 6 : offset + 9] == b"\0\0\0":  # a chunk below 2^40 bytes
                yield offset
            offset = data.find(mcap.CHUNK, offset + 1)

    def _lost(self, at: int, end: int, why: str) -> int:
        self.found.damage.append(f"{why} at byte {at}: {end - at} bytes lost")
        self.found.unreadable += end - at
        return end

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(max(0, min(size, self._size - at)))


def repair(bag: Path, out: Path | None = None) -> tuple[Path | None, list[Found], list[str]]:
    """Recover `bag` (a rosbag2 folder or one .mcap file) into `out`, by default `<bag>_repaired` beside it.

    A bag whose files are intact is copied all the same where its metadata.yaml is missing or not as it should be: the
    copy has one.

    Returns: the new folder (None: the bag is intact and was not copied), what was found in each file, and the report.
    Raises:
        RepairError: no MCAP file there, nothing readable in it, or `out` exists.
    """
    files = _files(bag)
    name = bag.stem if bag.is_file() else bag.resolve().name
    out = out or bag.resolve().parent / f"{name}_repaired"
    if out.exists():
        raise RepairError(f"{out} exists: remove it, or name another folder with --out")
    custom, problem = _custom(bag)
    founds: list[Found] = []
    lines: list[str] = []
    writer = BagWriter(out, custom=custom, background=False, keep_times=True, min_free=0)
    try:
        for file in files:
            scan = Scan(file)
            _copy(scan, writer)
            founds.append(scan.found)
            lines += describe(file, scan.found)
        writer.set_custom(repaired_from=name, repair="; ".join(d for f in founds for d in f.damage)[:1000])
        writer.close()
        if writer.error:
            raise RepairError(writer.error)
    except BaseException:
        writer.close()
        _remove(writer)
        raise
    kept = sum(found.messages for found in founds)
    if not kept:
        _remove(writer)
        raise RepairError(f"{bag}: no message can be read: {'; '.join(lines)}")
    if bag.is_dir() and problem:
        lines.append(f"metadata.yaml is written anew: {problem}")
    elif all(found.intact for found in founds):
        _remove(writer)
        return None, founds, [*lines, f"{bag}: nothing to repair"]
    lines.append(f"kept {kept} messages of {writer.seconds:.2f} s in {out}; the original is untouched")
    return out, founds, lines


def describe(file: Path, found: Found) -> list[str]:
    """What was kept and lost of one file, in lines for the operator."""
    span = (found.end - found.start) * 1e-9
    what = f"{found.messages} messages in {found.chunks} chunks, {span:.2f} s, {len(found.topics)} topics"
    lines = [f"{file.name}: {what}"]
    lines += [f"  {text}" for text in found.damage[:20]]
    if len(found.damage) > 20:
        lines.append(f"  and {len(found.damage) - 20} more damaged places")
    if found.unnamed:
        lines.append(f"  {found.unnamed} messages lost: their topic stood in the damaged part")
    if not found.complete:
        lines.append("  the file has no end: it was cut off")
    elif not found.indexed:
        lines.append("  the file has no index: the recorder was ended before it could write one")
    elif not found.damage:
        lines.append("  nothing is damaged")
    if found.unreadable:
        lines.append(f"  lost in all: {found.unreadable} bytes")
    return lines


def _copy(scan: Scan, writer: BagWriter) -> None:
    types: dict[tuple[str, str], bool] = {}
    for item in scan:
        topic, message = item.topic, item.message
        key = (topic.name, topic.type)
        if key not in types:
            try:
                writer.add_topic(topic)
                types[key] = True
            except ValueError as error:
                scan.found.damage.append(str(error))
                types[key] = False
        if not types[key]:
            continue
        writer.write(topic.name, message.log_time, message.data, message.publish_time)
        if writer.error:
            raise RepairError(writer.error)
    for name, values in scan.metadata:
        if name != "rosbag2":  # the writer adds these itself
            writer.add_metadata(name, values)


def _files(bag: Path) -> list[Path]:
    """The MCAP files of a bag, in order: as metadata.yaml lists them, else by name."""
    if bag.is_file():
        return [bag]
    if not bag.is_dir():
        raise RepairError(f"{bag}: no such bag")
    there = sorted(bag.glob("*.mcap"), key=lambda p: (len(p.name), p.name))
    if not there:
        other = sorted(p.name for p in bag.iterdir())[:5]
        raise RepairError(f"{bag}: no .mcap file in it ({', '.join(other) or 'empty'}); only MCAP bags can be repaired")
    return there


def _custom(bag: Path) -> tuple[dict[str, str], str]:
    """What the recorder noted in metadata.yaml, and what is wrong with that file, for it is no reason to give up."""
    try:
        layout = find(bag)
    except BagError as error:
        return {}, str(error)
    return layout.custom, layout.problem or "; ".join(layout.notes)


def _remove(writer: BagWriter) -> None:
    """The folder that `repair` itself has just made, when there was nothing to put into it."""
    for file in (writer.path, writer.folder / metadata.FILE):
        file.unlink(missing_ok=True)
    writer.folder.rmdir()

"""Writes a rosbag2 folder (MCAP) of raw messages that is readable however the recording ends.

    with BagWriter(Path("recordings/one")) as bag:
        bag.add_topic(topic("/joint_states", "sensor_msgs/msg/JointState"))
        bag.write("/joint_states", stamp_ns, cdr)

Messages are gathered into a chunk, which is compressed and brought to the disk at least every `flush_period` s by a
thread of its own; `LiveFile` makes that all or nothing. So SIGKILL or a power cut costs what came since the last chunk,
and a full disk ends the recording and costs the same. Memory is bounded: what the disk cannot take in time is dropped
and counted. Every chunk repeats the schemas and channels it uses and can be read by itself when others are damaged.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vla_nodes.rosbag import mcap_records
from vla_nodes.rosbag import metadata as bag_info
from vla_nodes.rosbag.append_file import LiveFile
from vla_nodes.rosbag.mcap_summary import ChunkIndex, Summary
from vla_nodes.rosbag.metadata import Topic

LIBRARY = "vla_nodes"
INFORMATION_PERIOD = 1.0
"""s between two renewals of metadata.yaml while it records: a chunk that is due must not wait for YAML."""
LEVELS = {"zstd": 1, "lz4": 0, "none": 0}
"""Default level of each compression: the fastest, for a robot's computer has other things to do."""


@dataclass
class _Chunk:
    """Messages on their way to the disk."""

    pieces: list[bytes] = field(default_factory=list)
    index: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    size: int = 0
    payload: int = 0
    messages: int = 0
    start: int = 0
    end: int = 0
    begun: float = 0.0

    def add(self, channel: int, entry: int | None, *pieces: bytes) -> None:
        if entry is not None:
            self.index[channel].append((entry, self.size))
        for piece in pieces:
            self.pieces.append(piece)
            self.size += len(piece)


class BagWriter:
    """One recording. `write` may be called from any thread and never waits for the disk (with `background`)."""

    def __init__(
        self,
        folder: Path,
        *,
        compression: str = "zstd",
        level: int | None = None,
        flush_period: float = 0.25,
        chunk_bytes: int = 8 << 20,
        backlog_bytes: int = 256 << 20,
        min_free: int = 64 << 20,
        custom: Mapping[str, str] | None = None,
        background: bool = True,
        keep_times: bool = False,
    ) -> None:
        """
        Args:
            folder: made here; must not exist.
            compression: of chunks: zstd, lz4 or none.
            level: of that compression; None: its fastest.
            flush_period: s, longest time that a message waits before its chunk goes to the disk.
            chunk_bytes: uncompressed size at which a chunk goes to the disk earlier.
            backlog_bytes: of messages waiting for the disk; what comes on top is dropped and counted.
            min_free: bytes of the disk that are left to others; below it the recording stops as for a full disk.
            custom: key/value pairs for metadata.yaml (custom_data).
            background: False: chunks go to the disk within `write`, by size only (for rewriting a bag).
            keep_times: take log times that go back as they are. A reader needs the index then, which `close` writes.

        Raises:
            ValueError: unknown compression.
            OSError: the folder exists or cannot be made.
        """
        if compression not in mcap_records.COMPRESSIONS:
            raise ValueError(f"compression '{compression}' is none of {', '.join(mcap_records.COMPRESSIONS)}")
        self.folder = folder
        self.compression = compression
        self.level = LEVELS[compression] if level is None else level
        self.flush_period, self.chunk_bytes, self.backlog_bytes = flush_period, chunk_bytes, backlog_bytes
        self.min_free = min_free
        self.keep_times = keep_times
        self.custom = dict(custom or {})
        self.error = ""
        """why the recording ended by itself, one line, or "" """
        self.dropped = 0
        """messages not recorded, because the disk did not keep up or after the recording had ended by itself"""
        folder.mkdir(parents=True)
        self._topics: dict[str, tuple[Topic, int]] = {}
        self._schemas: dict[tuple[str, str], mcap_records.Schema] = {}
        self._records: dict[int, tuple[bytes, bytes]] = {}
        self._sequence: dict[int, int] = defaultdict(int)
        self._last_time = 0
        self._counts: dict[str, int] = defaultdict(int)
        self._start = self._end = 0
        self._summary = Summary()
        self._metadata: list[tuple[str, dict[str, str]]] = []
        self._closed = False
        self._changed, self._informed = True, 0.0
        self._chunk = _Chunk()
        self._queue: list[_Chunk] = []
        self._waiting = 0
        self._condition = threading.Condition()
        self._file = LiveFile(folder / f"{folder.name}_0.mcap", LIBRARY)
        self._write_information()
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="bag writer", daemon=True)
            self._thread.start()

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def messages(self) -> int:
        """Messages on the disk."""
        return sum(self._counts.values())

    @property
    def seconds(self) -> float:
        """From the first message on the disk to the last."""
        return (self._end - self._start) * 1e-9

    def size(self) -> int:
        """Bytes of data on the disk."""
        return self._file.end

    def add_topic(self, topic: Topic) -> None:
        """Declare a topic; again with the same type does nothing. ValueError for another type."""
        with self._condition:
            known = self._topics.get(topic.name)
            if known is not None:
                if known[0].type != topic.type:
                    raise ValueError(f"{topic.name} is {known[0].type}, and now {topic.type}: not recorded")
                return
            key = (topic.type, topic.definition)
            schema = self._schemas.get(key)
            if schema is None:
                encoding = topic.encoding if topic.definition else ""
                schema = mcap_records.Schema(len(self._schemas) + 1, topic.type, encoding, topic.definition.encode())
                self._schemas[key] = schema
            values = {"offered_qos_profiles": topic.offered(), "topic_type_hash": topic.hash}
            channel = mcap_records.Channel(len(self._topics) + 1, schema.id, topic.name, "cdr", values)
            self._topics[topic.name] = (topic, channel.id)
            self._records[channel.id] = (mcap_records.schema(schema), mcap_records.channel(channel))
            self._changed = True

    def write(self, topic: str, log_time: int, data: bytes, publish_time: int | None = None) -> bool:
        """Take a serialised message; False if it was dropped (see `dropped`, `error`). KeyError for a topic unknown.

        log_time: ns, when it was received. Kept from going back, as readers of a file without an index demand.
        """
        with self._condition:
            _, channel = self._topics[topic]
            if self.error or self._closed or self._waiting + len(data) > self.backlog_bytes:
                self.dropped += 1
                return False
            chunk = self._chunk
            if not self.keep_times:
                log_time = self._last_time = max(log_time, self._last_time)
            if not chunk.messages:
                chunk.start = chunk.end = log_time
                chunk.begun = time.monotonic()
            if channel not in chunk.index:
                chunk.add(channel, None, *self._records[channel])
            sequence = self._sequence[channel] = self._sequence[channel] + 1
            published = log_time if publish_time is None else publish_time
            head = mcap_records.message_prefix(channel, sequence & 0xFFFFFFFF, log_time, published, len(data))
            chunk.add(channel, log_time, head, data)
            chunk.start, chunk.end = min(chunk.start, log_time), max(chunk.end, log_time)
            chunk.messages += 1
            chunk.payload += len(data)
            self._waiting += len(data)
            if chunk.size >= self.chunk_bytes:
                self._cut()
        if self._thread is None:
            self._drain()
        return not self.error

    def add_metadata(self, name: str, values: Mapping[str, str]) -> None:
        """A metadata record in the MCAP file, on the disk with the next chunk."""
        with self._condition:
            self._metadata.append((name, dict(values)))
            self._condition.notify_all()

    def set_custom(self, **values: str) -> None:
        """Change entries of custom_data in metadata.yaml; written within INFORMATION_PERIOD."""
        with self._condition:
            self.custom.update(values)
            self._changed = True

    def flush(self) -> None:
        """Bring all that was written so far to the disk."""
        with self._condition:
            self._cut()
            if self._thread is not None:
                self._condition.wait_for(lambda: not (self._queue or self._waiting or self._metadata) or self.error)
                return
        self._drain()

    def close(self) -> None:
        """Write the rest and the summary. What fails is in `error`; the file is complete all the same. Idempotent."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._cut()
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._drain()
        try:
            if not self.error:
                information = bag_info.dump(self._information())
                self._append_metadata("rosbag2", {"serialized_metadata": information})
                self._file.finish(self._ending())
        except OSError as error:
            self._fail(error)
        self._file.close()
        self._write_information()

    # -- the thread --------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._queue or self._closed or self._metadata):
                    now = time.monotonic()
                    if self._chunk.messages and now >= self._chunk.begun + self.flush_period:
                        self._cut()
                    elif self._changed and now >= self._informed + INFORMATION_PERIOD:
                        break
                    else:  # a chunk that is begun does not wake this thread, so it looks again after a while
                        begun = self._chunk.begun if self._chunk.messages else now - self.flush_period / 2
                        self._condition.wait(begun + self.flush_period - now)
                done = self._closed and not self._queue
            self._drain()
            if done:
                return
            if time.monotonic() >= self._informed + INFORMATION_PERIOD:
                self._write_information()

    def _cut(self) -> None:
        """The present chunk is full or old enough (the lock is held)."""
        if self._chunk.messages:
            self._queue.append(self._chunk)
            self._chunk = _Chunk()
            self._condition.notify_all()

    def _drain(self) -> None:
        """Bring queued chunks and metadata to the disk; a failure ends the recording."""
        while True:
            with self._condition:
                chunk = self._queue[0] if self._queue else None
                metadata, self._metadata = self._metadata, []
            if chunk is None and not metadata:
                break
            try:
                if not self.error:
                    if shutil.disk_usage(self.folder).free < self.min_free:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    for name, values in metadata:
                        self._append_metadata(name, values)
                    if chunk is not None:
                        self._append(chunk)
            except OSError as error:
                self._fail(error)
            with self._condition:
                if chunk is not None:
                    self._queue.pop(0)
                    self._waiting -= chunk.payload
                    if self.error:
                        self.dropped += chunk.messages
                self._condition.notify_all()

    def _append(self, chunk: _Chunk) -> None:
        records = b"".join(chunk.pieces)
        data = mcap_records.chunk(records, chunk.start, chunk.end, self.compression, self.level)
        offset, at = self._file.end, self._file.end + len(data)
        indexes, parts = {}, [data]
        for channel, entries in chunk.index.items():
            indexes[channel] = at
            parts.append(mcap_records.message_index(channel, entries))
            at += len(parts[-1])
        self._file.append(b"".join(parts))
        head = mcap_records.read_chunk_head(data[mcap_records.PREFIX :][:64])
        name = "" if self.compression == "none" else self.compression
        self._summary.chunks.append(
            ChunkIndex(
                chunk.start, chunk.end, offset, len(data), indexes, at - offset - len(data), name, head.compressed,
                len(records),
            )
        )  # fmt: skip
        names = {channel: name for name, (_, channel) in self._topics.items()}
        for channel, entries in chunk.index.items():
            self._counts[names[channel]] += len(entries)
        self._start = chunk.start if self.messages == chunk.messages else min(self._start, chunk.start)
        self._end = max(self._end, chunk.end)
        self._changed = True

    def _append_metadata(self, name: str, values: Mapping[str, str]) -> None:
        record, offset = mcap_records.metadata(name, values), self._file.end
        self._file.append(record)
        self._summary.metadata.append((name, offset, len(record)))

    def _fail(self, error: OSError) -> None:
        what = "the disk is full" if error.errno == errno.ENOSPC else f"cannot write: {error.strerror or error}"
        self.error = (
            f"{self.folder}: {what}: the recording has ended; {self.messages} messages of {self.seconds:.1f} s are kept"
        )

    # -- metadata.yaml and the summary -------------------------------------------------------------
    def _information(self) -> dict:
        topics = [topic for topic, _ in self._topics.values()]
        return bag_info.bag_information(self.path.name, topics, self._counts, self._start, self._end, self.custom)

    def _write_information(self) -> None:
        with self._condition:
            if not self._changed:
                return
            self._changed, self._informed = False, time.monotonic()
            information = self._information()
        try:
            bag_info.write(self.folder, information)
        except OSError as error:
            if not self.error:
                self._fail(error)

    def _ending(self) -> bytes:
        counts = {channel: self._counts[name] for name, (_, channel) in self._topics.items()}
        schemas = [mcap_records.schema(s) for s in self._schemas.values()]
        channels = [record for _, record in self._records.values()]
        return self._summary.ending(self._file.end, schemas, channels, counts, self._start, self._end)

"""Reads rosbag2 recordings without ROS: MCAP and sqlite3, split files, zstd and lz4, whatever distro wrote them.

    with open_bag("recording/") as bag:
        for topic, stamp, message in bag.messages(["/joint_states"]):
            ...

Storage files are read one after the other, in the order of metadata.yaml or, where there is none, of time. So a bag of
any length takes the memory of one chunk. Message definitions are Jazzy's and this package's own msg/*.msg; definitions
that a bag brings along are compared with those, and with this package's former ones, and never compiled.
Whatever is wrong with a bag is a `BagError` of one line.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rosbags.interfaces import Connection, MessageDefinition, MessageDefinitionFormat
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from vla_nodes import bounded_yaml
from vla_nodes.rosbag import bounds, metadata
from vla_nodes.rosbag.folder import PACKED, BagError, Layout, find
from vla_nodes.rosbag.former_definitions import Former, find_former, plain
from vla_nodes.rosbag.mcap_reader import McapFile
from vla_nodes.rosbag.mcap_records import McapError
from vla_nodes.rosbag.storage import open_storage
from vla_nodes.share import share_path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

REPAIR = "python -m vla_nodes record --repair"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
"""Bytes that a zstd frame begins with, and no message does: CDR begins with 0."""

__all__ = ["Bag", "BagError", "open_bag", "typestore"]


def open_bag(path: str | Path) -> Bag:
    """Open a rosbag2 folder, or one storage file (.mcap, .db3) by itself.

    Raises:
        BagError: not there, not a bag, truncated, empty, larger than `bounds` allow, or of a kind that cannot be read.
    """
    return Bag(Path(path))


@lru_cache(maxsize=1)
def typestore() -> Typestore:
    """The message types of ROS 2 Jazzy and of this package."""
    store = get_typestore(Stores.ROS2_JAZZY)
    types: dict = {}
    for file in sorted(share_path("msg").glob("*.msg")):
        types.update(get_types_from_msg(file.read_text(encoding="utf-8"), f"vla_nodes/msg/{file.stem}"))
    store.register(types)
    return store


class Bag:
    """An open recording.

    topics: {name: type}, names as recorded ("/joint_states"); counts: {name: messages}; start, end: ns, when the first
    and the last message were received (the recorder's clock); custom: what the recorder noted ({str: str}); notes: one
    line for each thing about the bag that a reader should know. Iterators are independent of each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.topics: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.start, self.end = 2**63 - 1, 0
        self.typestore = typestore()
        layout = find(path)
        self.custom, self.notes = layout.custom, layout.notes
        self._packed = layout.packed
        self._files = layout.files
        self._mcaps: dict[Path, McapFile] = {}  # opened once: finding out what one without an index holds takes time
        self._unreadable: dict[str, tuple[int, str]] = {}  # by topic: how many, and the note that says so
        self._connections: dict[str, Connection] = {}
        self._former: dict[str, Former] = {}  # by topic, where the bag has a former definition of its type
        self._temporary = ExitStack()
        try:
            self._unpack()
            starts = {file: self._survey(file) for file in self._files}
            self._complete(layout, starts)
        except BaseException:
            self._temporary.close()
            raise
        if not sum(self.counts.values()):
            self._temporary.close()
            raise BagError(f"{path}: the bag holds no messages ({len(self.topics)} topics)")

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was unpacked."""
        self._temporary.close()

    @property
    def duration(self) -> float:
        """s from the first to the last message."""
        return (self.end - self.start) * 1e-9

    def require(self, topic: str, *types: str) -> str:
        """The type of a topic that is there, has messages, and is of one of `types`; BagError otherwise."""
        if topic not in self.topics:
            raise BagError(f"{self.path}: no topic {topic}{_nearest(topic, self.topics)}")
        found = self.topics[topic]
        if types and found not in types:
            raise BagError(f"{self.path}: topic {topic} is {found}, needed is {' or '.join(types)}")
        if not self.counts[topic]:
            raise BagError(f"{self.path}: topic {topic} has no messages")
        return found

    def readable(self) -> list[str]:
        """The topics whose messages can be read: of a type of Jazzy or of this package, defined as there."""
        good = []
        for topic in self.topics:
            try:
                self.check(topic)
                good.append(topic)
            except BagError:
                continue
        return good

    def messages(self, topics: Collection[str] | None = None) -> Iterator[tuple[str, int, Any]]:
        """(topic, stamp in ns when it was received, message) in the order of the recording.

        topics: only these; None: all whose type is known (`readable`). Messages have the fields of the ROS ones, arrays
        are numpy. Those that cannot be decoded are left out; a line of `notes` says how many.

        Raises:
            BagError: a topic that is not there, of unknown or redefined type, or at the end for a topic that had not
                one message that can be decoded.
        """
        for topic, stamp, _, message in self.decoded(self.readable() if topics is None else topics):
            yield topic, stamp, message

    def decoded(self, topics: Collection[str], others: Collection[str] = ()) -> Iterator[tuple[str, int, bytes, Any]]:
        """(topic, stamp in ns, CDR bytes, message) as `messages`; of `others` the bytes only, and None."""
        for topic in topics:
            self.check(topic)
        read: set[str] = set()
        failed: Counter[str] = Counter()
        first: dict[str, BagError] = {}
        for topic, stamp, data in self.raw({*topics, *others}):
            message = None
            if topic in topics:
                try:
                    message = self.read(topic, stamp, data)
                    read.add(topic)
                except BagError as error:
                    failed[topic] += 1
                    first.setdefault(topic, error)
                    self._note_unreadable(topic, failed[topic], first[topic])
                    continue
            yield topic, stamp, data, message
        for topic, why in first.items():
            if topic not in read:
                raise BagError(f"{why} (and so are all {failed[topic]} messages of the topic)")

    def _note_unreadable(self, topic: str, count: int, first: BagError) -> None:
        """One line of `notes` for each topic, with the most that any pass over the bag has met."""
        before, line = self._unreadable.get(topic, (0, ""))
        if count <= before:
            return
        what = str(first).removeprefix(f"{self.path}: ")
        new = f"{topic}: {count} of {self.counts[topic]} messages cannot be decoded and are left out (first: {what})"
        self._unreadable[topic] = count, new
        if line in self.notes:
            self.notes[self.notes.index(line)] = new
        else:
            self.notes.append(new)

    def read(self, topic: str, stamp: int, data: bytes) -> Any:
        """The message in the bytes that `raw` gave. Raises BagError where they are none of the topic's type."""
        kind = self.topics[topic]
        try:
            if topic in self._former:
                return self._former[topic].read(data, self.typestore.types[kind])
            return self.typestore.deserialize_cdr(data, kind)
        except Exception as error:  # rosbags raises its own, numpy's and struct's errors
            raise BagError(f"{self.path}: {topic} at {stamp}: not a {kind}: {_line(error)}") from None

    def raw(self, topics: Collection[str] | None = None) -> Iterator[tuple[str, int, bytes]]:
        """(topic, stamp in ns, CDR bytes) in the order of the recording. Raises BagError as `messages`."""
        wanted = set(self.topics if topics is None else topics)
        for topic in wanted - set(self.topics):
            raise BagError(f"{self.path}: no topic {topic}{_nearest(topic, self.topics)}")
        for file in self._files:
            yield from self._raw(file, wanted)

    def definition(self, topic: str) -> tuple[str, str]:
        """(message definition text, hash) of a topic for writing it into another bag; text "" if nobody knows it."""
        kind, connection = self.topics[topic], self._connections[topic]
        if former := self._former.get(topic):
            return former.text_and_hash()
        if kind in self.typestore.fielddefs:
            return self.typestore.generate_msgdef(kind, ros_version=2)[0], self.typestore.hash_rihs01(kind)
        return connection.msgdef.data, connection.digest or "unknown"

    # -- opening ---------------------------------------------------------------------------------------------------
    def _unpack(self) -> None:
        """Files that are compressed as a whole are unpacked: their index is inside."""
        folder: Path | None = None
        for i, file in enumerate(self._files):
            if self._packed != "file" and file.suffix != PACKED:
                continue
            folder = folder or Path(self._temporary.enter_context(TemporaryDirectory(prefix="vla_nodes_bag_")))
            self._files[i] = folder / file.stem
            left = bounds.most_unpacked(file.stat().st_size)
            try:
                with zstd.open(file, "rb") as packed, self._files[i].open("wb") as out:
                    while data := packed.read(1 << 20):
                        left -= len(data)
                        if left < 0:
                            raise BagError(f"{file}: unpacks to more than 1 GiB and 100 times its size")
                        out.write(data)
            except (zstd.ZstdError, EOFError) as error:
                raise BagError(f"{file}: truncated or not zstd: {_line(error)}") from None
            except OSError as error:
                raise BagError(f"{file}: cannot be unpacked to {folder}: {error.strerror}") from None

    def _reader(self, file: Path) -> McapFile | Reader:
        if file in self._mcaps:
            return self._mcaps[file]
        try:
            reader = open_storage(file)
        except OSError as error:
            raise BagError(f"{self._name(file)}: {error.strerror}") from None
        except (McapError, bounds.TooLarge) as error:
            raise BagError(f"{self._name(file)}: {error}{self._remedy(file, error)}") from None
        except Exception as error:  # rosbags raises its own, struct's, sqlite's and TypeErrors for broken files
            raise BagError(f"{self._name(file)}: {_reason(file, error)}{self._remedy(file, error)}") from None
        if isinstance(reader, McapFile):
            self._mcaps[file] = reader
        return reader

    def _survey(self, file: Path) -> int:
        """Take note of the topics of a file; returns the time of its first message in ns."""
        wal = file.with_name(file.name + "-wal")
        if wal.is_file() and wal.stat().st_size:
            self.notes.append(f"{wal.name} holds messages that were not merged when the recording was cut off")
        reader = self._reader(file)
        try:
            for connection in reader.connections:
                name, kind = connection.topic, _full_name(connection.msgtype)
                if self.topics.setdefault(name, kind) != kind:
                    raise BagError(f"{self.path}: topic {name} is recorded as {self.topics[name]} and as {kind}")
                self.counts[name] = self.counts.get(name, 0) + connection.msgcount
                self._connections.setdefault(name, connection)
            if reader.message_count:
                self.start, self.end = min(self.start, reader.start_time), max(self.end, reader.end_time - 1)
            return reader.start_time
        finally:
            reader.close()

    def _complete(self, layout: Layout, starts: dict[Path, int]) -> None:
        """What metadata.yaml would have said: the order of the files, and what the recorder noted."""
        if layout.problem:
            self._files.sort(key=lambda file: starts[file])  # stable: those that begin together are in order of names
        for mcap in self._mcaps.values():
            if not self.custom and mcap.serialized_metadata:
                try:
                    document = bounded_yaml.parse(mcap.serialized_metadata, metadata.MAX_VALUES)
                    whole = document if metadata.KEY in document else {metadata.KEY: document}
                    self.custom = metadata.information(whole)["custom_data"]
                except (TypeError, ValueError):
                    continue

    def check(self, topic: str) -> None:
        """BagError for a topic that is not there, of an unknown type, or of one that this bag defines otherwise than
        we do: it would be read as something else."""
        if topic not in self.topics:
            raise BagError(f"{self.path}: no topic {topic}{_nearest(topic, self.topics)}")
        kind, connection, ours = self.topics[topic], self._connections[topic], self.typestore.fielddefs
        if kind not in ours:
            raise BagError(f"{self.path}: topic {topic} is {kind}, which is no type of ROS 2 Jazzy or of vla_nodes")
        serialization = connection.ext.serialization_format
        if serialization != "cdr":
            raise BagError(f"{self.path}: topic {topic} is serialised as '{serialization}', only cdr is read")
        if connection.msgdef.format is MessageDefinitionFormat.NONE:
            return  # Humble's sqlite3 bags bring none; the types we read have not changed since
        if len(connection.msgdef.data) > bounds.MAX_DEFINITION:
            size = len(connection.msgdef.data)
            raise BagError(f"{self.path}: topic {topic}: a definition of {size} bytes, at most {bounds.MAX_DEFINITION}")
        try:
            theirs = _defined(connection.msgdef, kind)
        except Exception as error:  # a parser's own errors, KeyErrors and RecursionErrors for text that is none
            problem = f"its definition in this bag cannot be read: {_line(error)}"
            raise BagError(f"{self.path}: topic {topic} is {kind}, and {problem}") from None
        for name, (_, fields) in theirs.items():
            if name == kind and (former := find_former(kind, fields)):
                self._former[topic] = former
                continue
            if name in ours and plain(fields) != plain(ours[name][1]):
                raise BagError(f"{self.path}: topic {topic}: {name} has other fields in this bag than in Jazzy or here")

    # -- reading ---------------------------------------------------------------------------------------------------
    def _raw(self, file: Path, wanted: set[str]) -> Iterator[tuple[str, int, bytes]]:
        reader = self._reader(file)
        left = bounds.most_unpacked(file.stat().st_size)
        try:
            connections = [connection for connection in reader.connections if connection.topic in wanted]
            if not connections:
                return
            iterator = iter(reader.messages(connections))
            while True:
                try:
                    connection, stamp, data = next(iterator)
                    if self._packed == "message" or (self._packed is None and data[:4] == ZSTD_MAGIC):
                        data = zstd.ZstdDecompressor().decompress(data, max_length=bounds.MAX_MESSAGE + 1)
                except StopIteration:
                    return
                except bounds.TooLarge as error:
                    raise BagError(f"{self._name(file)}: {error}") from None
                except Exception as error:  # as in _reader
                    why = _line(error)
                    why = why if why.startswith("damaged") else f"damaged: {why}"
                    raise BagError(f"{self._name(file)}: {why}{self._remedy(file, error)}") from None
                left -= len(data)
                if len(data) > bounds.MAX_MESSAGE or left < 0:
                    most = f"over {bounds.MAX_MESSAGE}" if left >= 0 else "more than the file's size allows in all"
                    raise BagError(f"{self.path}: {connection.topic} at {stamp}: {len(data)} bytes, {most}")
                yield connection.topic, stamp, data
        finally:
            reader.close()

    def _remedy(self, file: Path, error: Exception) -> str:
        """What to do about a file that cannot be read; "" where there is nothing in it or it is no storage at all."""
        if not file.stat().st_size or isinstance(error, bounds.TooLarge):
            return ""
        with file.open("rb") as stored:
            magic = stored.read(16)
        if magic.startswith(b"\x89MCAP0\r\n"):
            return "" if "robot framework" in str(error) else f": {REPAIR} {self.path}"
        return f": try `sqlite3 {file.name} .recover`" if magic.startswith(b"SQLite format 3\0") else ""

    def _name(self, file: Path) -> str:
        if self.path.is_file():
            return str(self.path)
        return str(file if file.parent == self.path else self.path / file.name)


def _full_name(kind: str) -> str:
    """`sensor_msgs/Image`, as older tools write it, is sensor_msgs/msg/Image."""
    parts = kind.split("/")
    return f"{parts[0]}/msg/{parts[1]}" if len(parts) == 2 else kind


def _defined(definition: MessageDefinition, kind: str) -> dict:
    """The types in a definition's text, parsed and not compiled."""
    if definition.format is MessageDefinitionFormat.MSG:
        return get_types_from_msg(definition.data, kind)
    found: dict = {}
    for part in definition.data.split("=" * 80 + "\n"):
        found.update(get_types_from_idl(part.split("\n", 1)[1] if part.startswith("IDL: ") else part))
    return found


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _reason(file: Path, error: Exception) -> str:
    """A parser's error in words for a user."""
    size = file.stat().st_size
    if size == 0:
        return "the file is empty, the recording was cut off"
    with file.open("rb") as stored:
        magic = stored.read(16)
    if not magic.startswith(b"SQLite format 3\0"):
        return "not a sqlite3 file"
    return f"truncated or damaged ({_line(error).removeprefix(f'Cannot open database {file}: ')})"


def _nearest(topic: str, topics: Collection[str]) -> str:
    import difflib

    close = difflib.get_close_matches(topic, list(topics)[:1000], 1, 0.6)
    if close:
        return f": did you mean {close[0]}?"
    shown = ", ".join(sorted(topics)[:8])
    return f" (it has {shown}{', ...' if len(topics) > 8 else ''})"

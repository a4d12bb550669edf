"""Reads rosbag2 recordings without ROS: MCAP and sqlite3, split files, zstd and lz4, whatever distro wrote them.

    with open_bag("recording/") as bag:
        for topic, stamp, message in bag.messages(["/joint_states"]):
            ...

Storage files are read by the `rosbags` library, one after the other in the order of metadata.yaml, so a bag of any
length takes the memory of one chunk. Message definitions are Jazzy's and this package's own msg/*.msg; definitions that
a bag brings along are compared with those, and with this package's former ones, and never compiled.
Whatever is wrong with a bag is a `BagError` of one line.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rosbags.interfaces import Connection, MessageDefinition, MessageDefinitionFormat
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from vla_nodes.rosbag.former_definitions import FORMER, Former
from vla_nodes.rosbag.storage import open_storage
from vla_nodes.share import share_path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_MESSAGE = 256 << 20  # bytes of one message; a 4K RGB image takes 25 MB
MAX_CHUNK = 1 << 30  # bytes of one MCAP chunk, unpacked
MAX_METADATA = 64 << 20  # bytes of metadata.yaml; 10,000 topics take 10 MB
SUFFIXES = {".mcap": "mcap", ".db3": "sqlite3"}
REPAIR = "python -m vla_nodes record --repair"


class BagError(ValueError):
    """One line: which bag, file or topic, what is wrong, and the remedy."""


def open_bag(path: str | Path) -> Bag:
    """Open a rosbag2 folder, or one storage file (.mcap, .db3) by itself.

    Raises:
        BagError: not there, not a bag, no metadata, truncated, empty, or of a kind that cannot be read.
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
        self.custom: dict[str, str] = {}
        self.notes: list[str] = []
        self.typestore = typestore()
        self._mode = ""
        self._connections: dict[str, Connection] = {}
        self._former: dict[str, Former] = {}  # by topic, where the bag has a former definition of its type
        self._files = self._find()
        self._temporary = ExitStack()
        try:
            self._unpack()
            for file in self._files:
                self._survey(file)
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
        are numpy.

        Raises:
            BagError: a topic that is not there, of unknown or redefined type, or a message that cannot be read.
        """
        topics = self.readable() if topics is None else topics
        for topic in topics:
            self.check(topic)
        for topic, stamp, data in self.raw(topics):
            yield topic, stamp, self.read(topic, stamp, data)

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
    def _find(self) -> list[Path]:
        """The storage files, in order; reads metadata.yaml."""
        path = self.path
        if not path.exists():
            raise BagError(f"{path}: there is no such bag")
        if path.is_file():
            if path.suffix not in SUFFIXES:
                raise BagError(f"{path}: not a rosbag2 recording: give its folder, or a .mcap or .db3 file")
            return [path]
        metadata = path / "metadata.yaml"
        if not metadata.is_file():
            if remedy := _anew(path):
                raise BagError(f"{path}: no metadata.yaml, the recording was cut off: {remedy}")
            raise BagError(f"{path}: not a rosbag2 recording: the folder has neither metadata.yaml nor .mcap or .db3")
        if metadata.stat().st_size > MAX_METADATA:
            raise BagError(f"{metadata}: {metadata.stat().st_size} bytes are no metadata")
        try:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            info = yaml.load(metadata.read_text(encoding="utf-8"), loader)["rosbag2_bagfile_information"]
            version, storage = int(info["version"]), str(info["storage_identifier"])
            names = [PurePath(str(name)).name for name in info["relative_file_paths"]]
            packing = str(info.get("compression_format") or "")
            self._mode = str(info.get("compression_mode") or "").lower().replace("none", "")
            self.custom = {str(key): str(value) for key, value in (info.get("custom_data") or {}).items()}
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"no key {error}" if isinstance(error, KeyError) else _line(error)
            raise BagError(f"{metadata}: unreadable ({problem}): {_anew(path) or 'it has no recording'}") from None
        if version > 9:
            raise BagError(f"{metadata}: version {version}, up to 9 is known: update the rosbags library")
        if storage not in SUFFIXES.values():
            raise BagError(f"{path}: storage '{storage}' cannot be read, only {' and '.join(SUFFIXES.values())}")
        if self._mode not in ("", "file", "message"):
            raise BagError(f"{path}: compression mode '{self._mode}' is unknown")
        if self._mode and packing != "zstd":
            raise BagError(f"{path}: compression '{packing}' cannot be read, only zstd: `ros2 bag convert` it")
        if missing := [name for name in names if not (path / name).is_file()]:
            raise BagError(f"{path}: metadata.yaml names {missing[0]}, which is not there ({len(missing)} missing)")
        if not names:
            raise BagError(f"{path}: the bag holds no messages (metadata.yaml names no file)")
        return [path / name for name in names]

    def _unpack(self) -> None:
        """Files that are compressed as a whole are unpacked: their index is inside."""
        if self._mode != "file":
            return
        folder = Path(self._temporary.enter_context(TemporaryDirectory(prefix="vla_nodes_bag_")))
        for i, file in enumerate(self._files):
            self._files[i] = folder / file.stem
            try:
                with zstd.open(file, "rb") as packed, self._files[i].open("wb") as out:
                    shutil.copyfileobj(packed, out, 1 << 20)
            except (zstd.ZstdError, EOFError) as error:
                raise BagError(f"{file}: truncated or not zstd: {_line(error)}") from None
            except OSError as error:
                raise BagError(f"{file}: cannot be unpacked to {folder}: {error.strerror}") from None

    def _reader(self, file: Path) -> Reader:
        try:
            reader = open_storage(file)
        except Exception as error:  # rosbags raises its own, struct's, sqlite's and TypeErrors for broken files
            raise BagError(f"{self._name(file)}: {_reason(file, error)}{self._remedy(file)}") from None
        for chunk in getattr(reader.storage, "chunks", ()):
            if chunk.uncompressed_size > MAX_CHUNK:
                reader.close()
                raise BagError(f"{self._name(file)}: a chunk of {chunk.uncompressed_size} bytes, at most {MAX_CHUNK}")
        return reader

    def _survey(self, file: Path) -> None:
        wal = file.with_name(file.name + "-wal")
        if wal.is_file() and wal.stat().st_size:
            self.notes.append(f"{wal.name} holds messages that were not merged when the recording was cut off")
        reader = self._reader(file)
        try:
            for connection in reader.connections:
                name, kind = connection.topic, connection.msgtype
                if self.topics.setdefault(name, kind) != kind:
                    raise BagError(f"{self.path}: topic {name} is recorded as {self.topics[name]} and as {kind}")
                self.counts[name] = self.counts.get(name, 0) + connection.msgcount
                self._connections.setdefault(name, connection)
            if reader.message_count:
                self.start, self.end = min(self.start, reader.start_time), max(self.end, reader.end_time - 1)
        finally:
            reader.close()

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
        try:
            theirs = _defined(connection.msgdef, kind)
        except Exception as error:  # a parser's own errors, KeyErrors and RecursionErrors for text that is none
            problem = f"its definition in this bag cannot be read: {_line(error)}"
            raise BagError(f"{self.path}: topic {topic} is {kind}, and {problem}") from None
        for name, (_, fields) in theirs.items():
            if name == kind and (former := _former(kind, fields)):
                self._former[topic] = former
                continue
            if name in ours and _plain(fields) != _plain(ours[name][1]):
                raise BagError(f"{self.path}: topic {topic}: {name} has other fields in this bag than in Jazzy or here")

    # -- reading ---------------------------------------------------------------------------------------------------
    def _raw(self, file: Path, wanted: set[str]) -> Iterator[tuple[str, int, bytes]]:
        reader = self._reader(file)
        try:
            connections = [connection for connection in reader.connections if connection.topic in wanted]
            if not connections:
                return
            iterator = iter(reader.messages(connections))
            while True:
                try:
                    connection, stamp, data = next(iterator)
                    if self._mode == "message":
                        data = zstd.ZstdDecompressor().decompress(data, max_length=MAX_MESSAGE + 1)
                except StopIteration:
                    return
                except Exception as error:  # as in _reader
                    raise BagError(f"{self._name(file)}: damaged: {_line(error)}{self._remedy(file)}") from None
                if len(data) > MAX_MESSAGE:
                    raise BagError(f"{self.path}: {connection.topic} at {stamp}: {len(data)} bytes, over {MAX_MESSAGE}")
                yield connection.topic, stamp, data
        finally:
            reader.close()

    def _remedy(self, file: Path) -> str:
        """What to do about a file that cannot be read; "" where there is nothing in it or it is no storage at all."""
        if not file.stat().st_size:
            return ""
        with file.open("rb") as stored:
            magic = stored.read(16)
        if magic.startswith(b"\x89MCAP0\r\n"):
            return f": {REPAIR} {self.path}"
        return f": try `sqlite3 {file.name} .recover`" if magic.startswith(b"SQLite format 3\0") else ""

    def _name(self, file: Path) -> str:
        return str(file if file.parent == self.path or file == self.path else self.path / file.name)


def _anew(folder: Path) -> str:
    """How to read a folder whose metadata.yaml is missing; "" where no file in the folder is a recording."""
    files = sorted(folder.iterdir())
    if any(file.suffix == ".mcap" for file in files):
        return f"{REPAIR} {folder} writes it anew"
    if alone := [file for file in files if file.suffix == ".db3"]:
        return f"give {alone[0]} by itself, or write it anew with `ros2 bag reindex {folder}`"
    return f"write it anew with `ros2 bag reindex {folder}`" if any(file.suffix == ".zstd" for file in files) else ""


def _defined(definition: MessageDefinition, kind: str) -> dict:
    """The types in a definition's text, parsed and not compiled."""
    if definition.format is MessageDefinitionFormat.MSG:
        return get_types_from_msg(definition.data, kind)
    found: dict = {}
    for part in definition.data.split("=" * 80 + "\n"):
        found.update(get_types_from_idl(part.split("\n", 1)[1] if part.startswith("IDL: ") else part))
    return found


def _former(kind: str, fields: Collection) -> Former | None:
    """The former definition of a type that these fields are, or None."""
    return next((old for old in FORMER if old.kind == kind and _plain(old.fields) == _plain(fields)), None)


def _plain(fields: Collection) -> list:
    return [(name.lower(), kind) for name, kind in fields]


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _reason(file: Path, error: Exception) -> str:
    """A parser's error in words for a user."""
    size = file.stat().st_size
    if size == 0:
        return "the file is empty, the recording was cut off"
    with file.open("rb") as stored:
        magic = stored.read(16)
    if file.suffix == ".mcap":
        if not magic.startswith(b"\x89MCAP0\r\n"):
            return "not an MCAP file"
        if "Profile" in str(error):
            return "an MCAP file of another robot framework (its profile is not ros2)"
        return f"truncated, the recording was cut off ({_line(error)})"
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

"""Opens one storage file of a bag: MCAP with our own bounded reader, sqlite3 with the rosbags library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
from rosbags.rosbag2 import Reader, storage_sqlite3

from vla_nodes.rosbag import bounds
from vla_nodes.rosbag.mcap_reader import McapFile


def open_storage(file: Path) -> McapFile | Reader:
    """An open reader of a .mcap or .db3 file. Raises whatever rosbags, sqlite and struct raise for broken ones."""
    if file.suffix == ".mcap":
        return McapFile(file)
    reader = Reader(file)
    with _lenient():
        reader.open()
    return reader


@contextmanager
def _lenient() -> Iterator[None]:
    """Two things of rosbags 0.11, for as long as this lasts.

    rosbag2 since Iron writes encoding "unknown" or "" for a type whose definition it does not find, those of actions
    for one, and rosbags fails on the whole file: here such a topic has no definition. Nobody here asks for the recorded
    QoS, and parsing its YAML takes as long as reading seconds of a recording: here there is none.
    """
    parse_qos = storage_sqlite3.parse_qos
    storage_sqlite3.parse_qos = lambda dcts: []
    apsw.connection_hooks.append(_prepare)
    try:
        yield
    finally:
        storage_sqlite3.parse_qos = parse_qos
        apsw.connection_hooks.remove(_prepare)


def _prepare(connection: apsw.Connection) -> None:
    """Before rosbags reads a database: only stored rows of bounded size, and definitions of known encoding."""
    connection.limit(apsw.SQLITE_LIMIT_LENGTH, bounds.MAX_MESSAGE)
    for kind, name, text in connection.execute("SELECT type, name, sql FROM main.sqlite_master"):
        if kind in ("view", "trigger") or "VIRTUAL" in (text or "").upper()[:20]:
            raise ValueError(f"its {kind} {str(name)[:40]} is nothing that a recording has")
    known = "SELECT * FROM main.message_definitions WHERE encoding IN ('ros2msg', 'ros2idl')"
    connection.execute(f"CREATE TEMP VIEW message_definitions AS {known}")

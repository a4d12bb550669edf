"""Opens one storage file of a bag with the rosbags library, made more lenient and faster in two places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
from rosbags.interfaces import MessageDefinition, MessageDefinitionFormat
from rosbags.rosbag2 import Reader, storage_mcap, storage_sqlite3


def open_storage(file: Path) -> Reader:
    """An open reader of a .mcap or .db3 file. Raises whatever rosbags, sqlite and struct raise for broken ones."""
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
    strict, mcap_qos, sqlite_qos = storage_mcap.get_msgdef, storage_mcap.get_qos, storage_sqlite3.parse_qos

    def get_msgdef(schema: Any) -> MessageDefinition:
        try:
            return strict(schema)
        except KeyError:
            return MessageDefinition(MessageDefinitionFormat.NONE, "")

    storage_mcap.get_msgdef = get_msgdef
    storage_mcap.get_qos = storage_sqlite3.parse_qos = lambda _: []
    apsw.connection_hooks.append(_known_definitions)
    try:
        yield
    finally:
        storage_mcap.get_msgdef, storage_mcap.get_qos, storage_sqlite3.parse_qos = strict, mcap_qos, sqlite_qos
        apsw.connection_hooks.remove(_known_definitions)


def _known_definitions(connection: apsw.Connection) -> None:
    known = "SELECT * FROM main.message_definitions WHERE encoding IN ('ros2msg', 'ros2idl')"
    connection.execute(f"CREATE TEMP VIEW message_definitions AS {known}")

"""Text and hash of message types, which a recording carries so that it can be read where they are not installed."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from rosbags.typesys import get_types_from_msg

from vla_nodes.rosbag.metadata import Qos, Topic
from vla_nodes.rosbag.read import typestore

_FIELD = re.compile(r"^\s*([A-Za-z]\w*(?:/\w+){0,2})(?:<=\d+)?(?:\[[^\]]*\])?\s+\w+", re.MULTILINE)
_TYPE = re.compile(r"[A-Za-z]\w*/msg/\w+")
_PLAIN = frozenset(
    "bool byte char float32 float64 int8 uint8 int16 uint16 int32 uint32 int64 uint64 string wstring".split()
)


def topic(name: str, kind: str, qos: Qos | None = None) -> Topic:
    """A topic with the definition of its type, where that is known: from Jazzy's common interfaces, this package, or
    what is installed under AMENT_PREFIX_PATH. A type that is not is recorded without one."""
    text, digest = definition(kind)
    return Topic(name, kind, text, digest, qos or Qos())


@lru_cache(maxsize=256)
def definition(kind: str) -> tuple[str, str]:
    """(text in the form of ros2msg with all types referred to, RIHS01 hash) of "package/msg/Name", or ("", "")."""
    store = typestore()
    if kind not in store.fielddefs:
        types = _installed(kind)
        if not types:
            return "", ""
        store.register({name: fields for name, fields in types.items() if name not in store.fielddefs})
    return store.generate_msgdef(kind, ros_version=2)[0], store.hash_rihs01(kind)


def _installed(kind: str) -> dict:
    """The type and those it refers to, from .msg files of installed packages; {} where one is missing."""
    types: dict = {}
    wanted = [kind]
    while wanted:
        name = wanted.pop()
        if name in types or name in typestore().fielddefs:
            continue
        file = _file(name)
        if file is None:
            return {}
        text = file.read_text(encoding="utf-8")
        types.update(get_types_from_msg(text, name))
        package = name.split("/")[0]
        for field in _FIELD.findall(re.sub(r"#.*", "", text)):
            if field not in _PLAIN:
                parts = field.split("/")
                wanted.append(f"{parts[0] if len(parts) > 1 else package}/msg/{parts[-1]}")
    return types


def _file(kind: str) -> Path | None:
    if not _TYPE.fullmatch(kind):
        return None
    package, _, name = kind.split("/")
    for prefix in filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)):
        file = Path(prefix, "share", package, "msg", f"{name}.msg")
        if file.is_file():
            return file
    return None

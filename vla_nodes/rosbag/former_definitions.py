"""Message types of this package as they were, so that recordings made with them still replay.

A bag brings the definitions of its messages along. Where one equals a former definition listed here, its messages are
read by that and brought up to date; all others must equal the present definition (read.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

CHUNK = "vla_nodes/msg/ActionChunk"


@dataclass(frozen=True)
class Former:
    """kind: of the message; definition: its fields as they were; added: gives the fields that it did not have yet."""

    kind: str
    definition: str
    added: Callable[[Any], dict[str, Any]]

    @property
    def fields(self) -> list[tuple]:
        """As a type store describes them."""
        return list(get_types_from_msg(self.definition, self.kind)[self.kind][1])

    def text_and_hash(self) -> tuple[str, str]:
        """As bags carry them."""
        store = _store(self)
        return store.generate_msgdef(self.kind, ros_version=2)[0], store.hash_rihs01(self.kind)

    def read(self, data: bytes, present: type) -> Any:
        """The message as one of the `present` class. Raises what `deserialize_cdr` raises."""
        old = _store(self).deserialize_cdr(data, self.kind)
        kept = {name: value for name, value in vars(old).items() if not name.startswith("__")}
        return present(**kept, **self.added(old))


FORMER = (
    Former(  # until 0.1: the last column was always the gripper
        CHUNK,
        """string EE_DELTA="ee_delta"
string EE_POSE="ee_pose"
string JOINT_DELTA="joint_delta"
string JOINT_POSITION="joint_position"
std_msgs/Header header
string instruction
float64 period
string action_space
string[] names
uint32 horizon
uint32 dim
float32[] actions
""",
        lambda old: {"grippers": list(old.names[-1:]) or ["gripper"]},
    ),
)


@lru_cache
def _store(former: Former) -> Typestore:
    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg(former.definition, former.kind))
    return store


def find_former(kind: str, fields: Collection) -> Former | None:
    """The former definition of a type that these fields are, or None."""
    return next((old for old in FORMER if old.kind == kind and plain(old.fields) == plain(fields)), None)


def plain(fields: Collection) -> list:
    """Fields as they are compared: constants are in upper case in some definitions."""
    return [(name.lower(), kind) for name, kind in fields]

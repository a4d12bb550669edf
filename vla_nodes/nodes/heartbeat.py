"""What a node says of itself on vla/heartbeat, and that one name has one node: a second one ends.

Two nodes of one name would both answer its services and both command the arm. So a node, before it has any service,
takes its name: on this machine by a socket that the kernel frees when the process ends, however it ends; against other
machines by announcing the name for half a second, and ending where another node of that name, in the same domain and
namespace, is heard. Discovery may take seconds; so a node listens on, and ends later where it hears one that was first.

Only what is heard counts: DDS lists a killed node for some 20 s, and the node that is started in its place must run.
And only who is also listed counts: a recording that is played repeats the heartbeats of its day.
"""

from __future__ import annotations

import errno
import hashlib
import secrets
import socket
import struct
import sys
import time
from dataclasses import dataclass

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from std_msgs.msg import String

TOPIC = "vla/heartbeat"
CLAIMING, GONE = "claiming", "gone"
"""States beside those of the lifecycle: not started yet, and about to end."""
MAX_BEAT = 200
PERIOD = 0.1
"""s between two announcements while claiming."""
WINDOW = 0.5
"""s that a node announces its name before it starts."""
LONGEST = 1.0
"""s of it where another node of the name is listed: five heartbeats of one that lives."""


class NameTakenError(RuntimeError):
    """Another node of this name runs; the text says so and what to do."""


@dataclass(frozen=True)
class Beat:
    """One message: the node's name, its lifecycle state, and the identity of its process (see `new_identity`)."""

    name: str
    state: str
    identity: str = ""

    @classmethod
    def parse(cls, text: str) -> Beat:
        """Of whatever was received; what is missing is empty."""
        name, state, identity, *_ = (*text[:MAX_BEAT].split(" "), "", "", "")
        return cls(name, state, identity)

    def message(self) -> String:
        """As it is published."""
        return String(data=f"{self.name} {self.state} {self.identity}")


def new_identity() -> str:
    """Tells processes of one name apart, and sorts them by their start (by the machines' clocks; then by chance)."""
    return f"{time.time_ns():016x}-{secrets.token_hex(4)}"


def must_yield(mine: str, claiming: bool, heard: Beat) -> bool:
    """Whether the process of identity `mine` ends for one of the same name that was heard. Of any two, one does.

    Who has started stays, and who is claiming yields to it; of two alike the one that began first stays.
    """
    if heard.identity == mine or heard.state == GONE:
        return False
    if claiming != (heard.state == CLAIMING):
        return claiming
    return heard.identity < mine


def is_listed_twice(node: Node) -> bool:
    """Whether the ROS graph holds heartbeats of another node of this node's name and namespace."""
    mine = (node.get_name(), node.get_namespace())
    ends = node.get_publishers_info_by_topic(node.resolve_topic_name(TOPIC))
    return sum((end.node_name, end.node_namespace) == mine for end in ends) > 1


def taken(node: Node, process: int | None = None) -> str:
    """What is told to the operator; process: id of the other, where it is on this machine."""
    other = "" if process is None else f" (process {process})"
    return (
        f"another {node.get_name()}{other} runs in this domain and namespace ({node.get_namespace()}), and this one "
        f"ends: end the other first, or start this one in another namespace (-r __ns:=/NAME) or domain (ROS_DOMAIN_ID)"
    )


def take_on_machine(node: Node) -> socket.socket | None:
    """What holds this node's name, domain and namespace on this machine while it is open; None but on Linux.

    Raises NameTakenError where another process holds it.
    """
    if sys.platform != "linux":
        return None  # no abstract sockets there: heartbeats tell
    whose = f"{node.context.get_domain_id()} {node.get_fully_qualified_name()}"
    address = f"\0vla_nodes/{hashlib.sha256(whose.encode()).hexdigest()}"  # an address has 107 characters, a name 255
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        held.bind(address)
        held.listen(1)
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise NameTakenError(taken(node, _holder(address))) from None
    return held


def _holder(address: str) -> int | None:
    """Id of the process that holds an address; None where it has ended meanwhile, or has not come to listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(address)
        except OSError:
            return None
        return struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


@dataclass(frozen=True)
class Claim:
    """That this process is the node of its name: its identity, and what holds the name on this machine."""

    identity: str
    held: socket.socket | None

    def release(self) -> None:
        """Let another node of the name start on this machine."""
        if self.held is not None:
            self.held.close()


def claim(name: str) -> Claim:
    """Make this process the only node of its name (as remapped). Takes WINDOW s, LONGEST at most.

    Raises NameTakenError where another node of that name lives.
    """
    mine, heard, held = new_identity(), {}, None
    node = rclpy.create_node(name, start_parameter_services=False, enable_rosout=False)
    executor = SingleThreadedExecutor()
    executor.add_node(node)

    def on_beat(message: String) -> None:
        beat = Beat.parse(message.data)
        if beat.name == node.get_name():
            heard[beat.identity] = beat

    try:
        held = take_on_machine(node)
        publisher = node.create_publisher(String, TOPIC, 10)
        node.create_subscription(String, TOPIC, on_beat, 10)
        begun, said = time.monotonic(), -PERIOD
        while (passed := time.monotonic() - begun) < LONGEST:
            if passed - said >= PERIOD:
                said = passed
                publisher.publish(Beat(node.get_name(), CLAIMING, mine).message())
            executor.spin_once(timeout_sec=0.02)
            if passed >= WINDOW:
                rival, listed = any(must_yield(mine, True, beat) for beat in heard.values()), is_listed_twice(node)
                if rival and listed:
                    raise NameTakenError(taken(node))
                if not rival and not listed:
                    break
    except BaseException:
        if held is not None:
            held.close()
        raise
    finally:
        executor.shutdown()
        node.destroy_node()
    return Claim(mine, held)

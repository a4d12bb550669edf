"""What a node says of itself on vla/heartbeat, and that one name has one node: a second one ends.

Two nodes of one name would both answer its services and both command the arm. So a node, before it has any service,
announces its name for half a second and listens; it ends where another node of that name, in the same domain and
namespace, is heard. Only what is heard counts: DDS lists a killed node for some 20 s, and the node that is started in
its place must run. And only who is also listed counts: a recording that is played repeats the heartbeats of its day.
"""

from __future__ import annotations

import secrets
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


def taken(node: Node) -> str:
    """What is told to the operator."""
    return (
        f"another {node.get_name()} runs in this domain and namespace ({node.get_namespace()}), and this one ends: end "
        f"the other first, or start this one in another namespace (-r __ns:=/NAME) or domain (ROS_DOMAIN_ID)"
    )


def claim(name: str) -> str:
    """The identity of this process as the only node of its name (as remapped). Takes WINDOW s, LONGEST at most.

    Raises NameTakenError where another node of that name lives.
    """
    mine, heard = new_identity(), {}
    node = rclpy.create_node(name, start_parameter_services=False, enable_rosout=False)
    executor = SingleThreadedExecutor()
    executor.add_node(node)

    def on_beat(message: String) -> None:
        beat = Beat.parse(message.data)
        if beat.name == node.get_name():
            heard[beat.identity] = beat

    try:
        publisher = node.create_publisher(String, TOPIC, 10)
        node.create_subscription(String, TOPIC, on_beat, 10)
        begun = said = time.monotonic() - PERIOD
        while (passed := time.monotonic() - begun - PERIOD) < LONGEST:
            if time.monotonic() - said >= PERIOD:
                said = time.monotonic()
                publisher.publish(Beat(node.get_name(), CLAIMING, mine).message())
            executor.spin_once(timeout_sec=0.02)
            if passed >= WINDOW:
                rival, listed = any(must_yield(mine, True, beat) for beat in heard.values()), is_listed_twice(node)
                if rival and listed:
                    raise NameTakenError(taken(node))
                if not rival and not listed:
                    break
    finally:
        executor.shutdown()
        node.destroy_node()
    return mine

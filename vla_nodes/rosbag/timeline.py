"""Bag time: the ROS clock that the nodes would have had when each message of a recording came in.

Three kinds, and which one a bag needs is found out from the bag ("auto"):
- received: when the recorder received each message. A robot's clock is the recorder's.
- topic: the recorded /clock, as nodes under use_sim_time follow it; time stands still between its messages.
- header: the newest header stamp so far. For simulated recordings without /clock, whose stamps begin near 0 while
  the recorder's clock shows the year.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from vla_nodes.rosbag.read import Bag, BagError
from vla_nodes.rosbag.topics import Topics

KINDS = ("auto", "received", "topic", "header")
STAMPED = ("color", "depth", "info", "joints")
APART = 10 * 10**9
"""ns between header stamps and receipt beyond which they are on different clocks."""
JUMP = 10**9
"""ns that the recorder's clock may go back (messages across split files) without that being a clock set back."""
BACK = 50 * 10**6
"""ns that /clock may go back without the nodes taking it for a clock set back (their jump threshold)."""
SAMPLE = 400
"""Messages looked at to find out."""


@dataclass(frozen=True)
class Event:
    """One message at its time: now in ns of bag time, the input it is for ("" for none), when it was received in ns,
    its bytes, the message (None where it is for no input), and whether the clock was set back just before it."""

    now: int
    name: str
    topic: str
    received: int
    data: bytes
    message: Any
    jumped: bool = False


def nanoseconds(stamp: Any) -> int:
    return stamp.sec * 10**9 + stamp.nanosec


def choose(bag: Bag, topics: Topics, wanted: str = "auto") -> str:
    """The kind of clock. Raises BagError for stamps that no clock can make sense of."""
    offsets = []
    stamped = {topic: Counter() for name in STAMPED if (topic := topics[name])}
    try:
        for topic, received, message in bag.messages(stamped):
            stamp = nanoseconds(message.header.stamp)
            stamped[topic][stamp == 0] += 1
            offsets.append(received - stamp)
            if len(offsets) >= SAMPLE:
                break
    except BagError:
        if not offsets:
            raise  # else the replay goes as far as the recording does, and says so
    if unstamped := [topic for topic, zero in stamped.items() if zero[True] > zero[False]]:
        problem = "header stamps are 0, so that nothing can be paired: the driver must stamp its messages"
        raise BagError(f"{bag.path}: {', '.join(unstamped)}: {problem}")
    if wanted == "topic" and topics["clock"] is None:
        raise BagError(f"{bag.path}: --clock topic, but the bag has no /clock")
    if wanted != "auto":
        return wanted
    if topics["clock"] is not None:
        return "topic"
    if offsets and abs(median(offsets)) > APART:
        apart = f"{abs(median(offsets)) * 1e-9:.0f} s apart"
        bag.notes.append(f"header stamps and receipt are {apart} and there is no /clock: time is the header stamps'")
        return "header"
    return "received"


def timeline(bag: Bag, topics: Topics, kind: str, others: Collection[str] = ()) -> Iterator[Event]:
    """The messages of all inputs, in the order of the recording, each with its time; of `others`, bytes only.

    Raises BagError where the bag ends in damage, after what came before.
    """
    inputs = topics.inputs()
    now = None if kind == "received" else _begin(bag, topics, kind)
    for topic, received, data, message in bag.decoded(inputs, others):
        name = inputs.get(topic, "")
        before = now
        jumped = False
        if kind == "received":
            jumped = before is not None and received < before - JUMP
            now = received if before is None or jumped else max(before, received)
        elif kind == "topic" and name == "clock":
            now = nanoseconds(message.clock)
            jumped = before is not None and now < before - BACK
        elif kind == "header" and name in STAMPED:
            stamp = nanoseconds(message.header.stamp)
            jumped = before is not None and name == "joints" and stamp < before - JUMP
            now = stamp if before is None or jumped else max(before, stamp)
        yield Event(now, name, topic, received, data, message, jumped)


def _begin(bag: Bag, topics: Topics, kind: str) -> int:
    """The clock's first value: before the first /clock message, the clock is taken to stand at that message."""
    names = ("clock",) if kind == "topic" else STAMPED
    told = [topic for name in names if (topic := topics[name])]
    for _, _, message in bag.messages(told):
        return nanoseconds(message.clock if kind == "topic" else message.header.stamp)
    raise BagError(f"{bag.path}: {', '.join(told)}: no messages")

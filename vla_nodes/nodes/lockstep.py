"""Holds a player back until the nodes have handled all that it has played, so that nothing depends on their speed.

The nodes are asked through their ~/progress service (see base.py): each tells its clock and how many messages of each
topic it has handled, policy_node whether it is computing, and both what they told each other.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from rclpy.qos import DurabilityPolicy
from std_srvs.srv import SetBool

from vla_nodes.nodes.base import BaseNode

READY = 300.0
"""s for nodes to come up: torch takes long to load on a busy machine."""
PATIENCE = 120.0
"""s for a policy step to end."""
AGAIN = 0.5
"""s after which /clock is told again to a node that has not taken it: it is best effort, and may be lost."""


class PlayError(RuntimeError):
    """The recording cannot be played to its end; one line says why."""


class LockStep:
    """For one player's thread. `publishers` by full topic name."""

    def __init__(
        self,
        node: BaseNode,
        names: list[str],
        publishers: dict[str, Any],
        sleep: Callable[[float], None],
        tell: Callable[[int], None],
    ) -> None:
        """
        Args:
            names: of the nodes waited for.
            sleep: sleeps for that many s, and raises when the player is to stop.
            tell: publishes /clock, ns.
        """
        self._node, self._publishers, self._sleep, self._tell = node, publishers, sleep, tell
        self._states: dict[str, dict[str, Any]] = {}
        self._clients = {name: node.create_client(SetBool, f"{name}/progress") for name in names}
        self._sent: Counter[str] = Counter()
        self._base: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        for client in self._clients.values():
            self._node.destroy_client(client)

    def wait_active(self, paced: bool) -> None:
        """Until every node waited for is active and connected to what will be played; PlayError for one that runs at
        its own pace though it should be `paced`, or the other way round."""
        end = time.monotonic() + READY
        missing = dict.fromkeys(self._clients, "is not there")
        while missing:
            if time.monotonic() > end:
                text = "; ".join(f"{name} {why}" for name, why in missing.items())
                raise PlayError(f"nodes are not ready within {READY:.0f} s: {text}")
            for name in list(missing):
                progress = self._ask([name]).get(name)
                if progress is None or not progress["active"]:
                    missing[name] = "is not active" if progress else "is not there"
                    continue
                if progress["paced"] != paced:
                    raise PlayError(f"{name}: parameter paced must be {str(paced).lower()} here (see replay.launch.py)")
                deaf = [t for t in progress["taken"] if t in self._publishers and not self._connected(t, name)]
                if deaf:
                    missing[name] = f"is not connected to {deaf[0]}"
                    continue
                self._base[name] = progress
                del missing[name]
            self._sleep(0.05)

    def sent(self, topic: str) -> None:
        """A message has been published."""
        self._sent[topic] += 1

    def due(self) -> int | None:
        """When a node next has something to do of its own (ns); as of the last `settle`."""
        return min((state["due"][0] for state in self._states.values() if state["due"] is not None), default=None)

    def ends(self) -> int | None:
        """When the policy steps under way are over (ns), None where there is none; as of the last `settle`."""
        return max((state["ends"] for state in self._states.values() if state["ends"] is not None), default=None)

    def settle(self, now: int) -> None:
        """Until all that was sent is handled at the clock `now` (ns), nothing is being computed, and all that the nodes
        have to do by then is done, in the order of the offline replay."""
        self._wait(now)
        while True:
            dues = [(state["due"], name) for name, state in self._states.items() if state["due"] is not None]
            first = min(dues, default=((now + 1, 0), ""))
            if first[0][0] > now:
                return
            self._ask([first[1]], work=True)
            self._wait(now)

    def _wait(self, now: int) -> None:
        """Until all that was sent is handled at the clock `now`, and nothing is being computed."""
        began = asked = time.monotonic()
        while why := self._unsettled(now):
            self._sleep(0.001)
            late = time.monotonic()
            if late - began > PATIENCE:
                raise PlayError(f"the nodes do not go on: {why} for {PATIENCE:.0f} s")
            if late - asked > AGAIN:
                asked = late
                if "/clock" in why:
                    self._tell(now)

    def _unsettled(self, now: int) -> str:
        """What is still awaited, or ""."""
        states = self._ask(list(self._clients))
        for name in self._clients:
            state = states.get(name)
            if state is None:
                return f"{name} does not answer"
            if state["now"] != now:
                return f"{name} has not taken /clock"
            for topic, count in state["taken"].items():
                if count - self._base[name]["taken"].get(topic, 0) < self._sent[topic]:
                    return f"{name} has not taken {topic}"
            if state["busy"]:
                return f"{name} is computing"
        self._states = states
        return self._between(states)

    def _between(self, states: dict[str, dict[str, Any]]) -> str:
        """What the nodes tell each other may be on its way."""
        for name, state in states.items():
            for topic, count in state["sent"].items():
                full = self._node.resolve_topic_name(topic)
                sent = count - self._base[name]["sent"].get(topic, 0)
                for other, taker in states.items():
                    base = self._base[other]["taken"].get(full, 0)
                    if full in taker["taken"] and taker["taken"][full] - base < sent:
                        return f"{other} has not heard {topic}"
        said = {state["status"] for state in states.values() if "status" in state}
        return "vla/status is on its way" if len(said) > 1 else ""

    def _connected(self, topic: str, name: str) -> bool:
        """Whether nothing sent is lost on the way to this node: the graph knows its subscription, and the publisher is
        connected to all that the graph knows (how many it is connected to is told, to whom is not)."""
        publisher = self._publishers[topic]
        kept = publisher.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
        # A subscription that wants what was sent before it came is never connected to a publisher that keeps nothing.
        known = [
            info.node_name for info in self._node.get_subscriptions_info_by_topic(topic)
            if kept or info.qos_profile.durability != DurabilityPolicy.TRANSIENT_LOCAL
        ]  # fmt: skip
        return name in known and publisher.get_subscription_count() >= len(known)

    def _ask(self, names: list[str], work: bool = False) -> dict[str, dict[str, Any]]:
        """{node: its progress}, of those that answer within a second; work: have them do what is due first."""
        asked = {}
        for name in names:
            if self._clients[name].service_is_ready():
                future, done = self._clients[name].call_async(SetBool.Request(data=work)), threading.Event()
                future.add_done_callback(lambda _, done=done: done.set())
                asked[name] = (future, done)
        end = time.monotonic() + 1.0
        answers = {}
        for name, (future, done) in asked.items():
            if done.wait(max(0.0, end - time.monotonic())):
                answer = future.result()
                answers[name] = {"active": answer.success, **json.loads(answer.message)}
        return answers

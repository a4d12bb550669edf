"""player_node: plays a recording into the live nodes (use_sim_time), but for the topics that they publish themselves.

Two ways. `lockstep` gives every node the time it needs: the recording's clock stands still until policy_node and
action_node (parameter `paced`) have handled every message up to it and the policy has finished its step. So nothing is
dropped, and the commands do not depend on the machine's load: they are those of `python -m vla_nodes replay`.
`rate` plays in real time, or a multiple of it, as `ros2 bag play` does: what is late is dropped, as on the robot.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from builtin_interfaces.msg import Time
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rosgraph_msgs.msg import Clock
from std_msgs.msg import String

from vla_nodes.nodes.base import OK, BaseNode, ConfigureError, run
from vla_nodes.nodes.lockstep import LockStep, PlayError
from vla_nodes.nodes.parameters import Param
from vla_nodes.nodes.recorder_node import message_type
from vla_nodes.nodes.topic_names import OURS
from vla_nodes.rosbag.read import Bag, BagError, open_bag
from vla_nodes.rosbag.timeline import Event, choose, timeline
from vla_nodes.rosbag.topics import NAMES, resolve

NOT_PLAYED = ("arm", "gripper", "chunk", "status", "active_instruction", "clock")
"""The inputs (rosbag.topics) that the live nodes publish themselves."""
LATCHED = ("tf_static", "robot_description", "camera/pose", "sim/scene")
STEP = 10_000_000
"""ns, longest step of /clock."""


class PlayerNode(BaseNode):
    """See the module's docstring."""

    params = (
        Param("bag", "", "Recording to play: a rosbag2 folder, or one storage file."),
        Param("mode", "lockstep", "lockstep: wait for the nodes; rate: in real time.", choices=("lockstep", "rate")),
        Param("rate", 1.0, "Seconds of recording per second; in lock step at most.", 0.01, 100.0),
        Param("instruction", "", "Given at the start, in place of those of the recording."),
        Param("remap", [""], "Pairs 'our_topic:=topic_of_the_recording', as for python -m vla_nodes replay."),
        Param("exclude_topics", OURS, "Topics not played: what the nodes say themselves."),
        Param("wait_for", ["policy_node", "action_node"], "Nodes that must be active, and that lock step waits for."),
        Param("end_with_bag", True, "End the process at the end of the recording."),
    )

    def __init__(self) -> None:
        super().__init__("player_node")
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._made_bag: Bag | None = None
        self._made_lockstep: LockStep | None = None

    @property
    def _bag(self) -> Bag:
        """What configure made; only asked for between configure and cleanup."""
        assert self._made_bag is not None, "not configured"
        return self._made_bag

    @property
    def _lockstep(self) -> LockStep:
        """What configure made; only asked for between configure and cleanup."""
        assert self._made_lockstep is not None, "not configured"
        return self._made_lockstep

    # -- lifecycle ---------------------------------------------------------------------------------
    def configure(self) -> None:
        try:
            self._made_bag = open_bag(self.value("bag"))
            self._topics = resolve(self._bag, [text for text in self.value("remap") if text])
            self._kind = choose(self._bag, self._topics)
        except BagError as error:
            raise ConfigureError(str(error)) from None
        inputs = self._topics.inputs()
        excluded = {self.resolve_topic_name(name) for name in self.value("exclude_topics")} | {"/clock"}
        self._others = [name for name in self._bag.topics if name not in inputs and name not in excluded]
        self._names = {topic: NAMES[name][0] for topic, name in inputs.items() if name not in NOT_PLAYED}
        self._names |= {name: name for name in self._others}
        self._outputs = {}
        for topic, name in list(self._names.items()):
            try:
                full = self.resolve_topic_name(name)
                self._outputs[full] = self.publish_on(message_type(self._bag.topics[topic]), name, _qos(name))
                self._names[topic] = full
            except ImportError as error:
                del self._names[topic]
                self.get_logger().warning(f"{topic} is not played: {error}")
        self._instruction = self.resolve_topic_name("instruction")
        if self._instruction not in self._outputs:
            self._outputs[self._instruction] = self.publish_on(String, "instruction", _qos("instruction"))
        self._clock_pub = self.publish_on(Clock, "/clock")
        self._locked = self.value("mode") == "lockstep"
        self._made_lockstep = LockStep(self, self.value("wait_for"), self._outputs, self._sleep, self._tell)
        self._played = 0

    def activate(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="player", daemon=True)
        self._thread.start()

    def deactivate(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def cleanup(self) -> None:
        if self._made_lockstep is not None:
            self._lockstep.close()
            self._made_lockstep = None
        if self._made_bag is not None:
            self._bag.close()
            self._made_bag = None

    def diagnostics(self) -> tuple[bytes, str, dict[str, object]]:
        return OK, "playing", {"messages played": self._played, "bag": self.value("bag")}

    # -- the player's thread -----------------------------------------------------------------------
    def _run(self) -> None:
        status = 1
        try:
            self._play()
            status = 0
        except _Stopped:
            return
        except (BagError, PlayError) as error:
            self.get_logger().error(str(error))
        if self.value("end_with_bag"):
            self.end_process(status)

    def _play(self) -> None:
        self._lockstep.wait_active(self._locked)
        text = f"{self._bag.duration:.1f} s, {self.value('mode')}, time is {self._kind}"
        self.get_logger().info(f"playing {self._bag.path}: {text}")
        given = self.value("instruction")
        self._instructed = bool(given)
        self._now = 0
        self._began = time.monotonic()
        for event in self._events():
            if not self._now or event.jumped:
                self._jump(event.now)
                if given and not self._played:
                    self._publish(self._instruction, _text(given))
            self._advance(event.now)
            self._pass_on(event, bool(given))
        if self._locked and (ends := self._lockstep.ends()) is not None:
            self._advance(ends)  # the last step is not finished yet
        self.get_logger().info(f"played {self._played} messages in {time.monotonic() - self._began:.1f} s")

    def _events(self) -> Iterator[Event]:
        return (e for e in timeline(self._bag, self._topics, self._kind, self._others) if e.now > 0)

    def _pass_on(self, event: Event, given: bool) -> None:
        if event.name == "active_instruction" and event.message.data and not self._instructed:
            # what was in force when the recording began; afterwards the nodes say this themselves
            self._instructed = True
            self._publish(self._instruction, _text(event.message.data))
        elif event.name == "instruction" and given:
            return
        elif event.topic in self._names:
            self._instructed |= event.name == "instruction"
            self._publish(self._names[event.topic], event.data)

    def _publish(self, topic: str, data: bytes) -> None:
        self._outputs[topic].publish(data)
        self._played += 1
        if self._locked:
            self._lockstep.sent(topic)
            self._lockstep.settle(self._now)

    # -- time --------------------------------------------------------------------------------------
    def _jump(self, now: int) -> None:
        """The recording begins, or its clock was set back."""
        self._origin, self._began_at = now, time.monotonic()
        self._at(now)

    def _advance(self, target: int) -> None:
        """Move the clock on in small steps, and to each time at which a node has something to do of its own."""
        while self._now < target:
            due = self._lockstep.due() if self._locked else None
            now = min(target, self._now + STEP, target if due is None else max(due, self._now + 1))
            ahead = (now - self._origin) * 1e-9 / self.value("rate") - (time.monotonic() - self._began_at)
            if ahead > 0:
                self._sleep(ahead)
            elif self._locked:
                self._began_at -= ahead  # time that the nodes took is not caught up
            self._at(now, now == target or due is not None and due <= now)
        self._sleep(0.0)

    def _at(self, now: int, settle: bool = True) -> None:
        self._now = now
        self._tell(now)
        if self._locked and settle:
            self._lockstep.settle(now)

    def _tell(self, now: int) -> None:
        self._clock_pub.publish(Clock(clock=Time(sec=now // 10**9, nanosec=now % 10**9)))

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds) if seconds > 0 else self._stop.is_set():
            raise _Stopped


class _Stopped(Exception):
    """The node is being deactivated."""


def _text(data: str) -> bytes:
    return serialize_message(String(data=data))


def _qos(name: str) -> QoSProfile:
    latched = name.endswith(LATCHED)
    return QoSProfile(
        depth=1 if latched else 10,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def main(args: list[str] | None = None) -> int:
    return run(PlayerNode, args, once=True)


if __name__ == "__main__":
    raise SystemExit(main())

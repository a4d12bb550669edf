"""recorder_node: what the robot saw, was told and did, as rosbag2 folders that survive whatever ends the recording.

Messages are taken serialised and written untouched, by `rosbag.recorder`; topics are found as their publishers appear,
with the QoS that those offer. One bag is one episode: the services vla/record/start, stop, success, failure and discard
(std_srvs/Trigger) begin, end and mark it.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from std_msgs.msg import String
from std_srvs.srv import Trigger

from vla_nodes.msg import PolicyStatus
from vla_nodes.nodes.base import AUTOSTART, ERROR, OK, WARN, BaseNode, ConfigureError, run
from vla_nodes.nodes.parameters import Param
from vla_nodes.nodes.provenance import Provenance
from vla_nodes.rosbag import mcap_records
from vla_nodes.rosbag.message_definitions import topic as described
from vla_nodes.rosbag.metadata import Qos
from vla_nodes.rosbag.recorder import Recording, RecordingError

CAMERA, DEPTH = "camera/color", "camera/aligned_depth_to_color"
ROBOT_DESCRIPTION, ACTIVE, STATUS = "robot_description", "vla/active_instruction", "vla/status"
TOPICS = [
    f"{CAMERA}/image_raw",
    f"{CAMERA}/camera_info",
    f"{DEPTH}/image_raw",
    f"{DEPTH}/camera_info",
    "camera/pose",
    "joint_states",
    "instruction",
    ACTIVE,
    "vla/action_chunk",
    STATUS,
    "arm_controller/joint_trajectory",
    "gripper_controller/joint_trajectory",
    "/clock",
    "/tf",
    "/tf_static",
    ROBOT_DESCRIPTION,
]
"""All that the pipeline takes and gives, so that a replay can be compared with what happened."""
LOOK_PERIOD = 0.2
"""s between two looks at which publishers there are."""
DEPTH_OF_QUEUE = 50
MARKS = {"success": "success", "failure": "failure", "discard": "discarded"}


class RecorderNode(BaseNode):
    """See the module's docstring."""

    params = (
        dataclasses.replace(AUTOSTART, default=True),  # `ros2 run vla_nodes recorder_node` records; nothing moves
        Param("out", "recordings", "Folder in which each episode becomes a rosbag2 folder."),
        Param("topics", TOPICS, "Topics to record; relative names are resolved in the node's namespace."),
        Param("extra_topics", [""], "Topics to record besides."),
        Param("record_at_start", True, "Begin an episode at activation; else wait for vla/record/start."),
        Param("duration", 0.0, "End the recording after this long [s]; 0: record on.", 0.0, 1e6),
        Param("end_with_recording", False, "End the process when duration is over or the disk is full."),
        Param("compression", "zstd", "Compression of the MCAP chunks.", choices=mcap_records.COMPRESSIONS),
        Param("compression_level", -1, "Level of it; -1: the fastest.", -1, 19),
        Param("flush_period", 0.25, "Longest time a message waits before it is on the disk [s].", 0.05, 60.0),
        Param("backlog", 256, "Most that waits for a slow disk before messages are dropped [MB].", 16, 16384),
        Param("min_free", 200, "Space left free on the disk: below it the recording ends [MB].", 0, 10**6),
        Param("provenance", True, "Ask the suite's nodes for their parameters, and record them with the episode."),
    )

    def __init__(self) -> None:
        super().__init__("recorder_node")
        self._made_recording: Recording | None = None
        self._provenance: Provenance | None = None

    @property
    def recording(self) -> Recording:
        """What configure made; only asked for between configure and cleanup."""
        assert self._made_recording is not None, "not configured"
        return self._made_recording

    # -- lifecycle ---------------------------------------------------------------------------------
    def configure(self) -> None:
        level = self.value("compression_level")
        try:
            self._made_recording = Recording(
                Path(self.value("out")).expanduser(),
                self.get_logger().info,
                compression=self.value("compression"),
                level=None if level < 0 else level,
                flush_period=self.value("flush_period"),
                backlog_bytes=self.value("backlog") << 20,
                min_free=self.value("min_free") << 20,
            )
        except OSError as error:
            raise ConfigureError(f"parameter out: cannot record to {self.value('out')}: {error.strerror}") from None
        names = [name for name in (*self.value("topics"), *self.value("extra_topics")) if name]
        self._wanted = {self.resolve_topic_name(name) for name in names}
        self._heard: dict[str, tuple[Any, Qos]] = {}
        self._refused: set[str] = set()
        self._taken: dict[str, int] = {}
        self._special = {
            self.resolve_topic_name(ACTIVE): self._on_instruction,
            self.resolve_topic_name(STATUS): self._on_status,
            self.resolve_topic_name(ROBOT_DESCRIPTION): self._on_description,
        }
        self._told_error = ""
        self._checkpoint = ""
        self._provenance = Provenance(self, self.recording.describe) if self.value("provenance") else None
        self.serve(Trigger, "vla/record/start", self._on_start)
        self.serve(Trigger, "vla/record/stop", self._on_stop)
        for name, outcome in MARKS.items():
            self.serve(Trigger, f"vla/record/{name}", self._marks(outcome))
        self.every(LOOK_PERIOD, self._look)

    def activate(self) -> None:
        self._look()
        if self.value("record_at_start"):
            self._start()
        self._began = time.monotonic()

    def deactivate(self) -> None:
        self.recording.close()

    def cleanup(self) -> None:
        if self._made_recording is not None:
            self.recording.close()
            self._made_recording = None
        if self._provenance is not None:
            self._provenance.close()
            self._provenance = None

    def clock_jumped(self) -> None:
        self.recording.restart("the clock was set back")

    def diagnostics(self) -> tuple[bytes, str, dict[str, object]]:
        recording = self.recording
        bag = recording.bag
        missing = sorted(self._wanted - set(self._heard))
        values: dict[str, object] = {
            "recording": "nothing" if bag is None else bag.folder,
            "episodes": recording.episodes,
            "topics without a publisher": ", ".join(missing) or "none",
        }
        if bag is not None:
            values |= {"messages on the disk": bag.messages, "dropped": bag.dropped, "MB": f"{bag.size() / 1e6:.1f}"}
        if recording.error:
            return ERROR, recording.error, values
        if bag is not None and bag.dropped:
            return WARN, f"{bag.dropped} messages dropped: the disk does not keep up", values
        return OK, "waiting for vla/record/start" if bag is None else "recording", values

    # -- topics ------------------------------------------------------------------------------------
    def _look(self) -> None:
        """Subscribe what is wanted and has a publisher now; notice the end of a recording."""
        for name in self._wanted:
            publishers = self.get_publishers_info_by_topic(name)
            if publishers:
                self._follow(name, publishers)
        recording = self.recording
        if recording.error and recording.error != self._told_error:
            self._told_error = recording.error
            self.get_logger().error(recording.error)
            self._over(1)
        limit = self.value("duration")
        if self.active and limit and time.monotonic() - self._began > limit:
            recording.close()
            self._over(0)
        if self._provenance is not None and recording.running:
            self._provenance.look()

    def _over(self, status: int) -> None:
        if self.value("end_with_recording"):
            self.end_process(status)

    def _follow(self, name: str, publishers: list[Any]) -> None:
        profiles = [p.qos_profile for p in publishers]
        qos = Qos(
            reliable=all(p.reliability == ReliabilityPolicy.RELIABLE for p in profiles),
            latched=all(p.durability == DurabilityPolicy.TRANSIENT_LOCAL for p in profiles),
            depth=max(1, *(p.depth for p in profiles)),
        )
        before = self._heard.get(name)
        if before is not None and before[1] == qos or name in self._refused:
            return
        kind = publishers[0].topic_type
        try:
            cls = message_type(kind)
            self.recording.declare(described(name, kind, qos))
        except (ImportError, AttributeError, ValueError) as error:
            self._refused.add(name)
            self.get_logger().warning(f"{name} is not recorded: {error}")
            return
        if before is not None:  # publishers came or went: the weakest of the offered QoS hears them all
            self.destroy_subscription(before[0])
            self._resources.remove(before[0])
        profile = QoSProfile(
            depth=DEPTH_OF_QUEUE,
            reliability=ReliabilityPolicy.RELIABLE if qos.reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if qos.latched else DurabilityPolicy.VOLATILE,
        )
        special = self._special.get(name)

        def take(data: bytes) -> None:
            self.recording.take(name, self.get_clock().now().nanoseconds, data)
            if special is not None:
                special(data)

        made = self.create_subscription(cls, name, self._until_cleanup(take), profile, raw=True)
        self._heard[name] = (self._keep(made), qos)

    # -- what goes into the metadata ---------------------------------------------------------------
    def _on_instruction(self, data: bytes) -> None:
        if text := deserialize_message(data, String).data:
            self.recording.note(instruction=text)

    def _on_status(self, data: bytes) -> None:
        checkpoint = deserialize_message(data, PolicyStatus).checkpoint
        if checkpoint != self._checkpoint:
            self._checkpoint = checkpoint
            self.recording.note(checkpoint=checkpoint)

    def _on_description(self, data: bytes) -> None:
        self.recording.describe("robot_description", {"urdf": deserialize_message(data, String).data})

    # -- services ----------------------------------------------------------------------------------
    def _start(self) -> str:
        answer = self.recording.start()
        if self._provenance is not None:
            self._provenance.again()
        return answer

    def _on_start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if not self.active:
            response.message = "recorder_node is not active"
            return response
        return self._answer(response, self._start)

    def _on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._answer(response, self.recording.stop)

    def _marks(self, outcome: str) -> Callable[[Trigger.Request, Trigger.Response], Trigger.Response]:
        """The service that marks the recording with an outcome."""
        return lambda _, response: self._answer(response, self.recording.mark, outcome)

    def _answer(self, response: Trigger.Response, what: Any, *arguments: str) -> Trigger.Response:
        try:
            response.message = what(*arguments)
            response.success = True
        except (RecordingError, OSError) as error:
            response.message = str(error)
            self.get_logger().warning(str(error))
        return response


def message_type(kind: str) -> type:
    """The class of "package/msg/Name". ImportError or AttributeError where it is not installed."""
    package, _, name = kind.partition("/msg/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError):
        raise ImportError(f"its type {kind} is not installed here") from None


def main(args: list[str] | None = None) -> int:
    return run(RecorderNode, args)


if __name__ == "__main__":
    raise SystemExit(main())

"""The operator's side of ./run: brings the nodes up, gives the instruction, and listens."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from vla_nodes.messages.images import decode_color
from vla_nodes.msg import ActionChunk, PolicyStatus

LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
LATEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
STATES = {
    getattr(PolicyStatus, name): name
    for name in ("INACTIVE", "WAITING_INSTRUCTION", "WAITING_OBSERVATION", "HOLDING", "RUNNING", "DONE")
}


class DemoError(RuntimeError):
    """The run cannot go on; the message says why and where to look."""


class Client(Node):
    """Subscriptions to everything a run reports, and the services that drive it.

    `now` is simulated time [s]; the latest of each message is kept; `on_frame` and `on_status` are called as they come.
    """

    def __init__(self) -> None:
        super().__init__("demo")
        self.now = 0.0
        self.status: PolicyStatus | None = None
        self.joints: dict[str, float] = {}
        self.task: dict[str, Any] = {}
        self.active_instruction = ""
        self.chunks = 0
        self.frames = 0
        self.on_frame: Callable[[float, np.ndarray], None] = lambda stamp, image: None
        self.on_status: Callable[[PolicyStatus], None] = lambda status: None
        self.alive: Callable[[], None] = lambda: None
        self._instruction = self.create_publisher(String, "instruction", 10)
        self.create_subscription(Clock, "/clock", self._on_clock, LATEST)
        self.create_subscription(PolicyStatus, "vla/status", self._on_status, 10)
        self.create_subscription(ActionChunk, "vla/action_chunk", self._on_chunk, 10)
        self.create_subscription(String, "vla/active_instruction", self._on_active_instruction, LATCHED)
        self.create_subscription(String, "sim/task_status", self._on_task, 10)
        self.create_subscription(JointState, "joint_states", self._on_joints, LATEST)
        self.create_subscription(Image, "camera/color/image_raw", self._on_image, LATEST)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)

    def spin_until(self, met: Callable[[], bool], seconds: float, what: str) -> None:
        """Handle messages until `met()`; DemoError with `what` after `seconds` of steady time.

        `alive` is called several times a second and may raise.
        """
        deadline = time.monotonic() + seconds
        checked = 0.0
        while not met():
            self._executor.spin_once(timeout_sec=0.05)
            now = time.monotonic()
            if now - checked > 0.2:
                checked = now
                self.alive()
            if now > deadline:
                raise DemoError(f"{what} within {seconds:.0f} s")

    def call(self, kind: type, name: str, request: Any, seconds: float) -> Any:
        """Call a service and give its response."""
        client = self.create_client(kind, name)
        self.spin_until(client.service_is_ready, seconds, f"service {name} did not come up")
        future = client.call_async(request)
        self.spin_until(future.done, seconds, f"service {name} did not answer")
        self.destroy_client(client)
        return future.result()

    def bring_up(self, names: list[str], seconds: float) -> None:
        """Configure, then activate every node; all nodes take each step at the same time."""
        clients = {name: self.create_client(ChangeState, f"{name}/change_state") for name in names}
        for label, transition in (
            ("configure", Transition.TRANSITION_CONFIGURE),
            ("activate", Transition.TRANSITION_ACTIVATE),
        ):
            request = ChangeState.Request(transition=Transition(id=transition))
            futures: dict[str, Any] = {}

            def done(label: str = label, request: Any = request, futures: dict[str, Any] = futures) -> bool:
                for name, client in clients.items():
                    if name not in futures and client.service_is_ready():
                        futures[name] = client.call_async(request)
                for name, future in futures.items():
                    if future.done() and not future.result().success:
                        raise DemoError(f"{name} cannot {label}: see what it says above and in its log")
                return len(futures) == len(clients) and all(f.done() for f in futures.values())

            self.spin_until(done, seconds, f"nodes did not {label}")
        for client in clients.values():
            self.destroy_client(client)

    def instruct(self, text: str) -> None:
        """Publish an instruction once the policy listens."""
        self.spin_until(
            lambda: self._instruction.get_subscription_count() > 0, 20.0, "nobody subscribed to 'instruction'"
        )
        self._instruction.publish(String(data=text))

    def record(self, what: str) -> str:
        """Begin an episode's bag ("start"), or end and mark it ("success", "failure"); what the recorder answers."""
        answer = self.call(Trigger, f"vla/record/{what}", Trigger.Request(), 10.0)
        if not answer.success:
            raise DemoError(f"recorder_node: {answer.message}")
        return answer.message

    def withdraw(self) -> None:
        """Have no instruction in force, so that the arm does not carry an old one into a new scene."""
        self.instruct("")
        self.spin_until(lambda: not self.active_instruction, 20.0, "the instruction was not withdrawn")

    def reset(self, seed: int, scene: str) -> None:
        """A new scene (see sim_node's parameters); simulated time starts anew, and no instruction is in force."""
        self.withdraw()
        number = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=seed)
        word = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=scene)
        request = SetParameters.Request(
            parameters=[Parameter(name="seed", value=number), Parameter(name="scene", value=word)]
        )
        for result in self.call(SetParameters, "sim_node/set_parameters", request, 10.0).results:
            if not result.successful:
                raise DemoError(f"sim_node refuses scene {scene} with seed {seed}: {result.reason}")
        before = self.now
        answer = self.call(Trigger, "sim/reset", Trigger.Request(), 60.0)
        if not answer.success:
            raise DemoError(f"sim/reset: {answer.message}")
        self.task = {}
        self.spin_until(
            lambda: self.now < before and self.task.get("time", before) < before, 10.0, "the scene did not restart"
        )
        # What the arm was held for in the old scene (it pressed on something, say) is not there in the new one.
        self.call(Trigger, "vla/resume", Trigger.Request(), 10.0)

    def _on_clock(self, message: Clock) -> None:
        self.now = message.clock.sec + 1e-9 * message.clock.nanosec

    def _on_status(self, message: PolicyStatus) -> None:
        self.status = message
        self.on_status(message)

    def _on_chunk(self, message: ActionChunk) -> None:
        self.chunks += 1

    def _on_active_instruction(self, message: String) -> None:
        self.active_instruction = message.data

    def _on_task(self, message: String) -> None:
        self.task = json.loads(message.data)

    def _on_joints(self, message: JointState) -> None:
        self.joints = dict(zip(message.name, message.position, strict=True))

    def _on_image(self, message: Image) -> None:
        self.frames += 1
        stamp = message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec
        image = decode_color(
            message.data, message.height, message.width, message.step, message.encoding, message.is_bigendian
        )
        self.on_frame(stamp, image)


def finite(value: float, text: str = "{:.0f}") -> str:
    """A number as text, or '-' for NaN."""
    return text.format(value) if math.isfinite(value) else "-"

"""A camera's pose on the robot: subscribes what the chosen source needs; the rules are messages/camera_pose.py's."""

from __future__ import annotations

from collections.abc import Sequence

from geometry_msgs.msg import PoseStamped
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from vla_nodes.messages.camera_pose import CameraPose
from vla_nodes.nodes.base import LATCHED, BaseNode, ConfigureError

TF = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
TF_STATIC = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
"""As tf2_ros subscribes them."""


class LiveCameraPose:
    """See messages/camera_pose.py."""

    def __init__(self, node: BaseNode, source: str, base: str, written: Sequence[float], camera: str) -> None:
        """written, camera: as CameraPose. Raises ConfigureError where the source cannot serve."""
        self._node = node
        try:
            self._pose = CameraPose(source, base, written, camera)
        except ValueError as error:
            raise ConfigureError(f"parameter {camera}_pose: {error}") from error
        self.at, self.clear = self._pose.at, self._pose.clear
        if source == "topic":
            self._pose.problem = (  # until one comes
                f"no {camera}/pose received: is camera_node active? Or set camera_pose_source to parameter or tf"
            )
            node.subscribe(PoseStamped, f"{camera}/pose", self._on_pose, LATCHED)
        elif source == "tf":
            try:
                from tf2_msgs.msg import TFMessage
            except ImportError:
                raise ConfigureError(
                    "camera_pose_source is tf, but tf2_msgs is not installed: install ros-jazzy-tf2-msgs, "
                    "or use camera_pose_source topic or parameter"
                ) from None
            node.subscribe(TFMessage, "/tf", lambda message: self._pose.transforms(message, False), TF)
            node.subscribe(TFMessage, "/tf_static", lambda message: self._pose.transforms(message, True), TF_STATIC)

    def problem(self) -> str:
        return self._pose.problem

    def _on_pose(self, message: PoseStamped) -> None:
        if problem := self._pose.pose(message):
            self._node.get_logger().error(problem)

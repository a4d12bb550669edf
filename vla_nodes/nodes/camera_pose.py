"""Where the camera stands: the pose of its colour optical frame in the robot's base, from the source chosen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from geometry_msgs.msg import PoseStamped

from vla_nodes.nodes.base import LATCHED, BaseNode, ConfigureError
from vla_nodes.pipeline.messages import matrix_from, pose_matrix

SOURCES = ("topic", "parameter", "tf")


class CameraPose:
    """Pose by source: "topic" (latched camera/pose), "parameter" (a calibration written down), or "tf" (tf2_ros)."""

    def __init__(self, node: BaseNode, source: str, base: str, written: Sequence[float]) -> None:
        """Raises ConfigureError where the source cannot serve."""
        self._node, self._source, self._base = node, source, base
        self._matrix: np.ndarray | None = None
        self._problem = ""
        if source == "parameter":
            try:
                self._matrix = matrix_from(written)
            except ValueError as error:
                raise ConfigureError(f"parameter camera_pose: {error}") from error
        elif source == "topic":
            self._problem = (
                "no camera/pose received: is camera_node active? Or set camera_pose_source to parameter or tf"
            )
            node.subscribe(PoseStamped, "camera/pose", self._on_pose, LATCHED)
        else:
            self._listen()

    def matrix(self) -> np.ndarray | None:
        """(4, 4) optical frame in base, or None while it is not known."""
        if self._source == "tf":
            self._look_up()
        return self._matrix

    def problem(self) -> str:
        return self._problem if self._matrix is None else ""

    def _on_pose(self, message: PoseStamped) -> None:
        if message.header.frame_id != self._base:
            self._problem = f"camera/pose is in frame '{message.header.frame_id}', base_frame is '{self._base}'"
            self._matrix = None
        else:
            try:
                self._matrix = pose_matrix(message.pose)
                return
            except ValueError as error:
                self._problem, self._matrix = f"camera/pose: {error}", None
        self._node.get_logger().error(self._problem)

    def _listen(self) -> None:
        try:
            from tf2_ros import Buffer, TransformListener
        except ImportError:
            raise ConfigureError(
                "camera_pose_source is tf, but tf2_ros is not installed: install ros-jazzy-tf2-ros-py, "
                "or use camera_pose_source topic or parameter"
            ) from None
        self._buffer = Buffer()
        self._listener = TransformListener(self._buffer, self._node)
        self._optical = "camera_color_optical_frame"
        self._problem = f"no transform from {self._base} to {self._optical} yet"

    def _look_up(self) -> None:
        from rclpy.time import Time
        from tf2_ros import TransformException

        try:
            transform = self._buffer.lookup_transform(self._base, self._optical, Time()).transform
        except TransformException as error:
            self._problem = f"no transform from {self._base} to {self._optical}: {error}"
            self._matrix = None
            return
        p, o = transform.translation, transform.rotation
        self._matrix = matrix_from([p.x, p.y, p.z, o.x, o.y, o.z, o.w])

"""camera_node: RGB-D as every ROS driver publishes it (colour, depth aligned to it, their camera_infos, one stamp)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, Image

from vla_nodes.messages.convert import seconds
from vla_nodes.messages.images import encode_depth
from vla_nodes.nodes.base import ERROR, LATCHED, OK, WARN, BaseNode, run
from vla_nodes.nodes.camera_sources import SOURCES, CameraSource, Frame
from vla_nodes.nodes.liveness import Change, Rate
from vla_nodes.nodes.parameters import Param
from vla_nodes.nodes.robot_parameter import CONTRACT, robot_description
from vla_nodes.nodes.to_messages import camera_info, image, pose

DEPTH_TOPIC = "camera/aligned_depth_to_color"


class CameraNode(BaseNode):
    """Publishes what a `CameraSource` delivers; stamps are the exposure's and never rewritten."""

    params = (
        Param("source", "sim", "Camera: sim (rendered from sim_node's state).", choices=tuple(SOURCES)),
        Param("width", 224, "Width of the images [pixels].", 64, 4096),
        Param("height", 224, "Height of the images [pixels].", 64, 4096),
        Param("rate", 20.0, "Frames per second [Hz].", 0.5, 120.0),
        Param("depth_encoding", "32FC1", "32FC1 (metres) or 16UC1 (millimetres), REP 118.", choices=("32FC1", "16UC1")),
        Param(
            "optical_frame", "camera_color_optical_frame", "Frame of the images (REP 103: z forward, x right, y down)."
        ),
        CONTRACT,
        Param("publish_tf", True, "Broadcast the camera's pose on /tf_static where tf2_msgs is installed."),
    )

    def __init__(self) -> None:
        super().__init__("camera_node")
        self._made_source: CameraSource | None = None

    @property
    def _source(self) -> CameraSource:
        """What configure made; only asked for between configure and cleanup."""
        assert self._made_source is not None, "not configured"
        return self._made_source

    def configure(self) -> None:
        self._frame = self.value("optical_frame")
        self._base = robot_description(self.value("contract")).robot.base_frame
        if not self._frame or self._frame.startswith("/"):
            raise ValueError(
                f"parameter optical_frame is '{self._frame}': tf2 frames are not empty and have no leading slash"
            )
        options = QoSOverridingOptions.with_default_policies()

        def publish(kind: type, topic: str) -> Any:
            depth = 2 if kind is Image else 10  # an image is large and soon old; a camera_info is neither
            qos = QoSProfile(depth=depth, reliability=ReliabilityPolicy.RELIABLE)
            return self.publish_on(kind, topic, qos, qos_overriding_options=options)

        self._color_pub = publish(Image, "camera/color/image_raw")
        self._color_info_pub = publish(CameraInfo, "camera/color/camera_info")
        self._depth_pub = publish(Image, f"{DEPTH_TOPIC}/image_raw")
        self._depth_info_pub = publish(CameraInfo, f"{DEPTH_TOPIC}/camera_info")
        self._pose_pub = self.publish_on(PoseStamped, "camera/pose", LATCHED)
        self._tf_pub = self._static_transform_publisher()
        self._encoding = self.value("depth_encoding")
        self._rate = Rate()
        self._last: float | None = None
        self._cost = 0.0
        source = SOURCES[self.value("source")](self, self.value("width"), self.value("height"), self.value("rate"))
        source.deliver, source.pose_changed = self._on_frame, self._on_pose
        self._made_source = source
        source.open()
        self.inputs.expect(source.input_name)

    def activate(self) -> None:
        self._source.start()

    def deactivate(self) -> None:
        self._source.stop()

    def cleanup(self) -> None:
        if self._made_source is not None:
            self._source.close()
            self._made_source = None

    def clock_jumped(self) -> None:
        self._last = None

    def input_changed(self, change: Change) -> None:
        self._rate = Rate()

    def diagnostics(self) -> tuple[bytes, str, dict[str, object]]:
        now = time.monotonic()
        hz, wanted = self._rate.hz(now), self.value("rate")
        values = {
            "rate [Hz]": f"{hz:.1f}",
            "rate wanted [Hz]": wanted,
            "frames": self._rate.count,
            "age of the last frame [s]": "none yet" if self._last is None else f"{self.now() - self._last:.3f}",
            "time to publish [ms]": f"{1e3 * self._cost:.1f}",
            "source": self.value("source"),
        }
        if problem := self._source.state():
            return ERROR, problem, values
        if hz < 0.5 * wanted:
            return WARN, f"{hz:.1f} Hz of {wanted:.0f} Hz", values
        return OK, f"{hz:.1f} Hz", values

    def _on_frame(self, frame: Frame) -> None:
        begin = time.perf_counter()
        stamp, optical = frame.stamp, self._frame
        height, width = frame.color.shape[:2]
        self._color_info_pub.publish(camera_info(frame.intrinsics, width, height, stamp, optical))
        self._color_pub.publish(image(frame.color, "rgb8", stamp, optical))
        height, width = frame.depth.shape
        self._depth_info_pub.publish(camera_info(frame.intrinsics, width, height, stamp, optical))
        data, step = encode_depth(frame.depth, self._encoding)
        self._depth_pub.publish(image(data, self._encoding, stamp, optical, step, width))
        now = time.monotonic()
        self._rate.tick(now)
        self.inputs.heard(self._source.input_name, now)
        self._last = seconds(stamp)
        self.keep_time()
        self._cost += 0.1 * (time.perf_counter() - begin - self._cost)

    def _on_pose(self, matrix: np.ndarray) -> None:
        message = PoseStamped(pose=pose(matrix))
        message.header.stamp = self.get_clock().now().to_msg()
        message.header.frame_id = self._base
        self._pose_pub.publish(message)
        if self._tf_pub is not None:
            self._tf_pub.publish(self._transform(message))

    def _static_transform_publisher(self) -> Any:
        """/tf_static where its message type is installed; without it `camera/pose` stands alone."""
        if not self.value("publish_tf"):
            return None
        try:
            from tf2_msgs.msg import TFMessage
        except ImportError:
            self.get_logger().info("tf2_msgs is not installed: the camera's pose is on camera/pose only")
            return None
        return self.publish_on(TFMessage, "/tf_static", LATCHED)

    def _transform(self, message: PoseStamped) -> Any:
        from geometry_msgs.msg import TransformStamped
        from tf2_msgs.msg import TFMessage

        transform = TransformStamped(header=message.header, child_frame_id=self._frame)
        position = message.pose.position
        translation = transform.transform.translation
        translation.x, translation.y, translation.z = position.x, position.y, position.z
        transform.transform.rotation = message.pose.orientation
        return TFMessage(transforms=[transform])


def main(args: list[str] | None = None) -> int:
    return run(CameraNode, args)


if __name__ == "__main__":
    raise SystemExit(main())

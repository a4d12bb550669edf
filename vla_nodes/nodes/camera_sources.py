"""Where camera_node's pictures come from. A source is small: it starts, hands over frames, and stops.

A frame's colour and depth belong to one exposure and are aligned: depth is in the colour camera's pixels. A new kind
of camera is a class here and an entry in `SOURCES`; the node does not change.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from builtin_interfaces.msg import Time
from std_msgs.msg import String

from vla_nodes.messages.convert import seconds
from vla_nodes.nodes.base import LATCHED, RELIABLE_LATEST, BaseNode

if TYPE_CHECKING:  # MuJoCo: only where a simulated camera is used
    from vla_nodes.envs.tabletop.camera import Camera


@dataclass(frozen=True)
class Frame:
    """One RGB-D exposure."""

    stamp: Time
    """time of exposure"""
    color: np.ndarray
    """(H, W, 3) uint8 RGB"""
    depth: np.ndarray
    """(H, W) float32 m along the optical axis, 0 = no reading"""
    intrinsics: np.ndarray
    """(3, 3) K of the colour camera, in pixels"""


class CameraSource(ABC):
    """What camera_node asks of a camera. All calls come from the node's one thread."""

    input_name = ""
    """Topic or device whose silence the node reports."""

    def __init__(self, node: BaseNode, width: int, height: int, rate: float) -> None:
        self.node, self.width, self.height, self.rate = node, width, height, rate
        self.deliver: Callable[[Frame], None] = lambda frame: None
        self.pose_changed: Callable[[np.ndarray], None] = lambda pose: None

    @abstractmethod
    def open(self) -> None:
        """Get ready (at configure); raise with one clear line where the camera is not to be had."""

    @abstractmethod
    def start(self) -> None:
        """Deliver frames from now on, at most `rate` per second, newest first, none queued."""

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def state(self) -> str:
        """One line: "" when all is well, else what is missing."""
        return ""


class SceneMirror:
    """Shows the simulator's state as the simulated camera would see it: a second world, never stepped. No ROS."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.scene_id = ""
        self._camera: Camera | None = None

    def load(self, message: str) -> np.ndarray:
        """Take the JSON of sim/scene; returns the (4, 4) pose of the camera's optical frame in base.

        Raises:
            ValueError: text that is no scene.
        """
        from vla_nodes.envs.tabletop.camera import Camera
        from vla_nodes.envs.tabletop.scene import Scene
        from vla_nodes.envs.tabletop.world import World

        try:
            raw = json.loads(message)
            scene_id, scene = str(raw["id"]), Scene.from_json(json.dumps(raw["scene"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"sim/scene carries no scene: {error!r}") from error
        self.close()
        self._camera = Camera(World(scene), self.width, self.height)
        self.scene_id = scene_id
        return self._camera.pose

    def render(self, qpos: np.ndarray, stamp: Time) -> Frame:
        """Raises ValueError where the state does not fit the scene."""
        if self._camera is None:
            raise ValueError("no scene yet")
        self._camera.world.set_qpos(qpos)
        rgbd = self._camera.render()
        return Frame(stamp, rgbd.color, rgbd.depth, self._camera.intrinsics)

    def close(self) -> None:
        self.scene_id = ""
        if self._camera is not None:
            self._camera.close()
            self._camera = None


class SimCameraSource(CameraSource):
    """The simulated RGB-D camera: mirrors sim/scene and sim/state, and renders at the state's stamp."""

    input_name = "sim/state"

    def open(self) -> None:
        from vla_nodes.msg import SimState

        self._mirror = SceneMirror(self.width, self.height)
        self._scene = ""
        self._due = -np.inf
        self._started = False
        self._foreign = 0
        self.node.subscribe(String, "sim/scene", self._on_scene, LATCHED)
        self.node.subscribe(SimState, "sim/state", self._on_state, RELIABLE_LATEST)

    def start(self) -> None:
        self._started = True
        self._due = -np.inf
        if self._mirror.scene_id:
            self.pose_changed(self._pose)

    def stop(self) -> None:
        self._started = False

    def close(self) -> None:
        if hasattr(self, "_mirror"):
            self._mirror.close()

    def state(self) -> str:
        return "" if self._mirror.scene_id else "no sim/scene received: is sim_node active?"

    def _on_scene(self, message: String) -> None:
        if message.data == self._scene and self._mirror.scene_id:
            return  # the same scene again, from a simulator that was reset or restarted
        try:
            self._pose = self._mirror.load(message.data)
        except ValueError as error:
            self.node.get_logger().error(str(error))
            return
        self._scene = message.data
        self._due = -np.inf
        if self._started:
            self.pose_changed(self._pose)

    def _on_state(self, message: Any) -> None:
        if not self._started:
            return
        if message.scene_id != self._mirror.scene_id:
            self._foreign += 1  # a state from before the scene changed, or from before the first scene arrived
            return
        stamp = seconds(message.header.stamp)
        period = 1 / self.rate
        if self._due - 2 * period < stamp < self._due - 1e-6:
            return
        # Keep to the grid of the rate where it can be kept to, so that the mean rate is the one asked for.
        self._due = self._due + period if stamp < self._due + period else stamp + period
        self.deliver(self._mirror.render(np.asarray(message.qpos), message.header.stamp))


SOURCES: dict[str, type[CameraSource]] = {"sim": SimCameraSource}

"""The simulated RGB-D camera: what a calibrated, aligned sensor at the scene's viewpoint would see."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from vla_nodes.sim.scene import View
from vla_nodes.sim.world import World

MAX_RANGE = 3.0  # m; a short-range sensor returns nothing beyond


@dataclass
class Rgbd:
    color: np.ndarray  # (H, W, 3) uint8 RGB
    depth: np.ndarray  # (H, W) float32 m along the optical axis, 0 = no return


def optical_pose(view: View) -> np.ndarray:
    """(4, 4) pose of the optical frame in base: z forward, x right, y down (REP 103)."""
    forward = np.asarray(view.target, float) - np.asarray(view.position, float)
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = view.position
    return pose


class Camera:
    """Renders a World from its scene's viewpoint. ``close()`` when done: a GL context belongs to it."""

    def __init__(self, world: World, width: int = 224, height: int = 224, view: View | None = None) -> None:
        self.world = world
        self.width, self.height = width, height
        self.view = view or world.scene.view
        self.pose = optical_pose(self.view)
        self._renderer = mujoco.Renderer(world.model, height=height, width=width)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        offset = np.asarray(self.view.position, float) - np.asarray(self.view.target, float)
        self._camera.lookat[:] = self.view.target
        self._camera.distance = float(np.linalg.norm(offset))
        self._camera.azimuth = float(np.degrees(np.arctan2(-offset[1], -offset[0])))
        self._camera.elevation = float(-np.degrees(np.arcsin(offset[2] / self._camera.distance)))
        world.model.vis.global_.fovy = self.view.fovy
        self._options = mujoco.MjvOption()
        self._options.geomgroup[3] = 0  # collision shapes of the robot

    @property
    def intrinsics(self) -> np.ndarray:
        """(3, 3) K of a pinhole without distortion; pixel centres at half-integers minus 0.5 (CameraInfo)."""
        focal = 0.5 * self.height / np.tan(np.radians(self.view.fovy) / 2)
        return np.array([[focal, 0, (self.width - 1) / 2], [0, focal, (self.height - 1) / 2], [0, 0, 1.0]])

    def color(self) -> np.ndarray:
        self._renderer.disable_depth_rendering()
        self._renderer.disable_segmentation_rendering()
        self._renderer.update_scene(self.world.data, camera=self._camera, scene_option=self._options)
        return self._renderer.render().copy()

    def render(self) -> Rgbd:
        color = self.color()
        self._renderer.enable_depth_rendering()
        depth = self._renderer.render().astype(np.float32)
        self._renderer.disable_depth_rendering()
        depth[depth > MAX_RANGE] = 0.0
        return Rgbd(color, depth)

    def segmentation(self) -> np.ndarray:
        """(H, W) int32 body id behind each pixel, -1 for nothing. Labels for training, never an input."""
        self._renderer.enable_segmentation_rendering()
        self._renderer.update_scene(self.world.data, camera=self._camera, scene_option=self._options)
        ids, kinds = np.moveaxis(self._renderer.render(), -1, 0)
        self._renderer.disable_segmentation_rendering()
        bodies = np.full(ids.shape, -1, np.int32)
        geoms = kinds == mujoco.mjtObj.mjOBJ_GEOM
        bodies[geoms] = self.world.model.geom_bodyid[ids[geoms]]
        return bodies

    def close(self) -> None:
        self._renderer.close()

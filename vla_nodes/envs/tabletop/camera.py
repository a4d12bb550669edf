"""The simulated RGB-D camera: what a calibrated, aligned sensor at the scene's viewpoint would see."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from vla_nodes.envs.tabletop.scene import View
from vla_nodes.envs.tabletop.world import World

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
    """Renders a World from its scene's viewpoint. ``close()`` when done: a GL context belongs to it.

    mujoco.Renderer draws the scene once for colour and once more for depth; here one pass gives both, which halves the
    cost of a frame in software rendering.
    """

    def __init__(self, world: World, width: int = 224, height: int = 224, view: View | None = None) -> None:
        self.world = world
        self.width, self.height = width, height
        self.view = view or world.scene.view
        self.pose = optical_pose(self.view)
        model = world.model
        offset = np.asarray(self.view.position, float) - np.asarray(self.view.target, float)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        self._camera.lookat[:] = self.view.target
        self._camera.distance = float(np.linalg.norm(offset))
        self._camera.azimuth = float(np.degrees(np.arctan2(-offset[1], -offset[0])))
        self._camera.elevation = float(-np.degrees(np.arcsin(offset[2] / self._camera.distance)))
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height  # clearing a larger buffer costs time
        self._options = mujoco.MjvOption()
        self._options.geomgroup[3] = 0  # collision shapes of the robot
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._gl: mujoco.GLContext | None = mujoco.GLContext(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._near, self._far = (float(v * model.stat.extent) for v in (model.vis.map.znear, model.vis.map.zfar))

    @property
    def intrinsics(self) -> np.ndarray:
        """(3, 3) K of a pinhole without distortion; the centre of the first pixel is at (0, 0) as in CameraInfo."""
        focal = 0.5 * self.height / np.tan(np.radians(self.view.fovy) / 2)
        return np.array([[focal, 0, (self.width - 1) / 2], [0, focal, (self.height - 1) / 2], [0, 0, 1.0]])

    def _draw(self, width: int, height: int) -> mujoco.MjrRect:
        if self._gl is None:
            raise RuntimeError("this camera was closed")
        self._gl.make_current()
        rectangle = mujoco.MjrRect(0, 0, width, height)
        self.world.model.vis.global_.fovy = self.view.fovy  # the model's, so another camera may have set its own
        mujoco.mjv_updateScene(
            self.world.model,
            self.world.data,
            self._options,
            None,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL.value,
            self._scene,
        )
        mujoco.mjr_render(rectangle, self._scene, self._context)
        return rectangle

    def render(self) -> Rgbd:
        rectangle = self._draw(self.width, self.height)
        color = np.empty((self.height, self.width, 3), np.uint8)
        buffer = np.empty((self.height, self.width), np.float32)
        mujoco.mjr_readPixels(color, buffer, rectangle, self._context)
        # The buffer runs from 1 at the near plane to 0 at the far one (reversed z, linear in 1/z).
        depth = self._near * self._far / (self._near + buffer * (self._far - self._near))
        depth[depth > MAX_RANGE] = 0.0
        return Rgbd(np.flipud(color).copy(), np.flipud(depth).astype(np.float32))

    def segmentation(self, width: int, height: int) -> np.ndarray:
        """(height, width) int32 geom id behind each pixel, -1 for nothing. Labels for training, never an input."""
        flags = self._scene.flags.copy()
        for flag in (mujoco.mjtRndFlag.mjRND_SEGMENT, mujoco.mjtRndFlag.mjRND_IDCOLOR):
            self._scene.flags[flag.value] = True
        rectangle = self._draw(width, height)
        np.copyto(self._scene.flags, flags)
        image = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, rectangle, self._context)
        ids = np.flipud(image).astype(np.int32) @ np.array([1, 256, 65536])
        geom_of = np.full(self._scene.ngeom + 1, -1, np.int32)
        for geom in self._scene.geoms[: self._scene.ngeom]:
            if geom.segid >= 0 and geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                geom_of[geom.segid + 1] = geom.objid
        return geom_of[ids]

    def close(self) -> None:
        if self._gl is not None:
            self._context.free()
            self._gl.free()
            self._gl = None

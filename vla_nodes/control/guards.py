"""Checks of a spliced trajectory beyond its limits: the tool stays in the workspace, the arm does not hit itself.

The safety gate sees a chunk's rows; the way from the motion in flight onto them is the executor's own. A guard looks at
it and says what is wrong, or "". The executor then tries another way, and refuses the chunk if there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pinocchio

from vla_nodes.control.robot import RobotError, RobotModel, read_urdf
from vla_nodes.control.trajectory import Trajectory

Guard = Callable[[Trajectory, float], str]
"""(trajectory from the splice on, s of it until it is on the chunk's path) -> what is wrong with it, or ""."""


class WorkspaceGuard:
    """The tool stays in a box, and above the table, on its way to the chunk's path. An arm that is outside may come
    back in, and either end may be as far out as the gate let it be."""

    def __init__(self, robot: RobotModel, low: np.ndarray, high: np.ndarray, slack: float = 0.01) -> None:
        """low, high: (3,) m in base; slack: m a way may be farther out than both of its ends."""
        self._robot, self._slack = robot, slack
        self._low, self._high = np.asarray(low, dtype=float), np.asarray(high, dtype=float)

    def beyond(self, q: np.ndarray) -> np.ndarray:
        """How far (m) the tool is outside of the box with the joints at q (N, J): (N, 3), negative inside."""
        tool = self._robot.poses(q)[0]
        return np.maximum(self._low - tool, tool - self._high)

    def __call__(self, trajectory: Trajectory, over: float) -> str:
        last = int(np.searchsorted(trajectory.times, over + 1e-9))
        tool = self._robot.poses(trajectory.positions[: max(last, 2)])[0]
        out = np.maximum(self._low - tool, tool - self._high)
        allowed = np.maximum(np.maximum(out[0], out[-1]), 0.0) + self._slack
        beyond = (out - allowed).max(axis=1)
        k = int(beyond.argmax())
        if beyond[k] <= 0.0:
            return ""
        x, y, z = tool[k]
        return f"the way onto the chunk leaves the workspace (tool at x {x:.3f} y {y:.3f} z {z:.3f} m)"


class SelfCollisionGuard:
    """No two links touch, by the URDF's collision geometry (Coal, through Pinocchio).

    Pairs of links joined directly, and pairs that touch at the rest posture already, are not looked at: models overlap
    where links meet. Checked at every knot, 0.06 s of motion apart at most, with `distance` metres to spare.

    Raises: RobotError where the URDF has no pair of collision geometries to look at, or names meshes not found.
    """

    def __init__(self, urdf: str | Path, robot: RobotModel, distance: float = 0.01) -> None:
        text = read_urdf(urdf)
        model = pinocchio.buildModelFromXML(text)
        try:
            geometry = pinocchio.buildGeomFromUrdfString(model, text, pinocchio.GeometryType.COLLISION)
        except ValueError as error:
            raise RobotError(f"self_collision: the URDF's collision geometry is not to be had: {error}") from error
        self._index = [model.joints[model.getJointId(name)].idx_q for name in robot.joint_names]
        self._q = pinocchio.neutral(model)
        self._q[self._index] = robot.rest
        self._model, self._geometry, self._data = model, geometry, model.createData()
        geometry.addAllCollisionPairs()
        for pair in list(geometry.collisionPairs):
            one, two = (geometry.geometryObjects[i].parentJoint for i in (pair.first, pair.second))
            if one == two or model.parents[one] == two or model.parents[two] == one:
                geometry.removeCollisionPair(pair)
        for pair in self._touching(distance):
            geometry.removeCollisionPair(pair)
        self._geometry_data = self._made(distance)
        if not len(geometry.collisionPairs):
            raise RobotError("self_collision: the URDF has no two links with collision geometry that could meet")

    def _made(self, distance: float) -> pinocchio.GeometryData:
        data = pinocchio.GeometryData(self._geometry)
        for request in data.collisionRequests:
            request.security_margin = distance
        return data

    def _touching(self, distance: float) -> list:
        data = self._made(distance)
        pinocchio.computeCollisions(self._model, self._data, self._geometry, data, self._q, False)
        results, pairs = data.collisionResults, self._geometry.collisionPairs
        return [pairs[k] for k in range(len(pairs)) if results[k].isCollision()]

    @property
    def pairs(self) -> int:
        """How many pairs of geometries are looked at."""
        return len(self._geometry.collisionPairs)

    def __call__(self, trajectory: Trajectory, over: float) -> str:
        q, data = self._q, self._geometry_data
        for k, row in enumerate(trajectory.positions):
            q[self._index] = row
            if pinocchio.computeCollisions(self._model, self._data, self._geometry, data, q, True):
                pair = next(p for p, r in zip(self._geometry.collisionPairs, data.collisionResults, strict=True)
                            if r.isCollision())  # fmt: skip
                names = [self._geometry.geometryObjects[i].name for i in (pair.first, pair.second)]
                return f"{names[0]} would touch {names[1]} {trajectory.times[k]:.2f} s after the splice"
        return ""

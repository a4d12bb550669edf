"""The arm: kinematics and limits, from its URDF and what a URDF cannot say, on Pinocchio.

Frames: everything in `base`, the URDF's root. Poses are (4, 4) homogeneous matrices.
"""

from __future__ import annotations

import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pinocchio

from vla_nodes.control.inverse_kinematics import IkResult, IkSettings, solve

MAX_URDF_BYTES = 16_000_000


class RobotError(ValueError):
    """The URDF or the limits beside it cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Gripper:
    """A gripper's own channel. Opening fraction 0 is `closed`, 1 is `open` (joint positions, m or rad)."""

    name: str  # of its column in a chunk, and of its controller
    joint: str
    closed: float
    open: float
    speed: float  # largest joint speed, m/s or rad/s

    def position(self, opening: np.ndarray) -> np.ndarray:
        """Joint position for an opening fraction 0..1 (values outside are clipped)."""
        return self.closed + np.minimum(np.maximum(opening, 0.0), 1.0) * (self.open - self.closed)

    def opening(self, position: np.ndarray) -> np.ndarray:
        """Opening fraction of a joint position, clipped to 0..1."""
        return np.clip((np.asarray(position) - self.closed) / (self.open - self.closed), 0.0, 1.0)


@dataclass(frozen=True)
class MotionLimits:
    """What a URDF cannot say of an arm, by joint name: rad/s^2 and rad/s^3 (or m); tool_speed: m/s; rest: (J,) rad,
    the posture that a redundant arm is drawn to, None: the middle of each joint's range."""

    acceleration: Mapping[str, float]
    jerk: Mapping[str, float]
    tool_speed: float
    rest: Sequence[float] | None = None


class _Scratch(threading.local):
    """Where Pinocchio leaves intermediate results, for each thread its own: another thread may get the interpreter
    between two calls of Pinocchio, and would overwrite what the first has left for the second."""

    def __init__(self, model: pinocchio.Model, frame: int) -> None:
        self.data = model.createData()
        placement = self.data.oMf[frame]
        self.position, self.rotation = placement.translation, placement.rotation  # views: they follow the data


class RobotModel:
    """Kinematics and limits of one serial arm. May be used by several threads at once.

    Args:
        urdf: path of a URDF, or its text (as a latched `robot_description` carries it).
        tool: the frame that is moved.
        limits: what a URDF cannot say.
        arm_joints: names in the order wanted; default: the movable joints between root and tool.
        grippers: beside the arm, each a joint of its own.

    Attributes (J = number of arm joints, rad, s): joint_names, lower, upper, max_velocity, max_acceleration,
    max_jerk (J,); max_tool_speed (m/s); rest (J,); grippers; base_frames (names of base);
    lever (J,) m: an upper bound of how far the tool can be from each joint's axis.

    Raises: RobotError, FileNotFoundError.
    """

    def __init__(
        self,
        urdf: str | Path,
        tool: str,
        limits: MotionLimits,
        arm_joints: Sequence[str] | None = None,
        grippers: Sequence[Gripper] = (),
    ) -> None:
        root = _parse(urdf)
        try:
            full = pinocchio.buildModelFromXML(ElementTree.tostring(root, encoding="unicode"))
        except Exception as error:  # Pinocchio raises ValueError, RuntimeError or its own, by version
            raise RobotError(f"URDF not understood: {error}") from error
        if not full.existFrame(tool):
            raise RobotError(f"the URDF has no frame {tool!r}; it has {', '.join(f.name for f in full.frames)}")
        chain = [full.names[i] for i in full.supports[full.frames[full.getFrameId(tool)].parentJoint] if i != 0]
        names = tuple(arm_joints) if arm_joints is not None else tuple(chain)
        missing = [name for name in names if not full.existJointName(name)]
        if missing or not names:
            raise RobotError(f"the URDF lacks arm joint {missing[0] if missing else '(none given)'}; has {chain}")
        self.base_frames = tuple(
            frame.name for frame in full.frames
            if frame.type == pinocchio.FrameType.BODY and frame.parentJoint == 0 and frame.placement.isIdentity(1e-6)
        )  # fmt: skip
        locked = [i for i in range(1, full.njoints) if full.names[i] not in names]
        self._model = pinocchio.buildReducedModel(full, locked, pinocchio.neutral(full))
        order = tuple(self._model.names[i] for i in range(1, self._model.njoints))
        if order != names:
            raise RobotError(f"arm joints must be listed from base to tool: {', '.join(order)}")
        self._frame = self._model.getFrameId(tool)
        self._scratch = _Scratch(self._model, self._frame)

        self.name = root.get("name", "")
        self.tool = tool
        self.joint_names = names
        self.lower = np.array(self._model.lowerPositionLimit)
        self.upper = np.array(self._model.upperPositionLimit)
        self.max_velocity = np.array(self._model.velocityLimit)
        if not np.all((self.upper > self.lower) & (self.max_velocity > 0) & np.isfinite(self.max_velocity)):
            raise RobotError("every arm joint needs <limit> with lower < upper and a velocity above zero in the URDF")
        self.lever = self._levers()
        self._take(limits)
        self.grippers = tuple(grippers)
        for g in self.grippers:
            if not (0.0 < abs(g.open - g.closed) < np.inf and 0.0 < g.speed < np.inf):
                raise RobotError(f"gripper {g.name}: closed and open must differ, speed be above zero, all finite")

    @property
    def gripper_names(self) -> tuple[str, ...]:
        """Names of the grippers, as in a chunk."""
        return tuple(gripper.name for gripper in self.grippers)

    @property
    def dof(self) -> int:
        """Number of arm joints J."""
        return len(self.joint_names)

    def forward(self, q: np.ndarray) -> np.ndarray:
        """Pose (4, 4) of the tool in base at joint positions q (J,)."""
        data = self._scratch.data
        pinocchio.forwardKinematics(self._model, data, np.asarray(q, dtype=float))
        return pinocchio.updateFramePlacement(self._model, data, self._frame).homogeneous

    def jacobian(self, q: np.ndarray) -> np.ndarray:
        """(6, J): linear (m/rad) over angular velocity of the tool, base axes, per joint velocity."""
        return pinocchio.computeFrameJacobian(
            self._model, self._scratch.data, np.asarray(q, dtype=float), self._frame, pinocchio.LOCAL_WORLD_ALIGNED
        )

    def kinematics(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tool positions (H, 3), rotations (H, 3, 3) and Jacobians (H, 6, J) at rows of q (H, J)."""
        model, frame, own = self._model, self._frame, self._scratch
        data, position, rotation = own.data, own.position, own.rotation
        jacobians = np.empty((len(q), 6, model.nv))
        positions, rotations = np.empty((len(q), 3)), np.empty((len(q), 3, 3))
        compute, update = pinocchio.computeFrameJacobian, pinocchio.updateFramePlacement
        aligned = pinocchio.LOCAL_WORLD_ALIGNED
        for k, row in enumerate(np.ascontiguousarray(q, dtype=float)):
            jacobians[k] = compute(model, data, row, frame, aligned)
            update(model, data, frame)
            positions[k], rotations[k] = position, rotation
        return positions, rotations, jacobians

    def poses(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tool positions (H, 3) and rotations (H, 3, 3) at rows of q (H, J): `kinematics` at half of its cost."""
        model, own, forward = self._model, self._scratch, pinocchio.framesForwardKinematics
        data, position, rotation = own.data, own.position, own.rotation
        positions, rotations = np.empty((len(q), 3)), np.empty((len(q), 3, 3))
        for k, row in enumerate(np.ascontiguousarray(q, dtype=float)):
            forward(model, data, row)
            positions[k], rotations[k] = position, rotation
        return positions, rotations

    def tool_speed(self, q: np.ndarray, qd: np.ndarray) -> np.ndarray:
        """Translation speed (N,) m/s of the tool at positions and velocities (N, J)."""
        _, _, jacobians = self.kinematics(q)
        velocity = (jacobians[:, :3] @ qd[:, :, None])[:, :, 0]
        return np.sqrt((velocity * velocity).sum(axis=1))

    def solve(
        self,
        positions: np.ndarray,
        rotations: np.ndarray,
        seed: np.ndarray,
        settings: IkSettings | None = None,
        guess: np.ndarray | None = None,
    ) -> IkResult:
        """Joint positions for a sequence of tool poses (H, 3), (H, 3, 3), from seed (J,); see inverse_kinematics."""
        return solve(self, positions, rotations, seed, settings or IkSettings(), guess)

    def _levers(self) -> np.ndarray:
        model, reach = self._model, float(np.linalg.norm(self._model.frames[self._frame].placement.translation))
        levers = np.empty(model.nv)
        for i in range(model.njoints - 1, 0, -1):
            prismatic = "P" in model.joints[i].shortname().removeprefix("JointModel")[:1]
            # A prismatic joint moves the tool 1 m/m and adds its stroke to the reach seen from the joints below.
            levers[i - 1] = 1.0 if prismatic else reach
            if prismatic:
                reach += float(max(abs(self.lower[i - 1]), abs(self.upper[i - 1])))
            reach += float(np.linalg.norm(model.jointPlacements[i].translation))
        return levers

    def _take(self, limits: MotionLimits) -> None:
        for entry in ("acceleration", "jerk"):
            if missing := [name for name in self.joint_names if name not in getattr(limits, entry)]:
                raise RobotError(f"limits: no {entry} for {missing[0]}")
        self.max_acceleration = np.array([limits.acceleration[name] for name in self.joint_names], dtype=float)
        self.max_jerk = np.array([limits.jerk[name] for name in self.joint_names], dtype=float)
        self.max_tool_speed = float(limits.tool_speed)
        middle = np.where(np.abs(self.lower) < 10.0, 0.5 * (self.lower + self.upper), 0.0)
        self.rest = middle if limits.rest is None else np.array(limits.rest, dtype=float)
        if self.rest.shape != (self.dof,):
            raise RobotError(f"rest needs {self.dof} values, has {self.rest.size}")
        if not all(0.0 < x < np.inf for x in (*self.max_acceleration, *self.max_jerk, self.max_tool_speed)):
            raise RobotError("limits: accelerations, jerks and tool_speed must be finite and above zero")
        if not ((self.rest >= self.lower) & (self.rest <= self.upper)).all():
            raise RobotError(f"rest {self.rest.tolist()} is not within the joint limits of the URDF")


def read_urdf(urdf: str | Path) -> str:
    """The text of a URDF given as such or as a path. Raises FileNotFoundError, RobotError."""
    text = urdf if isinstance(urdf, str) and urdf.lstrip().startswith("<") else None
    if text is None:
        path = Path(urdf)
        if not path.is_file():
            raise FileNotFoundError(f"URDF {path} does not exist")
        try:
            text = path.read_text()
        except UnicodeDecodeError as error:
            raise RobotError(f"URDF {path} is not text: {error}") from error
    if len(text) > MAX_URDF_BYTES or "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise RobotError("URDF refused: too large, or it declares XML entities")
    return text


def _parse(urdf: str | Path) -> ElementTree.Element:
    """The URDF as XML, with continuous joints made revolute: a chunk's joint columns are plain angles."""
    text = read_urdf(urdf)
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise RobotError(f"URDF is not XML: {error}") from error
    for joint in root.iter("joint"):
        if joint.get("type") == "continuous":
            joint.set("type", "revolute")
            limit = joint.find("limit")
            if limit is None:
                raise RobotError(f"continuous joint {joint.get('name')} has no velocity limit in the URDF")
            limit.set("lower", "-1000")
            limit.set("upper", "1000")
    return root

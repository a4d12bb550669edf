"""The simulated world: physics, the robot's joints and servos, and the truth about every object."""

from __future__ import annotations

import mujoco
import numpy as np

from vla_nodes.envs.tabletop import mjcf
from vla_nodes.envs.tabletop.scene import Scene


class World:
    """A robot at its table. Not thread-safe.

    Time is simulated seconds since the start. Joint order: the seven arm joints, then panda_finger_joint1 and 2.
    """

    joint_names = (*mjcf.ARM_JOINTS, *mjcf.FINGER_JOINTS)

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.model = mjcf.build(scene)
        self.data = mujoco.MjData(self.model)
        self._qpos = np.array([self.model.joint(n).qposadr[0] for n in self.joint_names])
        self._dof = np.array([self.model.joint(n).dofadr[0] for n in self.joint_names])
        self._actuator = np.array([self.model.actuator(n).id for n in self.joint_names])
        self._lag = np.array([kv / kp for kp, kv in zip(mjcf.ARM_KP, mjcf.ARM_KV, strict=True)])
        self._tool = self.model.body("panda_hand_tcp").id
        self._drawer = self.model.joint("drawer").qposadr[0]
        self._fingers = {self.model.body(n).id for n in ("panda_leftfinger", "panda_rightfinger")}
        self.reset()

    def reset(self) -> None:
        """Robot at its ready pose with an open gripper, objects where the scene says, everything at rest."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[self._drawer] = self.scene.drawer_opening
        self.place_robot(np.asarray(mjcf.READY), mjcf.FINGER_OPEN)

    def place_robot(self, q_arm: np.ndarray, finger: float) -> None:
        """Put the arm at a pose at once (scene set-up only; a robot moves by references)."""
        self.data.qpos[self._qpos] = [*q_arm, finger, finger]
        self.data.qvel[self._dof] = 0.0
        self.set_reference(q_arm, np.zeros(7), finger)
        mujoco.mj_forward(self.model, self.data)

    @property
    def time(self) -> float:
        return self.data.time

    def joint_state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position (rad, m), velocity (rad/s, m/s) and servo effort (N m, N), each (9,)."""
        effort = self.data.actuator_force[self._actuator]
        return self.data.qpos[self._qpos].copy(), self.data.qvel[self._dof].copy(), effort.copy()

    def set_reference(self, q_arm: np.ndarray, qd_arm: np.ndarray, finger: float) -> None:
        """Servo reference: arm (7,) rad and rad/s (fed forward, so that it does not lag), finger travel in m."""
        self.data.ctrl[self._actuator[:7]] = np.asarray(q_arm) + self._lag * np.asarray(qd_arm)
        self.data.ctrl[self._actuator[7:]] = finger

    def advance(self, seconds: float) -> None:
        """Step physics by the whole number of time steps nearest to ``seconds``."""
        mujoco.mj_step(self.model, self.data, nstep=max(1, round(seconds / self.model.opt.timestep)))

    # -- mirrored by the camera -------------------------------------------------------------------------------------
    def qpos(self) -> np.ndarray:
        return self.data.qpos.copy()

    def set_qpos(self, qpos: np.ndarray) -> None:
        """Show a state received from elsewhere; ValueError when it belongs to another scene."""
        if np.shape(qpos) != (self.model.nq,):
            raise ValueError(f"state of {np.shape(qpos)} values for a scene of {self.model.nq}: scenes differ")
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    # -- truth, for the success checker and the expert; never for the policy -----------------------------------------
    def tool_pose(self) -> np.ndarray:
        """(4, 4) of panda_hand_tcp in base."""
        pose = np.eye(4)
        pose[:3, :3] = self.data.xmat[self._tool].reshape(3, 3)
        pose[:3, 3] = self.data.xpos[self._tool]
        return pose

    def position(self, name: str) -> np.ndarray:
        """(3,) of an object's origin in base."""
        return self.data.xpos[self.model.body(name).id].copy()

    def rotation(self, name: str) -> np.ndarray:
        return self.data.xmat[self.model.body(name).id].reshape(3, 3).copy()

    def speed(self, name: str) -> float:
        """Speed of an object in m/s."""
        velocity = np.zeros(6)
        mujoco.mj_objectVelocity(self.model, self.data, mujoco.mjtObj.mjOBJ_BODY, self.model.body(name).id, velocity, 0)
        return float(np.linalg.norm(velocity[3:]))

    def drawer_opening(self) -> float:
        return float(self.data.qpos[self._drawer])

    def handle_position(self) -> np.ndarray:
        return self.data.geom("drawer handle").xpos.copy()

    def opening(self) -> float:
        """Gripper opening, 0 closed to 1 open."""
        return float(np.clip(self.data.qpos[self._qpos[7]] / mjcf.FINGER_OPEN, 0.0, 1.0))

    def touched_by_fingers(self, name: str) -> int:
        """How many of the two fingers touch an object."""
        body = self.model.body(name).id
        owner = self.model.geom_bodyid
        touching = set()
        for contact in self.data.contact:
            pair = {int(owner[contact.geom1]), int(owner[contact.geom2])}
            if body in pair:
                touching |= pair & self._fingers
        return len(touching)

"""Runs chunks in the simulated world without ROS, through the very executor and controller the nodes use."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.executor import ChunkExecutor, ExecutorOutput
from vla_nodes.control.joint_trajectory_controller import JointTrajectoryController
from vla_nodes.control.robot import RobotModel
from vla_nodes.control.settings import ExecutorSettings
from vla_nodes.envs.tabletop import mjcf
from vla_nodes.envs.tabletop.camera import Camera, Rgbd
from vla_nodes.envs.tabletop.world import World
from vla_nodes.pipeline.robot_description import robot_model
from vla_nodes.poses import rotation_vector

if TYPE_CHECKING:  # the expert moves a robot without a policy, and so without torch
    from vla_nodes.policy.processing import Observation

STEP = 0.01  # s between references to the servos and joint measurements, as the simulated robot publishes them


@lru_cache(maxsize=1)
def panda() -> RobotModel:
    return robot_model("config/panda/contract.yaml")


class Rollout:
    """A world, a chunk executor and the two controllers between them."""

    def __init__(self, world: World, settings: ExecutorSettings | None = None) -> None:
        self.world = world
        self.executor = ChunkExecutor(panda(), settings)
        self._arm = JointTrajectoryController(mjcf.ARM_JOINTS)
        self._finger = JointTrajectoryController(mjcf.FINGER_JOINTS[:1])
        self._hold()

    def _hold(self) -> None:
        q, qd, _ = self.world.joint_state()
        self._arm.hold(q[:7])
        self._finger.hold(q[7:8])
        self.executor.reset()
        self.executor.observe(self.world.time, q[:7], qd[:7], float(q[7]))

    def place(self, tool: np.ndarray, opening: float) -> None:
        """Set-up only: the robot is at once at a tool position (3,) m, pointing down, with a gripper opening 0..1."""
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = np.diag([1.0, -1.0, -1.0]), tool
        q, robot = np.asarray(mjcf.READY), panda()
        for _ in range(100):
            now = robot.forward(q)
            turn = rotation_vector((pose[:3, :3] @ now[:3, :3].T)[None])[0]
            error = np.concatenate([pose[:3, 3] - now[:3, 3], turn])
            jacobian = robot.jacobian(q)
            q = q + jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-4 * np.eye(6), error)
        self.world.place_robot(np.clip(q, robot.lower, robot.upper), opening * mjcf.FINGER_OPEN)
        self._hold()

    @property
    def velocity(self) -> np.ndarray:
        """(3,) m/s of the tool, as measured."""
        q, qd, _ = self.world.joint_state()
        return (panda().jacobian(q[:7]) @ qd[:7])[:3]

    def observation(self, camera: Camera, image: Rgbd) -> Observation:
        """What the policy gets to see now, and nothing more."""
        from vla_nodes.policy.processing import CameraImage, Observation

        q, qd, _ = self.world.joint_state()
        seen = CameraImage(image.color, image.depth, camera.intrinsics, camera.pose)
        return Observation(self.world.time, {"camera": seen}, q[:7], qd[:7], np.array([self.world.opening()]),
                           panda().forward(q[:7]))  # fmt: skip

    def submit(self, actions: np.ndarray, stamp: float, period: float, instruction: str = "") -> ExecutorOutput:
        """Hand over a chunk of ee_delta rows (H, 7) computed from the observation at ``stamp`` s."""
        now = self.world.time
        chunk = ActionChunk(stamp, instruction, period, ActionSpace.EE_DELTA, np.asarray(actions, float), ("gripper",))
        output = self.executor.submit(chunk, now)
        self.hand_over(output, now)
        return output

    def hand_over(self, output: ExecutorOutput, now: float) -> None:
        """Give the controllers their trajectories. Raises RuntimeError where one is refused."""
        q, qd, _ = self.world.joint_state()
        for controller, trajectory, joints in (
            (self._arm, output.arm, slice(0, 7)),
            (self._finger, (output.grippers or {}).get("gripper"), slice(7, 8)),
        ):
            if trajectory is not None and (reason := controller.accept(trajectory, now, q[joints], qd[joints])):
                raise RuntimeError(f"the controller refused a trajectory: {reason}")

    def run(self, seconds: float) -> None:
        """Let the world go on under the references in flight."""
        for _ in range(round(seconds / STEP)):
            now = self.world.time
            q, qd = self._arm.reference(now)
            finger, _ = self._finger.reference(now)
            self.world.set_reference(q, qd, float(finger[0]))
            self.world.advance(STEP)
            q, qd, _ = self.world.joint_state()
            self.executor.observe(self.world.time, q[:7], qd[:7], float(q[7]))

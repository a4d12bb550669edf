"""The simulated robot behind its controllers, and the judge of its tasks: sim_node without ROS."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np

from vla_nodes.control.joint_trajectory_controller import JointTrajectoryController
from vla_nodes.control.trajectory import Trajectory
from vla_nodes.envs.tabletop.episode_monitor import PATH_PERIOD, EpisodeMonitor
from vla_nodes.envs.tabletop.instructions import parse
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.suites import obstacle
from vla_nodes.envs.tabletop.tasks import SuccessChecker
from vla_nodes.envs.tabletop.world import World

CONTROL_PERIOD = 0.002
"""s between two references given to the servos: each physics step gets its own."""
ARM_JOINTS = World.joint_names[:7]
GRIPPER_JOINT = World.joint_names[7]


class SimulatedRobot:
    """A world, the two controllers a stock bring-up has (arm and gripper), and the task's judge. Not thread-safe."""

    def __init__(self, scene: Scene) -> None:
        self.arm = JointTrajectoryController(ARM_JOINTS)
        self.gripper = JointTrajectoryController((GRIPPER_JOINT,))
        self.instruction = ""
        self.load(scene)

    def load(self, scene: Scene) -> None:
        """Start anew with a scene: time 0, robot at its ready pose, controllers holding it."""
        self.scene = scene
        self.world = World(scene)
        self._steps = 0
        q, _, _ = self.world.joint_state()
        self.arm.hold(q[:7])
        self.gripper.hold(q[7:8])
        text = scene.to_json()
        self.scene_id = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.scene_message = json.dumps({"id": self.scene_id, "scene": json.loads(text)})
        self.judge(self.instruction)

    @property
    def time(self) -> float:
        """Simulated s, free of the sum's rounding."""
        return round(self.world.time, 9)

    def follow(self, trajectory: Trajectory) -> str | None:
        """Hand a trajectory to the arm's or the gripper's controller; the reason if that refuses it."""
        q, qd, _ = self.world.joint_state()
        if GRIPPER_JOINT in trajectory.joint_names:
            return self.gripper.accept(trajectory, self.time, q[7:8], qd[7:8])
        return self.arm.accept(trajectory, self.time, q[:7], qd[:7])

    def step(self) -> None:
        """Advance by `CONTROL_PERIOD`."""
        q, qd = self.arm.reference(self.world.time)
        finger, _ = self.gripper.reference(self.world.time)
        self.world.set_reference(q, qd, float(finger[0]))
        self.world.advance(CONTROL_PERIOD)
        self._steps += 1
        if self._steps % round(PATH_PERIOD / CONTROL_PERIOD) == 0:
            self._monitor.sample()

    def judge(self, instruction: str) -> None:
        """Set what the world is judged by, from now on; "" for nothing."""
        self.instruction = instruction
        self.task = parse(instruction) if instruction else None
        self.obstacle = obstacle(self.task, self.scene) if self.task is not None else ""
        task = self.task if self.task is not None and not self.task.missing(self.scene) else None
        self._checker = SuccessChecker(task) if task is not None else None
        self._monitor = EpisodeMonitor(self.world, self._checker)
        self._since = self.time

    def task_status(self) -> dict[str, Any]:
        """Truth about the task, for a person and for ./run; call it several times a second."""
        succeeded = self._checker.update(self.world) if self._checker else False
        self._monitor.look()
        if self._checker and self.task is not None:
            progress = self.task.progress(self.world)
        elif self.task is not None:
            progress = self.obstacle
        else:
            progress = "no task known for this instruction" if self.instruction else "no instruction"
        return {
            "task": None if self.task is None else asdict(self.task),
            "instruction": self.instruction,
            "success": succeeded,
            "progress": progress,
            "obstacle": self.obstacle,
            "time": self.time,
            "since": self._since,
            "scene_id": self.scene_id,
            **self._monitor.facts(),
        }

    def finite(self) -> bool:
        """False once the physics has diverged."""
        return bool(np.isfinite(self.world.qpos()).all())

"""sim_node: the simulated robot in place of a real one, as ros2_control would present it.

Publishes joint_states, /clock, and (for camera_node and the judge) sim/scene, sim/state, sim/task_status; takes
JointTrajectory for arm and gripper and refuses what joint_trajectory_controller refuses.
"""

from __future__ import annotations

import json
import time
from array import array
from functools import partial

from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.suites import SUITES, episode
from vla_nodes.messages.convert import trajectory_from
from vla_nodes.msg import SimState
from vla_nodes.nodes.base import LATCHED, OK, WARN, BaseNode, run
from vla_nodes.nodes.liveness import Rate
from vla_nodes.nodes.parameters import Param
from vla_nodes.nodes.sim_core import CONTROL_PERIOD, SimulatedRobot
from vla_nodes.nodes.to_messages import to_time
from vla_nodes.pipeline.robot_description import RobotDescription

MAX_LAG = 0.05
"""s of steady time that the simulation catches up with at once; beyond it, simulated time runs slower."""


class SimNode(BaseNode):
    """MuJoCo world with the interfaces of a robot's bring-up."""

    params = (
        Param("seed", 0, "Seed of the scene: where the objects stand.", 0, 2**31 - 1, live=True),
        Param(
            "scene",
            "demo",
            "Kind of scene: demo (four blocks, bowl, tray, drawer), random, or that of an evaluation suite such as "
            "rearrangement or rearrangement/pairs, the same that `python -m vla_nodes eval` draws for the seed.",
            choices=SUITES,
            live=True,
        ),
        Param(
            "real_time_factor",
            1.0,
            "Simulated seconds per second aimed at; a slow machine simply takes longer.",
            0.01,
            20.0,
        ),
        Param("joint_state_rate", 100.0, "joint_states and /clock per simulated second [Hz].", 50.0, 250.0),
        Param("state_rate", 50.0, "sim/state per simulated second [Hz], what camera_node renders from.", 5.0, 125.0),
        Param("publish_clock", True, "Publish /clock (every node of a simulated run has use_sim_time set)."),
    )

    def __init__(self) -> None:
        super().__init__("sim_node")
        self._made_robot: SimulatedRobot | None = None

    @property
    def robot(self) -> SimulatedRobot:
        """What configure made; only asked for between configure and cleanup."""
        assert self._made_robot is not None, "not configured"
        return self._made_robot

    def configure(self) -> None:
        self._made_robot = SimulatedRobot(self._scene())
        self._steps_per_tick = max(1, round(1 / (self.value("joint_state_rate") * CONTROL_PERIOD)))
        tick = self._steps_per_tick * CONTROL_PERIOD
        self._ticks_per_state = max(1, round(1 / (self.value("state_rate") * tick)))
        self._ticks_per_status = max(1, round(0.1 / tick))
        self._tick_period = tick / self.value("real_time_factor")
        self._joints_pub = self.publish_on(JointState, "joint_states")
        self._clock_pub = self.publish_on(ClockMessage, "/clock") if self.value("publish_clock") else None
        self._scene_pub = self.publish_on(String, "sim/scene", LATCHED)
        self._state_pub = self.publish_on(SimState, "sim/state", 2)
        self._task_pub = self.publish_on(String, "sim/task_status", 2)
        for part in ("arm", "gripper"):
            topic = f"{part}_controller/joint_trajectory"
            self.subscribe(JointTrajectory, topic, partial(self._on_trajectory, topic=topic))
        self.subscribe(String, "vla/active_instruction", self._on_instruction, LATCHED)
        self.serve(Trigger, "sim/reset", self._on_reset)
        self._joints = JointState(name=list(self.robot.world.joint_names))
        self._state = SimState(scene_id=self.robot.scene_id)
        simulated = RobotDescription("config/panda/contract.yaml").robot
        self._state.header.frame_id = simulated.base_frame
        self._refused: dict[str, int] = {}
        self._accepted = 0
        self._rate = Rate(200)

    def activate(self) -> None:
        self._published = 0
        self._last_status = ""
        self._scene_pub.publish(String(data=self.robot.scene_message))
        self._origin = time.monotonic()
        self._done = 0
        self._timer = self.every(self._tick_period / 2, self._advance)
        self._publish()

    def deactivate(self) -> None:
        if self._timer is not None and self.destroy_timer(self._timer):
            self._resources.remove(self._timer)

    def cleanup(self) -> None:
        self._made_robot = None

    def diagnostics(self) -> tuple[bytes, str, dict[str, object]]:
        now = time.monotonic()
        refused = sum(self._refused.values())
        factor = self._rate.hz(now) * self._steps_per_tick * CONTROL_PERIOD
        text = f"{refused} trajectories refused" if refused else "running"
        values = {
            "real time factor": f"{factor:.2f}",
            "simulated time [s]": f"{self.robot.time:.2f}",
            "scene": self.robot.scene_id,
            "trajectories accepted": self._accepted,
            **{f"refused: {reason}": count for reason, count in self._refused.items()},
        }
        return (WARN if refused else OK), text, values

    def _scene(self) -> Scene:
        return episode(self.value("scene"), self.value("seed"))[0]

    def _advance(self) -> None:
        """Run the physics up to where steady time asks for, at most a few ticks, and publish after each."""
        due = int((time.monotonic() - self._origin) / self._tick_period)
        behind = due - self._done
        most = max(1, int(MAX_LAG / self._tick_period))
        if behind > most:
            self._origin += (behind - most) * self._tick_period  # let go of what cannot be caught up
            behind = most
        for _ in range(behind):
            for _ in range(self._steps_per_tick):
                self.robot.step()
            self._done += 1
            self._publish()
        self.keep_time()

    def _publish(self) -> None:
        robot, stamp = self.robot, to_time(self.robot.time)
        if self._clock_pub is not None:
            self._clock_pub.publish(ClockMessage(clock=stamp))
        position, velocity, effort = robot.world.joint_state()
        joints = self._joints
        joints.header.stamp = stamp
        joints.position = array("d", position.tobytes())
        joints.velocity = array("d", velocity.tobytes())
        joints.effort = array("d", effort.tobytes())
        self._joints_pub.publish(joints)
        if self._published % self._ticks_per_state == 0:
            self._state.header.stamp = stamp
            self._state.scene_id = robot.scene_id
            self._state.qpos = array("d", robot.world.qpos().tobytes())
            self._state_pub.publish(self._state)
        if self._published % self._ticks_per_status == 0:
            self._task_pub.publish(String(data=json.dumps(robot.task_status())))
            if not robot.finite():
                self.get_logger().error("the physics has diverged: resetting the scene")
                self._reset()
        self._published += 1
        self._rate.tick(time.monotonic())

    def _on_trajectory(self, message: JointTrajectory, topic: str) -> None:
        if not self.active:
            return
        try:
            reason = self.robot.follow(trajectory_from(message))
        except ValueError as error:
            reason = str(error)
        if reason is None:
            self._accepted += 1
            return
        cause = f"{topic}: {reason.split(':')[0][:80]}"
        first = cause not in self._refused
        if len(self._refused) < 50 or not first:
            self._refused[cause] = self._refused.get(cause, 0) + 1
        self.get_logger().error(
            f"refused a trajectory on {topic}: {reason[:300]}", throttle_duration_sec=0.0 if first else 1.0
        )

    def _on_instruction(self, message: String) -> None:
        self.robot.judge(message.data[:1000])

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if not self.active:
            response.success, response.message = False, "sim_node is not active"
            return response
        self._reset()
        response.success = True
        response.message = f"scene {self.robot.scene_id}: {self.value('scene')}, seed {self.value('seed')}"
        return response

    def _reset(self) -> None:
        """New world from the parameters `scene` and `seed`; simulated time starts at 0, which every node notices."""
        self.robot.load(self._scene())
        self._published = 0
        self._origin, self._done = time.monotonic(), 0
        self._scene_pub.publish(String(data=self.robot.scene_message))
        self.get_logger().info(f"reset: {self.value('scene')} scene with seed {self.value('seed')}")
        self._publish()


def main(args: list[str] | None = None) -> int:
    return run(SimNode, args)


if __name__ == "__main__":
    raise SystemExit(main())

"""Ways out of action_node: a trajectory topic, an action, or sampled position commands, for the arm or a gripper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from vla_nodes.control.streams import ForwardSampler, GoalStream, Output
from vla_nodes.control.trajectory import Trajectory
from vla_nodes.nodes.to_messages import trajectory_message

if TYPE_CHECKING:
    from vla_nodes.nodes.base import BaseNode


def make(
    node: BaseNode, output: Output, part: str, joints: Sequence[str], rate: float, prefix: str,
    lost: Callable[[str, bool], None],
) -> TopicDoor | ActionDoor | ForwardDoor:  # fmt: skip
    """The door of the controller of `part` (arm, or the name of a gripper), whose joints are named `joints`; prefix: of
    a dry run."""
    if output is Output.ACTION and not prefix:
        return ActionDoor(node, part, joints, lost)
    if output is Output.FORWARD and not prefix:
        return ForwardDoor(node, part, rate)
    return TopicDoor(node, part, joints, prefix)


def _message(trajectory: Trajectory, joints: Sequence[str]) -> JointTrajectory:
    message = trajectory_message(trajectory)
    message.joint_names = list(joints)
    return message


class TopicDoor:
    """PART_controller/joint_trajectory."""

    def __init__(self, node: BaseNode, part: str, joints: Sequence[str], prefix: str) -> None:
        self._joints = joints
        self._publisher = node.publish_on(JointTrajectory, f"{prefix}{part}_controller/joint_trajectory")

    def send(self, trajectory: Trajectory) -> None:
        self._publisher.publish(_message(trajectory, self._joints))

    def reset(self) -> None: ...

    def close(self) -> None: ...


class ForwardDoor:
    """PART_controller/commands, `rate` times a second while there is a motion."""

    def __init__(self, node: BaseNode, part: str, rate: float) -> None:
        self._node, self._sampler = node, ForwardSampler()
        self._publisher = node.publish_on(Float64MultiArray, f"{part}_controller/commands")
        node.every(1.0 / rate, self._tick)

    def send(self, trajectory: Trajectory) -> None:
        self._sampler.take(trajectory)

    def reset(self) -> None:
        self._sampler.reset()

    def close(self) -> None: ...

    def _tick(self) -> None:
        command = self._sampler.command(self._node.now())
        if command is not None:
            self._publisher.publish(Float64MultiArray(data=command.tolist()))


class ActionDoor:
    """PART_controller/follow_joint_trajectory. Raises ImportError, with the remedy, where control_msgs is missing."""

    def __init__(self, node: BaseNode, part: str, joints: Sequence[str], lost: Callable[[str, bool], None]) -> None:
        try:
            from control_msgs.action import FollowJointTrajectory
        except ImportError as error:
            raise ImportError(
                "output follow_joint_trajectory needs control_msgs (apt install ros-$ROS_DISTRO-control-msgs); "
                "output trajectory_topic drives the same controller without it"
            ) from error
        from rclpy.action import ActionClient

        self._goal, self._joints, self._lost, self._part = FollowJointTrajectory.Goal, joints, lost, part
        self._client = ActionClient(node, FollowJointTrajectory, f"{part}_controller/follow_joint_trajectory")
        self._stream = GoalStream(self._send, lost)

    def send(self, trajectory: Trajectory) -> None:
        if self._client.server_is_ready():
            self._stream.take(trajectory)
        else:
            self._lost(f"no action server at {self._part}_controller/follow_joint_trajectory", False)

    def reset(self) -> None: ...

    def close(self) -> None:
        self._client.destroy()

    def _send(self, number: int, trajectory: Trajectory) -> None:
        goal = self._goal(trajectory=_message(trajectory, self._joints))
        self._client.send_goal_async(goal).add_done_callback(lambda future: self._answered(number, future.result()))

    def _answered(self, number: int, handle: Any) -> None:
        self._stream.answered(number, handle.accepted)
        if handle.accepted:
            handle.get_result_async().add_done_callback(
                lambda future: self._stream.finished(
                    number, future.result().result.error_code, future.result().result.error_string
                )
            )

"""Ways out of the suite other than a JointTrajectory topic, without ROS: what to send when, and what came of it.

`ForwardSampler` turns trajectories into the position commands of a forward_command_controller; `GoalStream` is the
client's side of FollowJointTrajectory (control_msgs) where every chunk is a new goal that takes the place of the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import Enum

import numpy as np

from vla_nodes.control.trajectory import Trajectory, sample


class Output(str, Enum):
    """How trajectories reach the robot."""

    TOPIC = "trajectory_topic"  # trajectory_msgs/JointTrajectory to joint_trajectory_controller
    ACTION = "follow_joint_trajectory"  # control_msgs/action/FollowJointTrajectory, the same controller's action
    FORWARD = "forward_positions"  # std_msgs/Float64MultiArray to a forward_command_controller


class ForwardSampler:
    """The newest trajectory, sampled: a forward_command_controller has no memory, so time passes here.

    Every trajectory of the executor keeps the limits, joins the one before it without a jump and ends at rest: so do
    its samples, and an executor that falls silent leaves the arm at rest at its last trajectory's end.
    """

    REPEAT = 0.5  # s the last position is repeated for, in case a message is lost; then silence, it is held anyway

    def __init__(self) -> None:
        self._trajectory: Trajectory | None = None

    def reset(self) -> None:
        """Nothing to say until the next trajectory."""
        self._trajectory = None

    def take(self, trajectory: Trajectory) -> None:
        """Follow this from now on. Raises ValueError for one that starts on receipt: it has no clock to be read by."""
        if trajectory.stamp == 0.0:
            raise ValueError("a trajectory without a stamp cannot be sampled")
        self._trajectory = trajectory

    def command(self, now: float) -> np.ndarray | None:
        """Positions (J,) to command at `now` s, or None where there is nothing to say."""
        trajectory = self._trajectory
        if trajectory is None or now > trajectory.end + self.REPEAT:
            return None
        return sample(trajectory, now - trajectory.stamp)[0]


# control_msgs/action/FollowJointTrajectory, Result.error_code
RESULTS = {
    0: "successful",
    -1: "invalid goal",
    -2: "invalid joints",
    -3: "old header timestamp",
    -4: "path tolerance violated",
    -5: "goal tolerance violated",
}
ASTRAY = (-4, -5)
"""Those by which the controller says that the arm does not follow."""


class GoalStream:
    """Goals of FollowJointTrajectory, one per trajectory; a new one takes the place of the last.

    joint_trajectory_controller ends the goal in flight itself when it accepts a new one, so what becomes of a goal
    that is not the newest says nothing. What becomes of the newest one does: refused or aborted means that the arm no
    longer follows what the executor thinks it follows.

    Args: send: sends goal `number` (its results are reported with the same number); lost: told why, once per goal,
    when the newest goal is refused or ends in anything but success, and whether the controller gave it up because the
    arm was not where it should be.
    """

    def __init__(self, send: Callable[[int, Trajectory], None], lost: Callable[[str, bool], None]) -> None:
        self._send, self._lost = send, lost
        self.newest = 0
        self.state = "idle"  # sent, active, done, lost
        self.counts: Counter[str] = Counter()

    def take(self, trajectory: Trajectory) -> None:
        """Send a goal."""
        self.newest += 1
        self.state = "sent"
        self.counts["sent"] += 1
        self._send(self.newest, trajectory)

    def answered(self, number: int, accepted: bool) -> None:
        """The server took goal `number`, or did not."""
        self.counts["accepted" if accepted else "refused"] += 1
        if number != self.newest or self.state != "sent":
            return
        self.state = "active"
        if not accepted:
            self._end("the controller refused the goal (is it active, are the joint names its own?)")

    def finished(self, number: int, code: int, text: str = "") -> None:
        """Goal `number` ended with FollowJointTrajectory's error code."""
        if number != self.newest or self.state not in ("sent", "active"):
            self.counts["superseded"] += 1
            return
        if code == 0:
            self.state = "done"
            self.counts["done"] += 1
            return
        self.counts["aborted"] += 1
        reason = RESULTS.get(code, f"error code {code}")
        self._end(f"the controller ended the goal: {reason}{f' ({text[:200]})' if text else ''}", code in ASTRAY)

    def _end(self, reason: str, astray: bool = False) -> None:
        self.state = "lost"
        self._lost(reason, astray)

"""joint_trajectory_controller (ROS 2 Jazzy, default parameters) for the simulated robot.

Refuses what the stock controller refuses and follows what it accepts the way it does: a new trajectory replaces
the one in flight at once; with a stamp in the past it starts in the segment that contains now, without blending;
before its first point it interpolates from the state at receipt. Nothing is smoothed for the caller's sake: a
message that would make a real robot jump makes the simulated one jump.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_nodes.control.trajectory import Trajectory, interpolate, refusal, reordered, sample


class JointTrajectoryController:
    """Follows JointTrajectory messages for a fixed set of joints.

    Args:
        joint_names: the controller's joints; `reference` and `hold` use this order.
        interpolate_from_desired_state: as the stock parameter (default false): before the first point start from
            the last reference instead of the measured state.
    """

    def __init__(self, joint_names: Sequence[str], interpolate_from_desired_state: bool = False) -> None:
        self.joint_names = tuple(joint_names)
        self.interpolate_from_desired_state = interpolate_from_desired_state
        self._trajectory: Trajectory | None = None
        self._start = 0.0  # absolute time at which the trajectory's times are zero
        self._before: tuple[float, np.ndarray, np.ndarray, np.ndarray | None] | None = None  # t, q, qd, qdd
        self._held: np.ndarray | None = None

    def hold(self, q: np.ndarray) -> None:
        """Drop what is in flight and hold joint positions q (J,)."""
        self._trajectory = None
        self._held = np.array(q, dtype=float)

    def accept(self, trajectory: Trajectory, now: float, q: np.ndarray, qd: np.ndarray) -> str | None:
        """Take a trajectory at time now, or say why not.

        Args: now: s on the ROS clock; q, qd: (J,) measured state, this controller's joint order.
        Returns: None if accepted, else the reason; a refused trajectory leaves the one in flight untouched.
        """
        reason = refusal(trajectory, self.joint_names, now)
        if reason is not None:
            return reason
        if self.interpolate_from_desired_state and (self._trajectory is not None or self._held is not None):
            self._before = (now, *self._state(now))
        else:
            # The measured state carries no acceleration, so this segment is at best cubic.
            self._before = (now, np.array(q, dtype=float), np.array(qd, dtype=float), None)
        self._trajectory = reordered(trajectory, self.joint_names)
        self._start = trajectory.stamp if trajectory.stamp != 0.0 else now
        return None

    def reference(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        """Commanded position and velocity (J,) at time now. Raises RuntimeError before any hold or trajectory."""
        q, qd, _ = self._state(now)
        return q, qd

    def _state(self, now: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        trajectory = self._trajectory
        if trajectory is None:
            if self._held is None:
                raise RuntimeError("controller has no reference yet: call hold(q) with the measured positions first")
            return self._held.copy(), np.zeros_like(self._held), np.zeros_like(self._held)
        t = now - self._start
        if t > trajectory.times[0] - 1e-9:  # messages know whole nanoseconds only: nothing lies between
            return sample(trajectory, max(t, float(trajectory.times[0])))
        assert self._before is not None  # `accept` sets it with the trajectory
        at, q, qd, qdd = self._before
        begin, first = at - self._start, trajectory.times[0]
        v1 = None if trajectory.velocities is None else trajectory.velocities[:1]
        a1 = None if trajectory.accelerations is None else trajectory.accelerations[:1]
        out = interpolate(
            np.array([max(t - begin, 0.0)]), np.array([first - begin]),
            q[None], qd[None], None if qdd is None else qdd[None], trajectory.positions[:1], v1, a1,
        )  # fmt: skip
        return out[0][0], out[1][0], out[2][0]

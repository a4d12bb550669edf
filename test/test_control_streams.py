"""Trajectory topic, FollowJointTrajectory and forward commands: the same motion, the same end."""

import numpy as np
import pytest
import robots

from vla_nodes.benchmarks import executor_cost
from vla_nodes.control.executor import ChunkExecutor
from vla_nodes.control.joint_trajectory_controller import JointTrajectoryController
from vla_nodes.control.limits import Limits
from vla_nodes.control.settings import ExecutorSettings
from vla_nodes.control.streams import ForwardSampler, GoalStream
from vla_nodes.control.trajectory import Trajectory, refusal

STEP = 0.01


@pytest.fixture(scope="module")
def robot():
    return robots.panda()


class ActionServer:
    """joint_trajectory_controller's action, as far as a client sees it: goals replace each other, then one succeeds."""

    def __init__(self, controller):
        self.controller, self.stream, self.active, self.pending = controller, None, None, []

    def send(self, number, trajectory):
        self.pending.append((number, trajectory))

    def spin(self, now, q, qd):
        for number, trajectory in self.pending:
            accepted = self.controller.accept(trajectory, now, q, qd) is None
            self.stream.answered(number, accepted)
            if accepted:
                if self.active is not None:
                    self.stream.finished(self.active[0], -1, "preempted")
                self.active = number, trajectory.end
        self.pending.clear()
        if self.active is not None and now > self.active[1]:
            self.stream.finished(self.active[0], 0)
            self.active = None


def drive(robot, output):
    """Twelve chunks, then silence: positions (T, 7) at every STEP."""
    executor, controller = ChunkExecutor(robot), JointTrajectoryController(robot.joint_names)
    forward, lost, server = ForwardSampler(), [], ActionServer(controller)
    server.stream = stream = GoalStream(server.send, lambda reason, astray: lost.append(reason))
    q, qd = robot.rest.copy(), np.zeros(7)
    controller.hold(q)
    chunks, coming, track = list(executor_cost.chunks(robot, 12)), [], []
    for t in chunks[0].stamp + STEP * np.arange(500):
        executor.observe(t, q, qd)
        if chunks and t >= chunks[0].stamp:
            coming.append(chunks.pop(0))
        if coming and t >= coming[0].stamp + 0.05 and (arm := executor.submit(coming.pop(0), t).arm) is not None:
            if output == "topic":
                assert controller.accept(arm, t, q, qd) is None
            elif output == "action":
                stream.take(arm)
            else:
                forward.take(arm)
        server.spin(t, q, qd)
        if output == "forward":
            command = forward.command(t)
            q, qd = (q, np.zeros(7)) if command is None else (command, (command - q) / STEP)
        else:
            q, qd = controller.reference(t)
        track.append(q)
    assert not lost
    if output == "action":
        assert stream.state == "done" and stream.counts["accepted"] == 12 and stream.counts["superseded"] == 11
    return np.array(track)


def test_three_ways_out_and_one_motion(robot):
    topic, action, forward = (drive(robot, output) for output in ("topic", "action", "forward"))
    assert np.abs(topic[-1] - topic[0]).max() > 0.05
    ends = [np.abs(track[-1] - topic[-1]).max() for track in (action, forward)]
    print(f"end state against the topic's: action {ends[0]:.1e} rad, forward commands {ends[1]:.1e} rad")
    np.testing.assert_allclose(action[-1], topic[-1], atol=1e-9)
    np.testing.assert_allclose(forward[-1], topic[-1], atol=1e-9)
    np.testing.assert_allclose(action, topic, atol=1e-9)
    np.testing.assert_allclose(forward, topic, atol=1e-6)
    assert np.abs(np.diff(topic[-10:], axis=0)).max() < 1e-12  # at rest


def test_forward_commands_keep_the_limits_and_end_at_rest_in_silence(robot):
    track = drive(robot, "forward")
    limits, s = Limits.scaled(robot, 0.6, 0.3, 0.1, 0.6), ExecutorSettings()
    assert (s.velocity_scale, s.acceleration_scale) == (0.6, 0.3)
    assert (np.abs(np.diff(track, axis=0)) <= limits.velocity * STEP).all()
    assert (np.abs(np.diff(track, 2, axis=0)) <= limits.acceleration * STEP**2 * 1.01 + 1e-9).all()


def test_a_sampler_says_nothing_before_and_long_after():
    forward = ForwardSampler()
    assert forward.command(1.0) is None
    zero = np.zeros((2, 1))
    arm = Trajectory(("a",), np.array([0.0, 1.0]), np.array([[0.0], [1.0]]), zero, zero, 10.0)
    forward.take(arm)
    assert forward.command(10.5)[0] == pytest.approx(0.5) and forward.command(11.2)[0] == 1.0
    assert forward.command(11.0 + forward.REPEAT + 0.01) is None
    forward.reset()
    assert forward.command(10.5) is None
    with pytest.raises(ValueError, match="stamp"):
        forward.take(Trajectory(("a",), np.array([1.0]), np.array([[0.0]])))


def test_a_goal_lost_is_said_once_and_old_goals_say_nothing():
    sent, lost = [], []
    stream = GoalStream(lambda number, trajectory: sent.append(number), lambda *told: lost.append(told))
    arm = Trajectory(("a",), np.array([1.0]), np.array([[0.0]]))
    stream.take(arm)
    stream.take(arm)
    assert sent == [1, 2]
    stream.answered(1, False)
    stream.finished(1, -4)
    assert not lost and stream.state == "sent"
    stream.answered(2, True)
    stream.finished(2, -4, "elbow")
    stream.finished(2, -4, "elbow")
    assert lost == [("the controller ended the goal: path tolerance violated (elbow)", True)]
    assert stream.state == "lost"
    stream.take(arm)
    stream.answered(3, False)
    assert len(lost) == 2 and "refused" in lost[1][0] and not lost[1][1]
    stream.take(arm)
    stream.answered(4, True)
    stream.finished(4, 0)
    assert stream.state == "done" and len(lost) == 2 and stream.counts["aborted"] == 1
    assert refusal(arm, ("a",), 0.0) is None

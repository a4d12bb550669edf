"""An arm that is not where it was commanded: what it does is bounded, said at once, and over until vla/resume.

The arm is the simulated controller's reference plus what is wrong with it: an offset, sag, a wall in a joint's way.
"""

import numpy as np
import pytest
import robots
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.executor import ChunkExecutor
from vla_nodes.control.joint_trajectory_controller import JointTrajectoryController
from vla_nodes.control.limits import excess
from vla_nodes.control.safety import SafetySettings
from vla_nodes.control.settings import ExecutorSettings
from vla_nodes.control.tracking import Tracking
from vla_nodes.pipeline.action_core import ActionCore

T0, STEP = 1000.0, 0.01
TOLERANCE = SafetySettings().tracking_tolerance
PANDA = robots.panda()
JOINTS = st.integers(0, 6)
OFFSETS = st.floats(TOLERANCE + 0.005, 0.5).flatmap(lambda x: st.sampled_from([x, -x]))


def joint_rows(q, qd):
    """A chunk's rows from q (J,) on at qd (J,) rad/s, the gripper open."""
    rows = q + 0.1 * np.arange(1, 17)[:, None] * qd
    return np.hstack([np.clip(rows, PANDA.lower + 0.05, PANDA.upper - 0.05), np.ones((16, 1))])


class World:
    """One arm behind the gate and the executor; what happened in `measured`, `reference` (T, 7) and `errors` (T, 7)."""

    def __init__(self, start=PANDA.rest, wrong=lambda q, t: q, **safety):
        """wrong: (commanded joints, s since the start) -> where the arm is, or says that it is."""
        self.core = ActionCore(PANDA, ExecutorSettings(), SafetySettings(**{**robots.workspace(), **safety}))
        self.controller = JointTrajectoryController(PANDA.joint_names)
        self.controller.hold(start)
        self.wrong, self.now, self.k = wrong, T0, 0
        self.times, self.measured, self.reference, self.errors, self.said = [], [], [], [], []

    def run(self, seconds, chunk=None, idle="", every=10):
        """chunk: (core, now) -> ActionChunk, or None for a policy that sends nothing."""
        for _ in range(round(seconds / STEP)):
            self.now, self.k = T0 + STEP * self.k, self.k + 1
            commanded = self.controller.reference(self.now)[0]
            q = self.wrong(commanded, self.now - T0)
            self.core.joints(self.now, q, np.zeros(7), 0.04, self.now)
            if chunk is not None and self.k % every == 1:
                self.take(self.core.chunk(chunk(self.core, self.now), self.now), q)
            if self.k % 2 == 0:
                self.take(self.core.tick(self.now, self.now, idle), q)
            own = self.core.executor.reference(self.now)
            self.times.append(self.now)
            self.measured.append(q)
            self.reference.append(q if own is None else own[0])
            self.errors.append(np.zeros(7) if own is None else q - own[0])

    def take(self, answer, q):
        if answer.arm is not None:
            assert self.controller.accept(answer.arm, self.now, q, np.zeros(7)) is None
            # What lies ahead of now keeps the robot's own limits, whatever is wrong.
            ahead = int(answer.arm.times.searchsorted(self.now - answer.arm.stamp))
            assert excess(answer.arm, self.core.executor.full, PANDA, max(ahead - 1, 0))[0] <= 1.0 + 1e-6
        if answer.new:
            self.said.append((self.now, answer.cause, answer.reason))

    def tracking(self):
        """When it was said that the arm does not follow, and the line; it was said once."""
        ((at, _, reason),) = [x for x in self.said if x[1] == "tracking" and "chunk not" not in x[2]]
        return at, reason

    def first_error(self):
        return self.times[int(np.argmax(np.abs(self.errors).max(axis=1) > TOLERANCE))]


def travel(track):
    """How far each joint went in all, there and back (J,) rad."""
    return np.abs(np.diff(np.array(track), axis=0)).sum(axis=0)


def once(core, now):
    return ActionChunk(
        now, "x", 0.1, ActionSpace.JOINT_POSITION, joint_rows(core.executor.measured(now), np.zeros(7)), robots.GRIPPER
    )


def check_held(world, joint):
    at, reason = world.tracking()
    assert at - world.first_error() <= 0.2
    assert f"{PANDA.joint_names[joint]} is 0." in reason and "vla/resume" in reason and "\n" not in reason
    assert world.core.holding == world.core.gate.holding == "tracking" and world.core.reason == reason


@settings(deadline=None, max_examples=40)
@given(JOINTS, OFFSETS)
def test_a_constant_offset_moves_the_arm_by_its_own_size_at_most(joint, size):
    """The arm is a constant away from what it is commanded, and the policy holds: 10 s, and 5 attempts to resume."""
    offset = size * np.eye(7)[joint]
    world = World(wrong=lambda q, t: q + offset)
    world.run(0.05, once, every=100)
    world.run(10.0, idle="the policy holds")
    for _ in range(5):
        assert PANDA.joint_names[joint] in world.core.gate.resume()
        world.run(0.5, idle="the policy holds")
    check_held(world, joint)
    assert travel(world.reference)[joint] <= abs(size) + 1e-9
    assert travel(world.measured)[joint] <= abs(size) + 1e-9  # with the step of the first command
    assert np.delete(travel(world.measured), joint).max() < 1e-9


@settings(deadline=None, max_examples=40)
@example(0, 0.5, 0.0, ActionSpace.JOINT_POSITION, 3)
@given(JOINTS, OFFSETS, st.floats(0.0, 2.0), st.sampled_from(list(ActionSpace)[:4]), st.integers(0, 99))
def test_an_offset_that_comes_while_the_policy_runs_stops_the_arm_for_good(joint, size, when, space, seed):
    rng = np.random.default_rng(seed)
    qd = rng.uniform(-0.2, 0.2, 7)
    offset = size * np.eye(7)[joint]

    def chunk(core, now):
        if space is ActionSpace.JOINT_POSITION:
            rows = joint_rows(PANDA.rest + qd * np.sin(now - T0), qd * np.cos(now - T0))
        elif space is ActionSpace.JOINT_DELTA:
            rows = np.hstack([np.tile(0.1 * qd * np.cos(now - T0), (16, 1)), np.ones((16, 1))])
        elif space is ActionSpace.EE_DELTA:
            rows = np.hstack([np.tile(0.02 * qd[:6] * np.cos(now - T0), (16, 1)), np.ones((16, 1))])
        else:
            pose = PANDA.forward(PANDA.rest)
            rows = np.tile([*pose[:3, 3], 1.0, 0.0, 0.0, 0.0, 1.0], (16, 1))
            rows[:, 1] += 0.05 * np.sin(now - T0 + 0.1 * np.arange(1, 17))
        return ActionChunk(now - 0.06 if now > T0 + 0.1 else now, "x", 0.1, space, rows, robots.GRIPPER)

    world = World(wrong=lambda q, t: q + offset * (t >= when))
    world.run(when + 3.0, chunk)
    if all(cause == "impossible_step" for _, cause, _ in world.said):  # offset from the start: no chunk was taken
        assert when < STEP and travel(world.reference).max() == 0.0
        return
    assert when < 0.5 or travel(world.reference).max() > 0.01  # it did run
    check_held(world, joint)
    held = world.times.index(world.tracking()[0])
    after = travel(world.reference[held:])
    assert after.max() <= abs(size) + 0.15, after  # what it takes to stop
    assert travel(world.reference[held + 50 :]).max() < 1e-9  # half a second later nothing moves any more
    assert world.core.chunk(chunk(world.core, world.now), world.now).arm is None


@settings(deadline=None, max_examples=40)
@given(JOINTS, st.floats(0.1, 0.6), st.sampled_from([-1.0, 1.0]), st.floats(0.0, 0.3))
def test_an_arm_pinned_by_a_contact_is_let_go_within_half_a_second(joint, speed, sign, way):
    """The policy moves a joint against a wall: the tolerance, once passed, is soon kept to again, and the reference
    rests where the arm is. The same again after each resume, and no farther."""
    start, qd = np.array([0.0, 0.0, 0.0, -1.6, 0.0, 1.7, 0.0]), sign * speed * np.eye(7)[joint]
    wall = start[joint] + sign * way

    def stopped(q, t):
        return np.where(np.arange(7) == joint, np.minimum(q, wall) if sign > 0 else np.maximum(q, wall), q)

    world = World(start, stopped, workspace_low=(-1.0, -1.0, -1.0), workspace_high=(1.0, 1.0, 2.0), table=-1.0)
    for _ in range(3):
        world.said.clear()
        begun, origin, looked = world.now, world.reference[-1] if world.reference else start, len(world.times)

        def along(core, now, begun=begun, origin=origin):
            stamp = max(now - 0.05, begun + STEP)
            rows = joint_rows(origin + qd * (stamp - begun), qd)
            return ActionChunk(stamp, "x", 0.1, ActionSpace.JOINT_POSITION, rows, robots.GRIPPER)

        world.run(1.0 + (way + TOLERANCE) / speed + 2.0, along)
        errors = np.abs(np.array(world.errors[looked:])).max(axis=1)
        passed = int(np.argmax(errors > TOLERANCE))
        kept = passed + int(np.argmax(errors[passed:] <= TOLERANCE))
        # The reference returns at the tool's speed limit: from a faster motion it has farther to go.
        assert 0 < (kept - passed) * STEP <= (0.5 if speed <= 0.35 else 0.75), (speed, joint)
        assert (errors[kept:] <= TOLERANCE).all() and errors[-1] < 1e-3
        assert world.core.holding == "tracking" and abs(world.reference[-1][joint] - wall) < 1e-3
        at, reason = world.tracking()
        assert at - world.times[looked + passed] <= 0.2 and PANDA.joint_names[joint] in reason
        assert world.core.gate.resume() is None  # it is where it should be
        way = 0.0


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 3, 5]), st.floats(0.16, 0.5), st.floats(0.2, 3.0))
def test_an_arm_that_sags_is_not_followed_down(joint, size, takes):
    """The arm sags slowly at rest, as under a load: the reference stays where it is."""
    world = World(wrong=lambda q, t: q + size * min(max(t - 0.5, 0.0) / takes, 1.0) * np.eye(7)[joint])
    world.run(0.3, once, every=100)
    world.run(takes + 5.0, idle="the policy holds")
    check_held(world, joint)
    assert travel(world.reference).max() < 1e-9


@pytest.mark.parametrize("size", [2.0 * np.pi, -2.0 * np.pi, 50.0, 1.0])
def test_joint_states_that_make_no_sense_move_nothing(size):
    world = World(wrong=lambda q, t: q + size * (t > 1.0) * np.eye(7)[3])
    world.run(0.5, once, every=100)
    world.run(4.0, idle="the policy holds")
    assert world.core.holding == "tracking" and travel(world.reference).max() < 1e-9


@pytest.mark.parametrize(("joint", "sign", "place"), [(1, -1.0, "workspace"), (3, -1.0, "limits")])
def test_an_arm_outside_of_the_workspace_or_its_limits_is_not_followed_there(joint, sign, place):
    """It goes the other way than its reference: back to it would be out of the box, or past the joint's end."""
    start, box = PANDA.rest.copy(), {"workspace_low": (-1.0, -1.0, -1.0), "workspace_high": (1.0, 1.0, 2.0)}
    if place == "workspace":
        box["table"] = float(PANDA.forward(start)[2, 3]) - 0.02
    else:
        start[joint] = PANDA.upper[joint] - 0.03
    world = World(start, lambda q, t: start - 0.8 * (q - start), **box)

    def chunk(core, now):
        rows = joint_rows(start + sign * 0.3 * (now - T0) * np.eye(7)[joint], sign * 0.3 * np.eye(7)[joint])
        return ActionChunk(max(now - 0.05, T0), "x", 0.1, ActionSpace.JOINT_POSITION, rows, robots.GRIPPER)

    world.run(4.0, chunk)
    check_held(world, joint)
    moved = sign * (np.array(world.reference)[:, joint] - start[joint])
    assert moved.max() > 0.05 and np.diff(moved).min() > -1e-3 and moved[-1] > moved.max() - 1e-3


def test_to_approach_where_it_is_or_to_stop_at_rest_is_a_hold():
    executor = ChunkExecutor(PANDA)
    executor.observe(T0, PANDA.rest, np.zeros(7))
    for again in range(3):
        for trajectory in (executor.approach(PANDA.rest, T0 + again), executor.stop(T0 + again, full=True)):
            assert len(trajectory.times) >= 2 and np.ptp(trajectory.positions, axis=0).max() < 1e-9
            assert (np.diff(trajectory.times) > 0.0).all()


@given(st.lists(st.tuples(st.floats(-1.0, 1.0), st.floats(-1.0, 1.0)), min_size=1, max_size=30))
def test_only_a_joint_that_its_reference_left_is_ever_abandoned(steps):
    """A joint is abandoned only after it agreed, and only if the reference has gone farther since than the joint."""
    tracking, last = Tracking(("a",), 0.15, 0.1), None
    for k, (reference, measured) in enumerate(steps):
        tracking.look(np.array([reference]), np.array([measured]), 0.02 * k)
        if abs(reference - measured) <= 0.15:
            last = reference, measured
            assert not tracking.problem
        expected = last is not None and abs(reference - last[0]) > abs(measured - last[1])
        assert tracking.abandoned[0] == (expected and abs(reference - measured) > 0.15)

"""Random and adversarial chunk streams: no published trajectory may break a limit, a seam or the controller's rules.

40 streams by default; ./check --soak -s -k test_streams runs ten thousand (a quarter of an hour of one core), and
--first-seed N starts elsewhere. Every sixth stream drives an arm of six joints without a gripper.
Streams have: latencies of 0 to 500 ms, drops, reorderings, duplicates, reversals, spikes, rows at and past joint limits
and singular poses, NaN, wrong sizes and periods, horizons of 1 to 500, stamps in the future, a clock that
jumps ahead, openings out of range, stops and homing in the middle, arms that start moving or slightly outside their
limits, all action spaces, strategies and ways to change the instruction. What is checked is what the message carries:
times in whole nanoseconds, interpolated at 1 kHz as the controller does by the fields given.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import robots as arms
import six_axis
import soak

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.executor import ChunkExecutor
from vla_nodes.control.joint_trajectory_controller import JointTrajectoryController
from vla_nodes.control.robot import RobotModel
from vla_nodes.control.settings import ExecutorSettings, OnInstructionChange, Strategy
from vla_nodes.control.trajectory import refusal, sample

STREAMS = soak.amount(40, 10_000)
FOUND = (2340,)  # streams that broke something once, run every time
RATE = 1e-3
FINGER = ("panda_finger_joint1",)


@pytest.fixture(scope="module")
def robots():
    return [*[arms.panda()] * 5, RobotModel(six_axis.urdf(), "tool0", arms.motion_limits(six_axis.LIMITS))]


def random_chunk(rng, stamp, robot, measured):
    """Anything from a smooth motion to nonsense."""
    joints = robot.dof
    space = ActionSpace(rng.choice([x.value for x in ActionSpace]))
    rows, period = int(rng.integers(1, 25)), float(rng.choice([0.02, 0.05, 0.1, 0.2]))
    if rng.random() < 0.03:
        rows, period = int(rng.choice([1, 2, 100, 500])), float(rng.choice([0.001, 0.004, 0.3, 1.9]))
    kind = rng.choice(["smooth", "noisy", "jump", "reverse", "still", "spike", "limit"])
    t = np.arange(1, rows + 1)[:, None] * period
    if space is ActionSpace.EE_DELTA:
        speed = rng.normal(size=(1, 6)) * ([0.15] * 3 + [0.4] * 3) * np.cos(rng.uniform(0, 6, (1, 6)) + 2 * t)
        a = speed * period
        a += {"noisy": 0.01, "jump": 0.1, "spike": 0.0}.get(kind, 0.0) * rng.normal(size=a.shape)
    elif space is ActionSpace.EE_POSE:
        pose = robot.forward(measured)
        a = np.zeros((rows, 7))
        a[:, :3] = pose[:3, 3] + rng.normal(size=3) * 0.15 * t
        a[:, :3] += {"noisy": 0.01, "jump": 0.3}.get(kind, 0.0) * rng.normal(size=(rows, 3))
        a[:, 3:] = rng.normal(size=4) if kind == "jump" else [1.0, 0.02, 0.0, 0.01]
    else:
        a = rng.normal(size=(1, joints)) * 0.5 * np.sin(t + rng.uniform(0, 6, (1, joints)))
        a += {"noisy": 0.02, "jump": 1.0}.get(kind, 0.0) * rng.normal(size=a.shape)
        a = measured + a if space is ActionSpace.JOINT_POSITION else np.diff(np.vstack([a[:1], a]), axis=0)
    if kind == "reverse":
        a = -a[::-1] if space is not ActionSpace.EE_POSE else a[::-1]
    if kind == "still":
        a = a * 0.0 if "delta" in space.value else np.repeat(a[:1], rows, 0)
    if kind == "spike":
        a[rng.integers(rows)] += rng.normal() * 2.0
    if kind == "limit":
        if space is ActionSpace.JOINT_POSITION:  # towards a limit, onto it, past it, and back
            j, end = rng.integers(joints), rng.choice([robot.lower, robot.upper])
            end = end[j] + rng.choice([0.0, 0.0, 0.3, -0.3])
            a[:, j] = measured[j] + (end - measured[j]) * np.minimum(t[:, 0] / rng.uniform(0.2, 2.0), 1.0)
        elif space is ActionSpace.EE_POSE:  # stretched out: every elbow is singular there
            a[:, :3] *= 1.0 + t * rng.uniform(0.0, 2.0)
    opening = rng.uniform(-0.2, 1.2, (rows, 1)).round(rng.integers(0, 2))
    a = np.hstack([a, opening[:, : len(robot.grippers)]])
    broken = rng.random()
    if broken < 0.03:
        a[rng.integers(rows), rng.integers(a.shape[1])] = rng.choice([np.nan, np.inf, 1e300, -1e9])
    elif broken < 0.05:
        a = a[:, : rng.integers(0, a.shape[1])]
    elif broken < 0.06:
        a = a.ravel()
    elif broken < 0.07:
        period = float(rng.choice([0.0, -0.1, np.nan, 1e9]))
    elif broken < 0.08:
        stamp += float(rng.choice([0.05, 0.5, 1e6, np.nan, -1e9]))
    instruction = "first" if rng.random() < 0.8 else "second"
    return ActionChunk(stamp, instruction, period, space, a, robot.gripper_names)


def published(trajectory):
    """The trajectory as its message carries it, in whole nanoseconds."""
    stamp = round(trajectory.stamp * 1e9) / 1e9
    return replace(trajectory, times=np.round(trajectory.times * 1e9) / 1e9, stamp=stamp)


def check_limits(arm, limits, robot, outside):
    """outside: (J,) rad, how far the arm was measured past its limits when it started; no farther may it go."""
    slack_low, slack_high = np.maximum(-outside, 0.0), np.maximum(outside, 0.0)
    t = np.arange(arm.times[0], arm.times[-1] + RATE, RATE)
    q, qd, qdd = sample(arm, t)
    slack = 1.0 + 1e-6
    assert np.all(q >= limits.lower - slack_low - 1e-9) and np.all(q <= limits.upper + slack_high + 1e-9)
    assert np.all(np.abs(qd) <= limits.velocity * slack), (np.abs(qd) / limits.velocity).max()
    assert np.all(np.abs(qdd) <= limits.acceleration * slack), (np.abs(qdd) / limits.acceleration).max()
    # The last sample may lie beyond the end, where the controller holds: acceleration there is zero, as planned.
    jerk = np.abs(np.diff(qdd, axis=0)) / RATE
    assert np.all(jerk <= limits.jerk * slack + 1e-6), (jerk / limits.jerk).max()
    # Every 10 ms, and every 1 ms where it comes near: in 5 ms it does not change by a tenth.
    near = np.flatnonzero(robot.tool_speed(q[::10], qd[::10]) > 0.9 * limits.tool_speed)
    near = np.unique(np.clip(10 * near[:, None] + np.arange(-5, 6), 0, len(q) - 1))
    assert near.size == 0 or robot.tool_speed(q[near], qd[near]).max() <= limits.tool_speed
    assert np.diff(arm.times).min() > 1e-3  # in less, a nanosecond's rounding would be an acceleration
    assert not arm.velocities[-1].any() and not arm.accelerations[-1].any()


def check_seam(before, after):
    """Position, velocity and acceleration before and after a trajectory took another's place."""
    assert np.abs(before[0] - after[0]).max() <= 1e-6 and np.abs(before[1] - after[1]).max() <= 1e-4
    assert len(before) < 3 or np.abs(before[2] - after[2]).max() <= 1e-3


def run_stream(seed, robot, counts):
    rng, joints = np.random.default_rng(seed), robot.dof
    settings = ExecutorSettings(
        strategy=Strategy(rng.choice(["splice", "splice", "splice", "temporal_ensemble", "finish_chunk"])),
        on_instruction_change=OnInstructionChange(rng.choice([x.value for x in OnInstructionChange])),
        at_rest=str(rng.choice(["stamp", "path"])),
        slowest=float(rng.choice([0.02, 0.1])),
    )
    executor = ChunkExecutor(robot, settings)
    controller = JointTrajectoryController(robot.joint_names)
    fingers = JointTrajectoryController(FINGER)
    t = 1.7e9 + rng.uniform(0, 1e5)  # seconds since 1970: where double precision is tightest
    q = robot.rest + rng.normal(size=joints) * 0.3
    q = np.clip(q, robot.lower + 0.05, robot.upper - 0.05)
    if rng.random() < 0.1:  # a joint on its limit, or a little past it, as measurements are
        j = rng.integers(joints)
        q[j] = rng.choice([robot.lower[j], robot.upper[j]]) + rng.choice([0.0, 1e-4, -1e-4])
    outside = np.maximum(q - robot.upper, 0.0) + np.minimum(q - robot.lower, 0.0)
    controller.hold(q)
    fingers.hold(np.array([0.02]))
    # What is measured at first may move (a person pushes the arm): the first command is the measured pose all the same.
    executor.observe(t, q, rng.normal(size=joints) * (rng.random() < 0.2), 0.02)
    in_flight, inbox, previous = None, [], None
    for _ in range(int(rng.integers(3, 12))):
        if inbox and rng.random() < 0.1:
            chunk, arrival = inbox.pop(0), t  # reordered: an old one arrives after newer ones
        else:
            measured = executor.measured(t)
            chunk = random_chunk(rng, t, robot, q if measured is None else measured)
            arrival = t + rng.uniform(0, 0.5)
            if rng.random() < 0.1:
                inbox.append(chunk)
                continue
        if previous is not None and rng.random() < 0.05:
            chunk = previous  # said twice
        previous = chunk
        now = max(arrival, t) + (rng.uniform(1.0, 20.0) if rng.random() < 0.02 else 0.0)  # the clock jumps ahead
        event = rng.random()
        if event < 0.06:
            arm, finger = executor.stop(now), None
        elif event < 0.08:
            home = np.clip(rng.uniform(robot.lower, robot.upper), -3.0, 3.0)
            arm, finger = executor.approach(home, now), None
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                output = executor.submit(chunk, now)
            counts[output.cause or output.mode] += 1
            arm, finger = output.arm, (output.grippers or {}).get("gripper")
        if arm is not None:
            arm = published(arm)
            counts["published"] += 1
            assert refusal(arm, robot.joint_names, now) is None
            check_limits(arm, executor.limits, robot, outside)
            receipt = now + rng.uniform(0.0, settings.lead)
            assert arm.stamp + arm.times[0] <= now  # the controller bridges nothing on its own
            for at in (receipt, now + settings.lead):
                new = sample(arm, at - arm.stamp)
                if in_flight is None:
                    np.testing.assert_allclose(new[0], q, atol=1e-12)
                else:
                    check_seam(sample(in_flight, at - in_flight.stamp), new)
            before = controller.reference(receipt)
            assert controller.accept(arm, receipt, q, np.zeros(joints)) is None
            check_seam(before, controller.reference(receipt))
            in_flight = arm
        if finger is not None:
            finger = published(finger)
            assert refusal(finger, FINGER, now) is None
            before = fingers.reference(now)
            assert fingers.accept(finger, now, np.zeros(1), np.zeros(1)) is None
            check_seam(before, fingers.reference(now))
            p, v, _ = sample(finger, np.arange(0.0, finger.times[-1], RATE))
            assert p.min() >= -1e-9 and p.max() <= 0.04 + 1e-9
            assert np.abs(v).max() <= robot.grippers[0].speed + 1e-9
        later = now + rng.uniform(0.01, 0.6)
        for x in np.arange(t + 0.01, later, 0.02):
            q, qd = controller.reference(x)
            executor.observe(x, q + rng.normal(size=joints) * 1e-3, qd, 0.02)
        t = float(later)
        executor.observe(t, q, qd, 0.02)


@pytest.mark.timeout(300 + 10 * STREAMS)  # ten times what one takes alone
def test_streams(robots):
    streams, start = STREAMS, soak.first_seed
    counts = Counter()
    for seed in (*FOUND, *range(start, start + streams)):
        try:
            run_stream(seed, robots[seed % len(robots)], counts)
        except Exception as error:
            raise AssertionError(f"stream with seed {seed}: {error!r}") from error
    print(f"{streams} streams, no violation:", dict(counts))
    # The streams must really reach what they are meant to test.
    assert counts["moving"] > 1.5 * streams and counts["stopping"] + counts["rest"] > streams / 10
    assert {"malformed", "unreachable", "finishing"} <= set(counts)

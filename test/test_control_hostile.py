"""What nobody should send: each is refused in one line and counted, the arm keeps to its plan, and the next good chunk
is carried out. Messages go in as action_node gets them."""

import math
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import robots
import six_axis
import yaml

from vla_nodes.control.executor import ChunkExecutor
from vla_nodes.control.robot import Gripper, RobotModel
from vla_nodes.control.safety import SafetySettings
from vla_nodes.control.settings import ExecutorSettings
from vla_nodes.messages.convert import chunk_from
from vla_nodes.pipeline.action_core import ActionCore
from vla_nodes.pipeline.action_loop import ActionLoop
from vla_nodes.pipeline.robot_description import RobotFileError, robot_model
from vla_nodes.share import share_path

T0 = 1000.0
FINGER = "panda_finger_joint1"
PANDA = robots.panda()
SIX = RobotModel(six_axis.urdf(), "tool0", robots.motion_limits(six_axis.LIMITS))
BOX = SafetySettings(workspace_low=(-1.0, -1.0, -0.5), workspace_high=(0.85, 0.6, 1.0))
FILE = yaml.safe_load(share_path(robots.PANDA).read_text())
POSE = [0.3, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 1.0]


def stamp(t):
    return SimpleNamespace(sec=math.floor(t), nanosec=round((t - math.floor(t)) * 1e9))


def message(
    actions, space="ee_delta", at=T0, period=0.1, names=(), frame="panda_link0", grippers=robots.GRIPPER, **fields
):
    actions = np.asarray(actions, dtype=np.float32)
    whole = {
        "header": SimpleNamespace(stamp=stamp(at), frame_id=frame),
        "instruction": "x", "period": period, "action_space": space, "names": list(names),
        "grippers": list(grippers),
        "horizon": actions.shape[0], "dim": actions.shape[1] if actions.ndim > 1 else 1, "actions": actions.ravel(),
    }  # fmt: skip
    return SimpleNamespace(**{**whole, **fields})


def rows(count=16, columns=7, value=0.003):
    actions = np.full((count, columns), value)
    actions[:, 3:] = 0.0
    return actions


def joint_rows(robot, names=None, columns=0):
    actions = np.tile([*robot.rest, *np.ones(len(robot.grippers))], (16, 1))
    names = [*robot.joint_names, *robot.gripper_names] if names is None else names
    return message(actions[:, columns:], "joint_position", names=names, frame="", grippers=robot.gripper_names)


def first_chunk(robot):
    grippers = robot.gripper_names
    return message(rows(columns=6 + len(grippers)), frame=robot.base_frames[0], grippers=grippers)


class Arm:
    """A robot that follows its plan, behind the gate and the executor."""

    def __init__(self, robot=PANDA):
        self.robot, self.core = robot, ActionCore(robot, ExecutorSettings(), BOX)
        self.loop = ActionLoop(self.core)
        self.names = [*robot.joint_names, *(gripper.joint for gripper in robot.grippers)]
        self.joints(T0)
        self.answer = self.loop.chunk(first_chunk(robot), T0 + 0.05)
        self.plan = self.core.executor.plan
        assert self.plan is not None, self.answer

    def joints(self, t, **fields):
        plan = self.core.executor.reference(t)
        q = self.robot.rest if plan is None else plan[0]
        whole = {"name": self.names, "position": [*q, 0.04][: len(self.names)], "velocity": [],
                 "header": SimpleNamespace(stamp=stamp(t))}  # fmt: skip
        return self.loop.joints(SimpleNamespace(**{**whole, **fields}), t)

    def refuses(self, bad, cause, word, now=T0 + 0.1):
        with np.errstate(all="raise"):  # it is seen before anything is computed from it
            answer = self.loop.chunk(bad, now)
        assert answer.arm is None and not answer.grippers and answer.cause == cause, answer.reason
        assert word in answer.reason and "\n" not in answer.reason and len(answer.reason) < 500, answer.reason
        assert self.core.gate.counts[cause] == 1 and answer.new
        assert self.core.executor.plan is self.plan  # the motion in flight goes on, and ends at rest


NAN, HUGE = rows(), rows()
NAN[3, 2], HUGE[3, 2] = np.nan, 3e38


@pytest.mark.parametrize(
    ("bad", "cause", "word"),
    [
        (message(rows(1000)), "malformed", "1000 x 7"),
        (message(rows(), horizon=0), "malformed", "0 x 7"),
        (message(rows(), horizon=2**32 - 1), "malformed", "4294967295 x 7"),
        (message(rows(), dim=8), "malformed", "carries 112"),
        (message(np.zeros((0, 7)), horizon=16), "malformed", "carries 0"),
        (message(rows(16, 6)), "malformed", "chunk of 6 columns names 7"),
        (message(rows(16, 64)), "malformed", "chunk of 64 columns names 7"),
        (message(rows(), period=0.0), "malformed", "period 0.0"),
        (message(rows(), period=-0.1), "malformed", "period -0.1"),
        (message(rows(), period=math.nan), "malformed", "period nan"),
        (message(rows(), period=1e300), "malformed", "period 1e+300"),
        (message(rows(), at=T0 + 60.0), "future", "ahead of the clock"),
        (message(rows(), at=2.0**31), "future", "ahead of the clock"),
        (message(rows(), at=0.0), "too_old", "old"),
        (message(rows(), at=-5.0), "too_old", "old"),
        (message(NAN), "not_finite", "1 of 112"),
        (message(HUGE), "malformed", "3e+38"),
        (message(rows(value=999.0)), "impossible_step", "times what the arm can move"),
        (message(rows(), "teleport\nnow"), "malformed", "is none of"),
        (message(rows(), ""), "malformed", "is none of"),
        (message([[*POSE[:3], 0, 0, 0, 0, 1.0]] * 4, "ee_pose"), "malformed", "quaternion of length zero"),
        (message([[*POSE[:3], 0, np.nan, 0, 1, 1.0]] * 4, "ee_pose"), "not_finite", "4 of 32"),
        (message(rows(), frame="camera_link"), "malformed", "the arm's base is panda_link0"),
        (message(rows(), names=["dx", "dx", "dz", "rx", "ry", "rz", "gripper"]), "malformed", "each once"),
        (message(rows(), names=["dx", "dy", "dz", "rx", "ry", "rz", "hand"]), "malformed", "each once"),
        (message(rows(), grippers=[]), "malformed", "chunk of 7 columns names 6"),
        (message(rows(), grippers=["hand"]), "malformed", "no gripper 'hand': the robot has gripper"),
        (message(rows(columns=8), grippers=["gripper", "gripper"]), "malformed", "stands twice"),
        (joint_rows(PANDA, [PANDA.joint_names[0]] * 8), "malformed", "each once"),
        (joint_rows(PANDA, []), "malformed", "named are 'none'"),
        (joint_rows(PANDA, PANDA.joint_names, columns=1), "malformed", "gripper, each once"),
        (joint_rows(SIX), "malformed", "panda_joint7"),
    ],
)
def test_a_hostile_chunk_is_refused_and_the_arm_keeps_to_its_plan(bad, cause, word):
    arm = Arm()
    arm.refuses(bad, cause, word)
    for t in T0 + np.arange(0.11, 0.2, 0.01):
        arm.joints(float(t))
    good = arm.loop.chunk(message(rows(), at=T0 + 0.15), T0 + 0.2)
    assert good.arm is not None and not good.cause and arm.core.used == 2


def test_joint_chunks_of_an_arm_of_six_need_its_six_names():
    arm = Arm(SIX)
    assert not SIX.grippers and not arm.answer.grippers
    arm.refuses(joint_rows(PANDA), "malformed", "no gripper 'gripper': the robot has none")
    good = arm.loop.chunk(joint_rows(SIX), T0 + 0.12)
    assert good.arm is not None and not good.grippers


@pytest.mark.parametrize(("count", "period"), [(1, 0.1), (1, 0.001), (1, 2.0), (2, 0.001), (512, 0.001), (512, 2.0)])
def test_the_shortest_and_the_longest_chunks_are_carried_out_or_refused_by_name(count, period):
    arm = Arm()
    tiny = rows(count, value=1e-4 * min(period, 0.1))
    answer = arm.loop.chunk(message(tiny, period=period, at=T0 + 0.05), T0 + 0.05)
    assert (answer.arm is None) == bool(answer.cause) and answer.cause in ("", "too_late"), answer.reason
    assert (answer.cause == "too_late") == (count * period < 0.06)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"name": ["a"] * 300, "position": [0.0] * 300}, "at most 256"),
        ({"name": list(PANDA.joint_names), "position": [0.0] * 7}, f"lacks {FINGER}"),
        (
            {"name": [*PANDA.joint_names, "panda_finger_joint1", "panda_joint1"], "position": [0.0] * 9},
            "more than once",
        ),
        ({"position": [0.0] * 7}, "8 names but 7 positions"),
        ({"position": [math.nan] * 8}, "not finite"),
        ({"velocity": [0.0] * 3}, "3 velocities"),
    ],
)
def test_hostile_joint_states_are_counted_and_stop_the_arm_if_nothing_better_comes(fields, word):
    arm = Arm()
    answer = arm.joints(T0 + 0.1, **fields)
    assert answer.cause == "bad_joint_states" and answer.new and word in answer.reason
    assert arm.core.gate.counts["bad_joint_states"] == 1 and arm.core.executor.plan is arm.plan
    arm.loop.idle = ""
    for k in range(1, 40):
        now = T0 + 0.1 + 0.02 * k
        arm.joints(now, **fields)
        arm.loop.tick(now, now)
    assert arm.core.holding == "stale_joint_states" and not arm.core.moving(now)


def test_joint_states_may_come_in_any_order():
    one, other = Arm(), Arm()
    order = np.random.default_rng(0).permutation(len(one.names))
    q = [*(PANDA.rest + 0.1), 0.03]
    one.joints(T0 + 0.1, position=q)
    other.joints(T0 + 0.1, name=[one.names[i] for i in order], position=[q[i] for i in order])
    np.testing.assert_array_equal(one.core.executor.measured(T0 + 0.1), other.core.executor.measured(T0 + 0.1))


def test_one_joint_state_from_the_future_does_not_silence_those_that_follow():
    arm = Arm()
    arm.joints(T0 + 1e6, position=[*PANDA.rest, 0.04])
    for t in T0 + np.arange(0.1, 0.2, 0.02):
        arm.joints(float(t))
    assert arm.loop.chunk(message(rows(), at=T0 + 0.15), T0 + 0.2).arm is not None


def test_an_arm_measured_where_it_cannot_be_is_not_moved():
    arm = Arm()
    for t in T0 + np.arange(0.01, 0.2, 0.01):
        arm.joints(float(t), position=[*(PANDA.rest + 50.0), 0.04])
        arm.loop.idle = ""
    assert arm.loop.chunk(message(rows(), at=T0 + 0.15), T0 + 0.2).arm is None
    for k in range(30):
        answer = arm.loop.tick(T0 + 0.2 + 0.02 * k, T0 + 0.2 + 0.02 * k)
        arm.joints(T0 + 0.2 + 0.02 * k, position=[*(PANDA.rest + 50.0), 0.04])
        if answer.arm is not None:
            assert ((answer.arm.positions >= PANDA.lower) & (answer.arm.positions <= PANDA.upper)).all()
    assert arm.core.holding == "tracking"


def test_columns_may_stand_in_any_order():
    """A policy's contract says in which; the arm moves as if they stood in control's own."""
    plain, other = Arm(), Arm()
    given = np.random.default_rng(0).uniform(-0.003, 0.003, (16, 7)).astype(np.float32)
    names = ["dx", "dy", "dz", "rx", "ry", "rz", "gripper"]
    order = [6, 4, 0, 2, 1, 3, 5]
    one = plain.loop.chunk(message(given), T0 + 0.1)
    two = other.loop.chunk(message(given[:, order], names=[names[i] for i in order]), T0 + 0.1)
    np.testing.assert_array_equal(one.arm.positions, two.arm.positions)
    np.testing.assert_array_equal(one.grippers["gripper"].positions, two.grippers["gripper"].positions)


def test_two_grippers_each_take_their_column():
    left, right = Gripper("left", "left_joint", 0.0, 0.04, 0.1), Gripper("right", "right_joint", 0.0, -0.8, 0.1)
    arm = RobotModel(six_axis.urdf(), "tool0", robots.motion_limits(six_axis.LIMITS), grippers=(left, right))
    executor = ChunkExecutor(arm)
    executor.observe(T0, arm.rest, np.zeros(6), np.array([0.04, -0.8]))
    names = ["right", *arm.joint_names, "left"]
    actions = np.tile([0.5, *arm.rest, 0.0], (16, 1))
    chunk = chunk_from(message(actions, "joint_position", names=names, grippers=["left", "right"]), arm)
    moved = executor.submit(chunk, T0 + 0.05).grippers
    assert {name: motion.joint_names for name, motion in moved.items()} == {
        "left": ("left_joint",), "right": ("right_joint",)
    }  # fmt: skip
    assert moved["left"].positions[-1, 0] == 0.0
    assert moved["right"].positions[-1, 0] == pytest.approx(-0.4)
    only = chunk_from(message(actions[:, :7], "joint_position", names=names[:7], grippers=["right"]), arm)
    assert set(executor.submit(only, T0 + 0.1).grippers or {"right"}) == {"right"}  # the left one holds


def changed(*path, value):
    entries = deepcopy(FILE)
    where = entries
    for key in path[:-1]:
        where = where[key]
    if value is ...:
        del where[path[-1]]
    else:
        where[path[-1]] = value
    return entries


J3 = ("limits", "joints", "panda_joint3")
HAND = ("robot", "grippers", 0)


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        (changed(*J3, "jerk", value=math.nan), "jerk"),
        (changed(*J3, "acceleration", value=math.inf), "must be a finite number"),
        (changed(*J3, "acceleration", value=-1.0), "acceleration"),
        (changed(*J3, "acceleration", value="fast"), "acceleration"),
        (changed(*J3, value=[]), "limits.joints"),
        (changed(*J3, value=...), "limits.joints lacks panda_joint3"),
        (
            changed("limits", "joints", "elbow", value={"acceleration": 1.0, "jerk": 1.0}),
            "elbow is none of panda_joint",
        ),
        (changed("limits", "joints", value=7), "limits.joints"),
        (changed("limits", "tool_speed", value=math.nan), "tool_speed"),
        (changed("limits", "tool_speed", value=None), "tool_speed"),
        (changed("limits", "grippers", value={}), "limits.grippers lacks gripper"),
        (changed("limits", "grippers", "gripper", value=0.0), "limits.grippers"),
        (changed("rest", value=[0.0] * 6), "rest has 6 values, robot.joints has 7"),
        (changed("rest", value=[math.nan] * 7), "rest[0] is nan"),
        (changed("rest", value=[9.0] * 7), "not within the joint limits"),
        (changed(*HAND, "open", value=0.0), "closed and open of gripper are the same"),
        (changed(*HAND, "closed", value=math.inf), "finite"),
        (changed(*HAND, "joint", value="panda_joint1"), "is a joint of the arm"),
        (changed(*HAND, "name", value="arm"), "'arm'"),
        (changed(*HAND, "name", value="my hand"), "'my hand'"),
        (changed("robot", "grippers", value="none"), "robot.grippers"),
        (changed("robot", "joints", value=[]), "robot.joints is empty"),
        (changed("robot", "joints", 0, value="panda_joint2"), "'panda_joint2' stands twice"),
        (changed("robot", "base_frame", value="world"), "robot.base_frame is 'world', the URDF's root is panda_link0"),
        (changed("robot", "tool_frame", value="nose"), "no frame 'nose'"),
        (changed("robot", "colour", value="white"), "colour"),
        (changed("robot", value=...), "robot"),
        (changed("robot", "workspace", "lower", value=[1.0, 0.0, 0.0]), "must be below"),
        (changed("urdf", value=""), "urdf"),
    ],
)
def test_a_contract_that_makes_no_sense_is_refused_by_file_and_entry(tmp_path, entries, word):
    path = tmp_path / "contract.yaml"
    path.write_text(yaml.safe_dump(entries))
    with pytest.raises(RobotFileError) as caught:
        robot_model(path)
    assert str(caught.value).startswith(f"{path}: ") and word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"- 1\n- 2\n", b"{a: [", b"\xff\xfe\x00", b"robot: &a [*a]\n"])
def test_a_file_that_is_no_contract_is_refused_by_name(tmp_path, content):
    path = tmp_path / "contract.yaml"
    path.write_bytes(content)
    with pytest.raises(RobotFileError, match="contract.yaml") as caught:
        robot_model(path)
    assert "\n" not in str(caught.value)


def test_a_urdf_that_is_not_there_is_named_with_the_file_that_names_it(tmp_path):
    path = tmp_path / "contract.yaml"
    path.write_text(yaml.safe_dump(changed("urdf", value="/nowhere/arm.urdf")))
    with pytest.raises(FileNotFoundError, match=r"contract.yaml: urdf: .*/nowhere/arm.urdf"):
        robot_model(path)
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        robot_model(tmp_path / "none.yaml")

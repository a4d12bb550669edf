"""The contract as a value: it survives its file, says what is wrong with it, and where two of them differ."""

import copy
import json

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_tiny import CONTRACT

from vla_nodes.policy.contract import (
    Actions,
    Box,
    Camera,
    Contract,
    ContractError,
    Gripper,
    Robot,
    StateVector,
    Thresholds,
    difference_table,
    differences,
    parse,
    plain,
)

NAN, INFINITE = float("nan"), float("inf")
names = st.text(min_size=1, max_size=12)
numbers = st.floats(-1e6, 1e6)
positive = st.floats(1e-6, 1e6)
probabilities = st.floats(0, 1)


@st.composite
def state_vectors(draw, name):
    size = draw(st.integers(1, 5))

    def one_or_each(values):
        return draw(st.one_of(values, st.lists(values, min_size=size, max_size=size).map(tuple)))

    return StateVector(
        name=name, size=size, unit=draw(st.text(max_size=5)), token=draw(names), offset=one_or_each(numbers),
        scale=one_or_each(positive))  # fmt: skip


@st.composite
def contracts(draw):
    joints = tuple(draw(st.lists(names, max_size=7, unique=True)))
    grippers = tuple(
        Gripper(name=name, joint=draw(names.filter(lambda joint: joint not in joints)), closed=closed, open=opened)
        for name in draw(st.lists(names, max_size=2, unique=True))
        for closed, opened in [draw(st.lists(numbers, min_size=2, max_size=2, unique=True))]
    )
    motion = draw(st.lists(names.filter(lambda n: n not in {g.name for g in grippers}), max_size=7, unique=True))
    columns = tuple(draw(st.permutations([*motion, *(g.name for g in grippers)])) or ["x"])
    each = {"min_size": len(columns), "max_size": len(columns)}
    sides = [sorted(draw(st.lists(numbers, min_size=2, max_size=2, unique=True))) for _ in range(3)]
    box = Box(lower=tuple(low for low, _ in sides), upper=tuple(high for _, high in sides))
    return Contract(
        robot=Robot(
            name=draw(names), joints=joints, base_frame=draw(names),
            tool_frame=draw(names), grippers=grippers,
            workspace=draw(st.sampled_from([None, box]))),
        state=tuple(draw(state_vectors(name)) for name in draw(st.lists(names, max_size=3, unique=True))),
        actions=Actions(
            space=draw(st.sampled_from(["ee_delta", "ee_pose", "joint_delta", "joint_position"])), columns=columns,
            scale=tuple(draw(st.lists(positive, **each))),
            offset=draw(st.none() | st.lists(numbers, **each).map(tuple)),
            grippers=tuple(g.name for g in grippers), horizon=draw(st.integers(1, 500)), period=draw(positive)),
        cameras=tuple(
            Camera(name=name, depth=draw(st.sampled_from(["required", "optional", "none"])),
                   pose=draw(st.sampled_from(["known", "unknown"])),
                   depth_range=(draw(st.floats(0, 1)), draw(st.floats(2, 9))))
            for name in draw(st.lists(names, min_size=1, max_size=3, unique=True))),
        tick=draw(positive),
        thresholds=Thresholds(start=draw(probabilities), done_observations=draw(st.integers(1, 99)),
                              holding=(draw(st.floats(0, 0.4)), draw(st.floats(0.5, 1)))),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(contracts())
def test_it_survives_json_and_yaml(contract):
    values = plain(contract)
    assert parse(values) == contract
    assert parse(json.loads(json.dumps(values))) == contract
    assert parse(yaml.safe_load(yaml.safe_dump(values))) == contract


@settings(max_examples=60, deadline=None)
@given(contracts())
def test_columns_are_either_motion_or_grippers(contract):
    actions = contract.actions
    assert sorted((*actions.motion_columns, *actions.gripper_columns)) == list(range(actions.size))
    assert tuple(actions.columns[i] for i in actions.gripper_columns) == actions.grippers


@settings(max_examples=60, deadline=None)
@given(contracts(), contracts())
def test_there_is_no_difference_to_itself_and_as_many_both_ways(one, other):
    assert differences(one, copy.deepcopy(one)) == []
    there, back = differences(one, other), differences(other, one)
    assert bool(there) == (one != other)
    assert [(entry, b, a) for entry, a, b in there] == back


def changed(entry: str, value) -> dict:
    """Plain values of CONTRACT with one entry replaced: "actions.scale", "state.0.size"; ... removes the entry."""
    values = json.loads(json.dumps(plain(CONTRACT)))
    *path, last = (int(step) if step.isdigit() else step for step in entry.split("."))
    part = values
    for step in path:
        part = part[step]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return values


def refusal(values) -> str:
    with pytest.raises(ContractError) as info:
        parse(values)
    assert "\n" not in str(info.value)
    return str(info.value)


FINGER = {"name": "gripper", "joint": "panda_finger_joint1", "closed": 0.0, "open": 0.04}


@pytest.mark.parametrize(("entry", "value", "said"), [
    # an entry alone
    ("robot", ..., "robot"),
    ("tick", ..., "tick"),
    ("tick", 0.0, "tick"),
    ("tick", "fast", "tick"),
    ("surprise", 1, "surprise"),
    ("two\nlines", 1, "two lines"),
    ("robot.name", "", "robot.name"),
    ("robot.base_frame", 7, "robot.base_frame"),
    ("robot.workspace", {"lower": [0, 0], "upper": [1, 1]}, "robot.workspace.lower"),
    ("robot.grippers.0.joint", ..., "robot.grippers[0]"),
    ("state.0.size", 0, "state[0].size"),
    ("state.0.size", 1.5, "state[0].size"),
    ("actions.space", "wrench", "actions.space"),
    ("actions.horizon", 0, "actions.horizon"),
    ("actions.period", -0.1, "actions.period"),
    ("actions.scale", [0.0] * 7, "actions.scale[0]"),
    ("cameras.0.depth", "maybe", "cameras[0].depth"),
    ("cameras.0.pose", None, "cameras[0].pose"),
    ("thresholds.start", 1.5, "thresholds.start"),
    ("thresholds.done_observations", 0, "thresholds.done_observations"),
    # numbers that are none
    ("tick", INFINITE, "tick"),
    ("actions.scale", [INFINITE] * 7, "actions.scale[0]"),
    ("actions.offset", [0.0, NAN, *[0.0] * 5], "actions.offset[1]"),
    ("state.0.offset", NAN, "state[0].offset"),
    ("state.0.scale", [1.0, 1.0, INFINITE], "state[0].scale[2]"),
    ("robot.grippers.0.open", NAN, "robot.grippers[0].open"),
    ("cameras.0.depth_range", [NAN, 1.0], "cameras[0].depth_range[0]"),
    ("robot.workspace", {"lower": [0, 0, 0], "upper": [1, 1, INFINITE]}, "robot.workspace.upper[2]"),
    # entries that do not agree
    ("state.0.offset", [0.0, 0.0], "state vector tool_position: offset has 2 numbers, its size is 3"),
    ("state.0.scale", [1.0] * 4, "state vector tool_position: scale has 4 numbers, its size is 3"),
    ("state.0.scale", [1.0, 1.0, 0.0], "state vector tool_position: scale must be above 0"),
    ("state.0.scale", -1.0, "state vector tool_position: scale must be above 0"),
    ("actions.scale", [1.0] * 6, "actions.scale has 6 numbers, there are 7 columns"),
    ("actions.offset", [0.0] * 8, "actions.offset has 8 numbers, there are 7 columns"),
    ("actions.grippers", ["hook"], "actions.grippers: 'hook' is no column"),
    ("actions.grippers", ["dx"], "actions.grippers: 'dx' is no gripper of the robot; it has gripper"),
    ("robot.grippers", [], "actions.grippers: 'gripper' is no gripper of the robot; it has none"),
    ("cameras.0.depth_range", [3.0, 0.1], "camera camera: depth_range"),
    ("cameras.0.depth_range", [-1.0, 1.0], "camera camera: depth_range"),
    ("thresholds.holding", [0.9, 0.1], "thresholds.holding"),
    ("robot.grippers.0.open", 0.0, "robot.grippers: closed and open of gripper are the same"),
    ("robot.joints", ["a", FINGER["joint"]], "of gripper is a joint of the arm"),
    ("robot.workspace", {"lower": [0, 0, 0], "upper": [1, 0, 1]}, "robot.workspace: lower [0.0, 0.0, 0.0] must be"),
    # names that stand twice, or nowhere
    ("robot.joints", ["a", "b", "a"], "robot.joints: 'a' stands twice"),
    ("robot.grippers", [FINGER, FINGER], "robot.grippers: 'gripper' stands twice"),
    ("actions.columns", ["dx", "dx", "dz", "rx", "ry", "rz", "gripper"], "actions.columns: 'dx' stands twice"),
    ("actions.grippers", ["gripper", "gripper"], "actions.grippers: 'gripper' stands twice"),
    ("state.1.name", "tool_position", "state: 'tool_position' stands twice"),
    ("cameras", [{"name": "front"}, {"name": "front"}], "cameras: 'front' stands twice"),
    ("cameras", [], "cameras: there must be one at least"),
], ids=str)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_the_entry(entry, value, said):
    assert said in refusal(changed(entry, value))


def test_actions_without_a_column_are_refused():
    values = changed("actions.columns", [])
    values["actions"] |= {"scale": [], "grippers": []}
    assert "actions.columns: there must be one at least" in refusal(values)


@pytest.mark.parametrize("values", [None, [], "contract", 3, {}], ids=str)
def test_what_is_no_contract_at_all(values):
    refusal(values)


def test_a_part_of_it_is_checked_alike():
    assert parse(plain(CONTRACT.robot), Robot) == CONTRACT.robot
    for change, said in (({"joints": ["a", "a"]}, "robot.joints: 'a'"), ({"tool_frame": ""}, "tool_frame")):
        with pytest.raises(ContractError, match=said):
            parse(plain(CONTRACT.robot) | change, Robot)


def test_a_difference_is_the_innermost_entry_and_both_values():
    actions = msgspec.structs.replace(CONTRACT.actions, period=0.5)
    robot = msgspec.structs.replace(CONTRACT.robot, tool_frame="tool0", workspace=Box(lower=(0, 0, 0), upper=(1, 1, 1)))
    other = msgspec.structs.replace(CONTRACT, actions=actions, robot=robot)
    assert differences(CONTRACT, other) == [
        ("robot.tool_frame", "panda_hand_tcp", "tool0"),
        ("robot.workspace", None, robot.workspace),
        ("actions.period", 0.05, 0.5),
    ]
    (row,) = differences(CONTRACT.actions, actions, "actions")
    assert row == ("actions.period", 0.05, 0.5)


def test_the_table_has_a_line_for_each_difference_in_columns():
    rows = [("robot.tool_frame", "panda_hand_tcp", "tool0"), ("tick", 0.1, None)]
    head, *lines = difference_table(rows).splitlines()
    assert head.split("  ")[0] == "entry" and len(lines) == len(rows)
    for (entry, wanted, offered), line in zip(rows, lines, strict=True):
        assert line.split() == [entry, str(wanted), str(offered)]
        assert line.index(str(wanted)) == head.index("checkpoint") and line.rstrip() == line
        assert line.rindex(str(offered)) == head.index("robot or camera")

"""Joint states by name, in any order, and their interpolation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.messages.joints import JointHistory, JointInput, JointReader, JointStatesError, parse_joint_map

NAMES = ("a", "b", "c")


@settings(deadline=None)
@given(st.permutations(["a", "b", "c", "finger", "x"]))
def test_order_does_not_matter(order):
    value = {name: float(index) for index, name in enumerate(["a", "b", "c", "finger", "x"])}
    q, qd = JointReader(NAMES).read(order, [value[n] for n in order], [-value[n] for n in order])
    assert q.tolist() == [0, 1, 2]
    assert qd.tolist() == [0, -1, -2]


def test_order_may_change_between_messages():
    reader = JointReader(NAMES)
    assert reader.read(["a", "b", "c"], [1, 2, 3])[0].tolist() == [1, 2, 3]
    assert reader.read(["c", "b", "a"], [1, 2, 3])[0].tolist() == [3, 2, 1]


def test_missing_velocity_is_none():
    assert JointReader(NAMES).read(NAMES, [1, 2, 3], [])[1] is None
    assert JointReader(NAMES).read(NAMES, [1, 2, 3], [0, np.nan, 0])[1] is None


def test_map_renames():
    reader = JointReader(NAMES, parse_joint_map(["a:left_1", " b : left_2 ", ""], NAMES))
    assert reader.read(["left_2", "left_1", "c"], [2, 1, 3])[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("entry, word", [("a", "our_joint:robot_joint"), ("z:left", "none of"), ("a:", "our_joint")])
def test_bad_map_entries_are_named(entry, word):
    with pytest.raises(JointStatesError, match=word):
        parse_joint_map([entry], NAMES)


@pytest.mark.parametrize(
    "names, position, velocity, word",
    [
        (["a", "c"], [1, 2], [], "lacks b .*joint_map"),
        ([], [], [], "lacks a, b, c"),
        (["a", "b", "c"], [1, 2], [], "3 names but 2 positions"),
        (["a", "b", "c"], [1, 2, 3], [1], "3 names but 1 velocities"),
        (["a", "b", "c"], [1, np.nan, 3], [], "position of b is not finite"),
        ([f"j{i}" for i in range(300)], [0.0] * 300, [], "at most 256"),
    ],
)
def test_bad_messages_are_named(names, position, velocity, word):
    with pytest.raises(JointStatesError, match=word):
        JointReader(NAMES).read(names, position, velocity)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(-3, 3), st.floats(-3, 3))
def test_interpolation_of_a_line_is_exact(w, start, slope):
    history = JointHistory()
    for t in (0.0, 0.1):
        history.add(t, np.array([start + slope * t]), np.array([slope]))
    sample = history.at(0.1 * w)
    np.testing.assert_allclose(sample.position, start + slope * 0.1 * w, atol=1e-12)
    np.testing.assert_allclose(sample.velocity, slope)


def test_nothing_is_extrapolated_or_bridged():
    history = JointHistory(max_gap=0.2)
    history.add(1.0, np.zeros(1), np.zeros(1))
    history.add(1.5, np.ones(1), np.zeros(1))
    assert history.at(0.9) is None
    assert history.at(1.6) is None
    assert history.at(1.2) is None
    assert history.at(1.5).position[0] == 1


def test_velocity_by_difference_and_bounded_memory():
    history = JointHistory(span=0.5)
    for k in range(1000):
        history.add(k * 0.01, np.array([k * 0.02]), None)
    np.testing.assert_allclose(history.newest.velocity, 2.0)
    assert len(history) <= 52
    assert not history.add(1.0, np.zeros(1), None)


def test_a_problem_lasts_until_the_next_good_message():
    joints = JointInput(("a", "b"), ["a:left_a"])
    assert joints.robot_names == ("left_a", "b") and joints.problem == ""
    good = (["b", "left_a"], [2.0, 1.0])
    assert joints.read(*good)[0].tolist() == [1.0, 2.0]
    assert joints.read(["a", "b"], [1.0, 2.0]) is None and "left_a" in joints.problem
    assert joints.read(*good) is not None and joints.problem == ""
    with pytest.raises(JointStatesError, match="none of"):
        JointInput(("a",), ["c:d"])

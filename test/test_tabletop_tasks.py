"""Success: what counts as done, in which order, and for how long. And destinations that satisfy what they are for."""

from dataclasses import asdict

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.envs.tabletop.scene import Scene, Thing
from vla_nodes.envs.tabletop.tasks import (
    APART,
    DIRECTIONS,
    HOLD_SECONDS,
    RELATIONS,
    SuccessChecker,
    Task,
    contains,
    destination,
    placed,
    related,
    side_of,
)
from vla_nodes.envs.tabletop.world import World

RGB = (0.5, 0.5, 0.5)
SCENE = Scene(0, [
    Thing("bowl", "grey", 0.48, 0.15, 0.0, RGB), Thing("tray", "brown", 0.50, -0.05, 0.0, RGB),
    Thing("block", "red", 0.36, 0.05, 0.2, RGB), Thing("can", "blue", 0.36, 0.20, 0.0, RGB),
])  # fmt: skip
AWAY = {"red block": [0.36, -0.20, 0.0205]}  # out of every relation to the bowl


def put(world: World, name: str, position) -> None:
    joint = world.model.joint(name)
    world.data.qpos[joint.qposadr[0] : joint.qposadr[0] + 3] = position
    world.data.qvel[joint.dofadr[0] : joint.dofadr[0] + 6] = 0
    mujoco.mj_forward(world.model, world.data)


def slide(world: World, opening: float) -> None:
    joint = world.model.joint("drawer")
    world.data.qpos[joint.qposadr[0]], world.data.qvel[joint.dofadr[0]] = opening, 0.0
    mujoco.mj_forward(world.model, world.data)


def watch(checker: SuccessChecker, world: World, seconds: float) -> bool:
    for _ in range(round(seconds / 0.1)):
        world.advance(0.1)
        checker.update(world)
    return checker.succeeded


@pytest.mark.parametrize("goal", ["bowl", "tray"])
@pytest.mark.parametrize("thing", ["red block", "blue can"])
def test_released_above_the_goal_it_ends_inside(thing, goal):
    world = World(SCENE)
    task = Task("place", thing, goal)
    assert not contains(world, goal, thing) and not task.success(world)
    put(world, thing, world.position(goal) + [0.01, 0.01, 0.09])
    assert not contains(world, goal, thing)  # above is not inside
    world.advance(1.2)
    assert contains(world, goal, thing) and task.success(world)
    assert task.progress(world).endswith(f"in the {goal}")


def test_released_over_the_open_drawer_it_ends_inside_and_stays_when_that_is_shut():
    world = World(SCENE)
    slide(world, 0.14)
    task = Task("place", "red block", "drawer")
    put(world, "red block", destination(task, world.handle_position()))
    world.advance(0.6)
    assert contains(world, "drawer", "red block") and task.success(world)
    slide(world, 0.0)
    assert not contains(world, "drawer", "red block"), "the block stayed where it was: a drawer moved at once leaves it"


@pytest.mark.parametrize(("goal", "reach"), [("bowl", sc.BOWL_RADIUS), ("tray", sc.TRAY_SIZE[0] / 2)])
def test_beside_the_goal_is_not_inside(goal, reach):
    world = World(SCENE)
    put(world, "red block", world.position(goal) + [-reach - 0.025, 0, 0.021])
    assert not contains(world, goal, "red block")


def test_an_overturned_bowl_holds_nothing():
    world = World(SCENE)
    put(world, "red block", world.position("bowl") + [0, 0, 0.03])
    assert contains(world, "bowl", "red block")
    address = world.model.joint("bowl").qposadr[0]
    world.data.qpos[address + 3 : address + 7] = [np.cos(0.5), np.sin(0.5), 0, 0]  # tilted by 1 rad
    mujoco.mj_forward(world.model, world.data)
    assert not contains(world, "bowl", "red block")


@pytest.mark.parametrize(("thing", "goal"), [("red block", "blue can"), ("blue can", "red block")])
def test_stacked_means_on_it_and_at_rest_there(thing, goal):
    world = World(SCENE)
    task = Task("place", thing, goal)
    at = destination(task, world.position(goal))
    put(world, thing, at)
    world.advance(0.8)
    assert task.success(world)
    put(world, thing, at + [0, 0, 0.03])
    assert not placed(world, task)  # held over it is not on it
    put(world, thing, at + [0.035, 0, 0])
    assert not placed(world, task)


relations = st.sampled_from(RELATIONS)
goals = st.sampled_from(["bowl", "tray", "red block", "blue can"])
coordinates = st.tuples(st.floats(0.40, 0.55), st.floats(-0.1, 0.2), st.just(0.02))


@settings(max_examples=200, deadline=None)
@given(relations, goals, coordinates)
def test_a_thing_put_at_its_destination_is_in_the_relation(relation, goal, where):
    task = Task("place", "green block", goal, relation)
    goal_at = np.array(where)
    offset = destination(task, goal_at) - goal_at
    assert related(task, offset)
    # and 2 cm of imprecision do not change that, while the other side of the goal does
    assert all(related(task, offset + 0.02 * np.array([np.cos(a), np.sin(a), 0])) for a in np.linspace(0, 6.28, 8))
    assert relation == "beside" or not related(task, -offset)
    assert np.hypot(*offset[:2]) == pytest.approx(
        float(np.hypot(*np.multiply(APART[goal.split()[-1]], DIRECTIONS[side_of(task, goal_at)])))
    )


@settings(max_examples=200, deadline=None)
@given(goals, st.floats(0.09, 0.2), st.floats(0, 6.283))
def test_a_place_is_on_at_most_one_side(goal, distance, angle):
    offset = distance * np.array([np.cos(angle), np.sin(angle)])
    sides = [r for r in DIRECTIONS if related(Task("place", "red block", goal, r), offset)]
    assert len(sides) <= 1
    if sides == ["left"]:
        assert offset[1] > 0, "left is +y, as the robot sees it"
    if sides == ["front"]:
        assert offset[0] < 0, "in front is on the robot's side"


@pytest.mark.parametrize("relation", RELATIONS)
def test_resting_in_the_relation_succeeds_and_hovering_there_does_not(relation):
    world = World(SCENE)
    task = Task("place", "red block", "bowl", relation)
    put(world, "red block", AWAY["red block"])
    assert not task.success(world)
    at = destination(task, world.position("bowl"))
    put(world, "red block", [*at[:2], 0.0205])
    assert task.success(world)
    put(world, "red block", [*at[:2], 0.06])
    assert not task.success(world)


def test_success_must_last():
    world = World(SCENE)
    slide(world, sc.DRAWER_TRAVEL)
    checker = SuccessChecker(Task("open", "drawer"))
    assert checker.task.success(world) and not checker.update(world)
    for _ in range(9):
        world.advance(0.1)
        assert not checker.update(world), f"after {world.time} s"
    world.advance(0.2)
    assert world.time > HOLD_SECONDS and checker.update(world)


def test_an_interruption_starts_the_second_anew():
    world = World(SCENE)
    checker = SuccessChecker(Task("open", "drawer"))
    for opening in (sc.DRAWER_TRAVEL, 0.0, sc.DRAWER_TRAVEL):
        slide(world, opening)
        assert not checker.update(world)
        world.advance(0.6)
    assert not checker.update(world)  # 0.6 s after it came true again
    world.advance(0.5)
    assert checker.update(world)


BOWL_THEN_OPEN = Task("place", "red block", "bowl", then=Task("open", "drawer"))


def test_steps_in_their_order_succeed():
    world, checker = World(SCENE), SuccessChecker(BOWL_THEN_OPEN)
    assert not checker.update(world) and checker.reached == 0
    put(world, "red block", world.position("bowl") + [0, 0, 0.03])
    assert not watch(checker, world, 1.5) and checker.reached == 1, "one of two steps is not the task"
    slide(world, sc.DRAWER_TRAVEL)
    assert not checker.update(world)
    assert watch(checker, world, 1.2)


def test_steps_in_the_other_order_do_not():
    world, checker = World(SCENE), SuccessChecker(BOWL_THEN_OPEN)
    checker.update(world)
    slide(world, sc.DRAWER_TRAVEL)
    checker.update(world)
    put(world, "red block", world.position("bowl") + [0, 0, 0.03])
    assert not watch(checker, world, 1.5) and checker.early == {1}
    slide(world, 0.0)  # undone, and done again in its turn
    checker.update(world)
    slide(world, sc.DRAWER_TRAVEL)
    assert watch(checker, world, 1.3) and not checker.early


def test_a_later_step_that_was_true_from_the_start_needs_no_doing():
    world = World(SCENE)
    slide(world, sc.DRAWER_TRAVEL)
    checker = SuccessChecker(BOWL_THEN_OPEN)
    checker.update(world)
    put(world, "red block", world.position("bowl") + [0, 0, 0.03])
    assert watch(checker, world, 1.3)


def test_what_was_placed_must_stay_in_place():
    world, checker = World(SCENE), SuccessChecker(BOWL_THEN_OPEN)
    put(world, "red block", world.position("bowl") + [0, 0, 0.03])
    watch(checker, world, 0.3)
    slide(world, sc.DRAWER_TRAVEL)
    watch(checker, world, 0.3)
    put(world, "red block", AWAY["red block"])
    assert not watch(checker, world, 1.5)


def test_drawer_thresholds():
    world = World(SCENE)
    for opening, opened, closed in ((0.0, False, True), (0.05, False, False), (0.13, True, False)):
        slide(world, opening)
        assert Task("open", "drawer").success(world) == opened
        assert Task("close", "drawer").success(world) == closed


def test_lifted_without_fingers_is_not_picked_up():
    world = World(SCENE)
    put(world, "red block", [0.36, 0.05, 0.2])
    assert not Task("pick", "red block").success(world)


@pytest.mark.parametrize(("task", "family"), [
    (Task("pick", "red block"), "pick-and-place"), (Task("place", "red block", "tray"), "pick-and-place"),
    (Task("place", "red block", "drawer"), "pick-and-place"), (Task("open", "drawer"), "drawer"),
    (Task("place", "red block", "blue can"), "rearrangement"),
    (Task("place", "red block", "bowl", "left"), "rearrangement"), (BOWL_THEN_OPEN, "multi-step"),
])  # fmt: skip
def test_families_and_dictionaries(task, family):
    assert task.family == family
    assert Task.from_dict(asdict(task)) == task

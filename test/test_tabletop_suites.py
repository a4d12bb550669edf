"""Episodes of a suite: decided by the seed, feasible, and true to their family and held-out axis."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.envs.tabletop import held_out, suites
from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.envs.tabletop.instructions import parse
from vla_nodes.envs.tabletop.scene import Scene, Thing, View
from vla_nodes.envs.tabletop.tasks import FAMILIES, NOTHING, Task, kind_of

some = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**31 - 1)
RGB = (0.5, 0.5, 0.5)


@some
@given(st.sampled_from(suites.SUITES), seeds)
def test_the_seed_decides_and_the_sentence_says_the_task(suite, seed):
    scene, task, text = suites.episode(suite, seed)
    again = suites.episode(suite, seed)
    assert (scene, task, text) == again
    assert (parse(text) or NOTHING) == task
    assert suite in suites.IDLE or suites.obstacle(task, scene) in ("",) or "already" in suites.obstacle(task, scene)


@pytest.mark.parametrize("suite", [*FAMILIES, "multi-step/pairs"])
def test_a_family_has_its_own_tasks_and_they_can_be_done(suite):
    for seed in range(6):
        scene, task, _ = suites.episode(suite, seed)
        assert task.family == suite.partition("/")[0]
        assert suites.obstacle(task, scene) == "", (seed, task)
        if task.verb == "open":
            assert scene.drawer_opening < 0.05
        if task.verb == "close":
            assert scene.drawer_opening >= 0.05


@some
@given(seeds)
def test_pairs_are_about_held_out_pairs(seed):
    _, task, _ = suites.episode("rearrangement/pairs", seed)
    assert held_out.pair(kind_of(task.target), task.target.split()[0])


@some
@given(seeds)
def test_placements_are_in_the_band_around_the_region(seed):
    scene, _, _ = suites.episode("pick-and-place/placements", seed)
    for thing in (t for t in scene.things if t.kind in sc.GRASPABLE):
        assert not sc.reachable(thing.x, thing.y) and sc.reachable(thing.x, thing.y, held_out.MARGIN)


@some
@given(seeds)
def test_cameras_are_moved_farther_than_in_training(seed):
    shift = lambda scene: np.abs(np.subtract(scene.view.position, View().position))  # noqa: E731
    assert (shift(suites.episode("drawer/camera", seed)[0]) >= held_out.CAMERA_JITTER[0] - 1e-9).all()
    assert (shift(Scene.random(seed)) <= 0.02 + 1e-9).all()


@some
@given(seeds)
def test_absent_takes_one_named_thing_away_and_leaves_something(seed):
    scene, task, text = suites.episode("absent", seed)
    assert task.missing(scene) and parse(text) == task
    assert any(thing.kind in sc.GRASPABLE for thing in scene.things)


@some
@given(seeds)
def test_nonsense_is_words_that_no_step_is_known_for(seed):
    scene, task, text = suites.episode("nonsense", seed)
    assert suites.idle(task, scene) and task == NOTHING and parse(text) is None and len(text) < 120


@some
@given(seeds, st.sampled_from(FAMILIES))
def test_training_draws_hold_nothing_held_out(seed, family):
    scene, task, text = suites.draw(family, seed, demo=0.3)
    assert not any(held_out.pair(t.kind, t.color) for t in scene.things)
    assert not any(word in text for word in held_out.SYNONYMS.values()), text
    for thing in scene.things:
        assert sc.reachable(thing.x, thing.y)


def test_groups_are_made_of_suites():
    assert {name for group in suites.LAYOUT.groups.values() for name in group.suites} <= set(suites.SUITES)
    assert suites.LAYOUT.members("all") == FAMILIES


def scene_of(*things: tuple[str, str, float, float], opening: float = 0.0) -> Scene:
    return Scene(0, [Thing(k, c, x, y, 0.0, RGB) for k, c, x, y in things], opening)


ROW = scene_of(("block", "red", 0.58, 0.05), ("block", "blue", 0.45, 0.05), ("bowl", "grey", 0.45, -0.10))


@pytest.mark.parametrize(("scene", "task", "why"), [
    (ROW, Task("pick", "pink block"), "no pink block"),
    (ROW, Task("place", "red block", "blue block", "left"), ""),
    (ROW, Task("place", "red block", "blue block", "right"), "no free place"),  # the bowl is there
    (ROW, Task("place", "red block", "drawer"), "the drawer is shut"),
    (ROW, Task("open", "drawer", then=Task("place", "red block", "drawer")), ""),
    (ROW, Task("close", "drawer", then=Task("place", "red block", "drawer")), "the drawer is shut"),
    (ROW, Task("place", "red block", "red block"), "itself"),
    (ROW, Task("place", "red block", "blue block", then=Task("place", "blue block", "bowl")), "would undo"),
    (ROW, Task("place", "red block", "bowl", then=Task("pick", "red block")), "would undo"),
    # the first step takes the place that the second wants
    (scene_of(("block", "red", 0.58, 0.05), ("block", "blue", 0.45, 0.05), ("can", "cyan", 0.60, -0.10)),
     Task("place", "red block", "blue block", "left", Task("place", "cyan can", "blue block", "left")),
     "no free place"),
    (scene_of(("block", "red", 0.45, 0.20), ("block", "blue", 0.45, 0.08)),
     Task("place", "red block", "blue block", "left"), "already"),
])  # fmt: skip
def test_obstacles_are_named(scene, task, why):
    said = suites.obstacle(task, scene)
    assert why in said if why else said == ""


def test_an_instruction_gets_scenes_that_allow_it():
    text = "put the red block left of the bowl"
    found = suites.feasible_seeds(text, 5, 3)
    assert len(found) == 3 and found == sorted(set(found)) and found[0] >= 5
    for seed in found:
        assert suites.obstacle(parse(text), Scene.demo(seed)) == ""
    assert suites.feasible_seeds("put the red block in the drawer", 5, 2) == [5, 6], "never: the drawer starts shut"
    assert suites.feasible_seeds("sing a song", 5, 2) == [5, 6]


@pytest.mark.parametrize("text", ["pick up the pink block", "sing a song", "put the red block in the drawer"])
def test_an_instruction_that_cannot_be_done_is_refused_by_name(text):
    with pytest.raises(ValueError, match=text):
        suites.episode("demo", 0, text)

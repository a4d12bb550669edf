"""Scenes: seeded, serialisable, never crowded; and the world built from them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.envs.tabletop import held_out
from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.envs.tabletop.mjcf import FINGER_OPEN, READY
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.world import World

seeds = st.integers(0, 2**31 - 1)
makers = st.sampled_from([Scene.demo, Scene.random])
quick = settings(max_examples=25, deadline=None)


@quick
@given(makers, seeds)
def test_json_gives_the_same_scene(make, seed):
    scene = make(seed)
    assert Scene.from_json(scene.to_json()) == scene


@quick
@given(makers, seeds)
def test_seed_decides(make, seed):
    assert make(seed) == make(seed)
    assert make(seed).things != make(seed + 1).things


@quick
@given(seeds, st.sampled_from(["", *held_out.AXES]))
def test_held_out_pairs_are_in_scenes_of_their_axis_only(seed, axis):
    kept = [t for t in Scene.random(seed, axis).things if held_out.pair(t.kind, t.color)]
    assert kept if axis == "pairs" else not kept


@quick
@given(makers, seeds)
def test_things_are_apart_in_reach_and_unique(make, seed):
    things = make(seed).things
    assert len({t.name for t in things}) == len(things)
    for i, a in enumerate(things):
        assert sc.REGION_X[0] <= a.x <= sc.REGION_X[1] and sc.REGION_Y[0] <= a.y <= sc.REGION_Y[1]
        for b in things[:i]:
            assert np.hypot(a.x - b.x, a.y - b.y) > sc.CLEARANCE[a.kind] + sc.CLEARANCE[b.kind]


@quick
@given(seeds)
def test_demo_scene_holds_its_six_things(seed):
    names = {t.name for t in Scene.demo(seed).things}
    assert names == {"bowl", "tray", "red block", "green block", "blue block", "yellow block"}


@quick
@given(seeds)
def test_random_scene_holds_something_to_grasp(seed):
    scene = Scene.random(seed)
    assert any(t.kind in sc.GRASPABLE for t in scene.things)
    assert 0 <= scene.drawer_opening <= sc.DRAWER_TRAVEL


@pytest.mark.parametrize("scene", [Scene.demo(3), Scene.random(8)], ids=["demo", "random"])
def test_world_starts_at_rest_as_described(scene):
    world = World(scene)
    np.testing.assert_allclose(world.joint_state()[0], [*READY, FINGER_OPEN, FINGER_OPEN])
    assert world.drawer_opening() == pytest.approx(scene.drawer_opening)
    before = {t.name: world.position(t.name) for t in scene.things}
    for t in scene.things:
        np.testing.assert_allclose(before[t.name][:2], [t.x, t.y], atol=1e-9)
    world.advance(0.6)
    assert world.time == pytest.approx(0.6)
    for t in scene.things:  # nothing overlaps, so nothing is thrown about
        assert np.linalg.norm(world.position(t.name) - before[t.name]) < 0.003, t.name
        assert world.speed(t.name) < 0.02, t.name
    assert np.abs(world.joint_state()[0][:7] - READY).max() < 0.01  # the servos hold the arm against gravity


def test_state_of_one_world_shows_in_another():
    scene = Scene.demo(4)
    a, b = World(scene), World(Scene.from_json(scene.to_json()))
    a.set_reference(np.asarray(READY) + 0.1, np.zeros(7), 0.01)
    a.advance(0.3)
    still = b.tool_pose()
    b.set_qpos(a.qpos())
    np.testing.assert_allclose(b.tool_pose(), a.tool_pose(), atol=2e-3)
    assert np.abs(b.tool_pose() - still).max() > 0.01
    with pytest.raises(ValueError, match="scenes differ"):
        b.set_qpos(a.qpos()[:-1])
    a.reset()
    assert a.time == 0 and np.allclose(a.joint_state()[0][:7], READY)

"""Things that nobody asks for: colours without a name, shapes without one, and never a held-out pair."""

import numpy as np
import pytest

from vla_nodes.envs.tabletop import held_out
from vla_nodes.envs.tabletop.labels import TabletopGrounding, random_instruction
from vla_nodes.envs.tabletop.scene import COLORS, GRASPABLE, HALF_HEIGHT, NAMED_APART, SHAPES, UNNAMED, Scene, strange
from vla_nodes.envs.tabletop.world import World
from vla_nodes.training.grounding_data import NO_NAME, Names

NAMES = Names(TabletopGrounding())


def test_strange_things_are_no_named_and_no_held_out_ones():
    rng, unnamed, shaped = np.random.default_rng(0), 0, set()
    for seed in range(60):
        scene = Scene.random(seed)
        for before, thing in zip(scene.things, strange(scene.things, rng), strict=True):
            assert not held_out.pair(thing.kind, thing.color)
            if thing == before:
                continue
            assert before.kind in GRASPABLE
            gaps = {name: np.abs(np.array(rgb) - thing.rgb) for name, rgb in COLORS.items()}
            nearest = min(gaps, key=lambda name: np.linalg.norm(gaps[name]))
            if thing.kind in SHAPES:
                shaped.add((thing.kind, thing.color))
                assert nearest == thing.color and NAMES.of(thing.name) == (NAMES.appearances[thing.color], NO_NAME)
                continue
            unnamed += 1
            assert thing.color.startswith(UNNAMED) and min(gap.max() for gap in gaps.values()) > NAMED_APART
            assert nearest not in {color for _, color in held_out.PAIRS}
            assert NAMES.of(thing.name) == (NO_NAME, NAMES.categories[thing.kind])
    assert unnamed > 20 and {kind for kind, _ in shaped} == set(SHAPES)


def test_nothing_is_asked_about_what_has_no_name():
    rng = np.random.default_rng(1)
    said = [random_instruction(["unnamed0 block", "red slab", "unnamed1 can", "red block", "bowl", "drawer"], rng)
            for _ in range(300)]  # fmt: skip
    assert not any(UNNAMED in text or (task and "red slab" in task.names) for text, task in said)
    assert any(task and "red block" in task.names for _, task in said)


@pytest.mark.parametrize("kind", SHAPES)
def test_every_shape_stands_on_the_table(kind):
    scene = Scene.demo(0)
    scene.things[-1].kind = kind
    world = World(scene)
    assert world.position(scene.things[-1].name)[2] == pytest.approx(HALF_HEIGHT[kind], abs=2e-3)

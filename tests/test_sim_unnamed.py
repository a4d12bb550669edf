"""Colours without a name: none that people name, and none of a held-out pair."""

import numpy as np

from vla_nodes.sim import held_out
from vla_nodes.sim.scene import COLORS, GRASPABLE, NAMED_APART, UNNAMED, Scene, unnamed
from vla_nodes.train.frames import KINDS, NO_NAME, named, random_instruction


def test_an_unnamed_colour_is_no_named_one_and_no_held_out_one():
    rng, seen = np.random.default_rng(0), 0
    for seed in range(40):
        scene = Scene.random(seed)
        for before, thing in zip(scene.things, unnamed(scene.things, rng), strict=True):
            if thing == before:
                continue
            seen += 1
            assert thing.kind in GRASPABLE and thing.color.startswith(UNNAMED)
            gaps = {name: np.abs(np.array(rgb) - thing.rgb) for name, rgb in COLORS.items()}
            assert min(gap.max() for gap in gaps.values()) > NAMED_APART
            nearest = min(gaps, key=lambda name: np.linalg.norm(gaps[name]))
            assert not held_out.pair(thing.kind, nearest)
            assert named(thing.name) == (NO_NAME, KINDS.index(thing.kind))
    assert seen > 30


def test_nothing_is_asked_about_what_has_no_name():
    rng = np.random.default_rng(1)
    said = [random_instruction(["unnamed0 block", "unnamed1 can", "red block", "bowl", "drawer"], rng)[0]
            for _ in range(300)]  # fmt: skip
    assert not any(UNNAMED in text for text in said) and any("red" in text for text in said)

"""Whatever training is drawn from, nothing that evaluation holds out is in it."""

import re

import numpy as np
import pytest

from vla_nodes.envs import base as envs
from vla_nodes.envs.tabletop import held_out, instructions, vocabulary
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.tasks import kind_of
from vla_nodes.training import losses_grounding

TRAINED = [
    text for part in (vocabulary.PHRASES, vocabulary.RELATION_WORDS) for texts in part.values() for text in texts
]
TRAINED += [*vocabulary.SUFFIXES, *vocabulary.JOINS]
HELD_OUT = [text for texts in held_out.PHRASES.values() for text in texts]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"{\w+}", "", text)))


WORDS = set().union(held_out.SYNONYMS.values(), *map(words, HELD_OUT)).difference(*map(words, TRAINED))


def sentences(source: str, count: int):
    rng, labels = np.random.default_rng(5), envs.grounding("tabletop")
    if source == "words alone":
        return losses_grounding.sentences(labels, rng, count)
    things = [[*(t.name for t in Scene.random(seed).things), "drawer"] for seed in range(12)]
    return [labels.about(things[i % len(things)], rng) for i in range(count)]


def test_the_words_looked_for_are_the_held_out_ones():
    assert {"fetch", "seize", "deposit", "balance", "shift", "slide", "scarlet", "azure"} <= WORDS


@pytest.mark.parametrize("source", ["frames", "words alone"])
def test_sentences_of_training(source):
    found = [(text, steps[0]) for text, steps in sentences(source, 1500) if steps]
    for text, task in found:
        assert not words(text) & WORDS, text
        for name in task.names:
            color, _, kind = name.rpartition(" ")
            assert not held_out.pair(kind, color), text
        assert instructions.parse(text) == task, text
    steps = [step for _, task in found for step in task.steps]
    # And they are about everything that training is to teach.
    assert {step.verb for step in steps} == {"pick", "place", "open", "close"}
    assert {step.relation for step in steps} == {"", *vocabulary.RELATION_WORDS}
    assert {kind_of(step.reference) for step in steps} == {"", "bowl", "tray", "drawer", "block", "can"}

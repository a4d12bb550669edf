"""What a sentence asks for: the judge's parser against the grammar that trains the policy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.sim import language
from vla_nodes.sim.language import SYNONYMS, TRAIN_SYNONYMS, parse, phrase, unrelated
from vla_nodes.sim.scene import COLORS, Scene
from vla_nodes.sim.tasks import Task

objects = st.builds("{} {}".format, st.sampled_from(sorted(COLORS)), st.sampled_from(["block", "can"]))
tasks = st.one_of(
    st.builds(Task, st.just("pick"), objects),
    st.builds(Task, st.just("place"), objects, st.sampled_from(["bowl", "tray"])),
    st.builds(Task, st.sampled_from(["open", "close"]), st.just("drawer")),
)
seeds = st.integers(0, 2**32 - 1)
fragments = st.sampled_from(
    ["red", "block", "open", "the", "bowl", "can", "drawer", "please", "cube", "tray", "navy", "not", "close"]
)


@settings(max_examples=300, deadline=None)
@given(tasks, seeds, st.booleans())
def test_parse_inverts_phrase(task, seed, held_out):
    assert parse(phrase(task, np.random.default_rng(seed), held_out)) == task


@pytest.mark.parametrize("verb", ["pick", "place", "open", "close"])
def test_every_phrase_of_every_verb_parses(verb):
    for text in language.PHRASES[verb]:
        said = text.format(x="the red block", y="the bowl", d="the drawer", **{"in": "in", "into": "into"})
        task = parse(said)
        assert task is not None and task.verb == verb, said


def test_training_cannot_say_a_held_out_phrase():
    """A held-out wording that some prefix, phrase and suffix of training add up to would measure nothing."""
    slots = {"x": "the red block", "y": "the bowl", "d": "the drawer", "into": "into"}
    trained = {
        prefix + text.format(**slots, **{"in": where}) + suffix
        for texts in language.PHRASES.values() for text in texts for where in ("in", "into", "inside")
        for prefix in language.PREFIXES for suffix in language.SUFFIXES
    }  # fmt: skip
    for text in language.HELD_OUT_PHRASES:
        for where in ("in", "into", "inside"):
            assert text.format(**slots, **{"in": where}) not in trained, text


@settings(max_examples=100, deadline=None)
@given(tasks, seeds)
def test_training_never_writes_a_held_out_synonym(task, seed):
    words = set(phrase(task, np.random.default_rng(seed)).replace(",", " ").split())
    kept = {s for all_of in SYNONYMS.values() for s in all_of} - TRAIN_SYNONYMS
    assert not words & kept


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80) | st.lists(fragments).map(" ".join))
def test_whatever_is_parsed_was_said(text):
    task = parse(text)
    if task is None:
        return
    words = text.lower().split()
    for name in filter(None, (task.thing, task.goal)):
        color, _, kind = name.rpartition(" ")
        assert any(k in word for word in words for k in language.KINDS[kind])
        assert not color or any(c in word for word in words for c in (color, *SYNONYMS[color]))


@pytest.mark.parametrize("text", language.UNRELATED)
def test_small_talk_is_no_task(text):
    assert parse(text) is None


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_noise_is_no_task(seed):
    assert parse(unrelated(np.random.default_rng(seed))) is None


@pytest.mark.parametrize(("text", "task"), [
    ("Close the open drawer.", Task("close", "drawer")),
    ("push the drawer open", Task("open", "drawer")),
    ("pull the drawer shut", Task("close", "drawer")),
    ("do not pick up the red block", None),
    ("don't open the drawer", None),
    ("put the bowl on the tray", None),
    ("pick up the block", None),  # which?
    ("PUT THE SCARLET CUBE INTO THE DISH", Task("place", "red block", "bowl")),
    ("in the tray put the turquoise tin", Task("place", "cyan can", "tray")),
])  # fmt: skip
def test_sentences(text, task):
    assert parse(text) == task


def test_missing_names_what_the_scene_lacks():
    scene = Scene.demo(0)
    assert Task("place", "red block", "bowl").missing(scene) == ""
    assert Task("place", "pink block", "bowl").missing(scene) == "pink block"
    assert Task("open", "drawer").missing(scene) == ""

"""What a sentence asks for: the parser that judges against the grammar that trains, and what that never says."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vla_nodes.envs.tabletop import held_out as kept
from vla_nodes.envs.tabletop import vocabulary
from vla_nodes.envs.tabletop.instructions import parse, phrase, plain, unrelated
from vla_nodes.envs.tabletop.scene import COLORS, Scene
from vla_nodes.envs.tabletop.tasks import RELATIONS, Task, kind_of

objects = st.builds("{} {}".format, st.sampled_from(sorted(COLORS)), st.sampled_from(["block", "can"]))
containers = st.sampled_from(["bowl", "tray"])
singles = st.one_of(
    st.builds(Task, st.just("pick"), objects),
    st.builds(Task, st.just("place"), objects, st.sampled_from(["bowl", "tray", "drawer"])),
    st.builds(Task, st.just("place"), objects, objects),
    st.builds(Task, st.just("place"), objects, objects | containers, st.sampled_from(RELATIONS)),
    st.builds(Task, st.sampled_from(["open", "close"]), st.just("drawer")),
).filter(lambda task: task.target != task.reference)
pairs = st.tuples(singles.filter(lambda task: task.verb != "pick"), singles)
tasks = st.one_of(singles, pairs.filter(lambda two: two[0] != two[1]).map(lambda two: replace(two[0], then=two[1])))
seeds = st.integers(0, 2**32 - 1)
fragments = st.sampled_from(
    [
        "red",
        "block",
        "open",
        "the",
        "bowl",
        "can",
        "drawer",
        "please",
        "cube",
        "tray",
        "navy",
        "not",
        "close",
        "left of",
        "on",
        "behind",
        "then",
        "and",
        "it",
        "put",
        ",",
    ]
)


@settings(max_examples=400, deadline=None)
@given(tasks, seeds, st.sampled_from(["", "phrasings", "synonyms"]))
def test_parse_inverts_phrase(task, seed, axis):
    assert parse(phrase(task, np.random.default_rng(seed), axis)) == task


@settings(max_examples=200, deadline=None)
@given(tasks)
def test_parse_inverts_plain_words(task):
    assert parse(plain(task)) == task


FORMS = {
    "pick": Task("pick", "red block"),
    "in": Task("place", "red block", "bowl"),
    "stack": Task("place", "red block", "blue can"),
    "relation": Task("place", "red block", "bowl", "left"),
    "open": Task("open", "drawer"),
    "close": Task("close", "drawer"),
}
SAID = {"x": "the red block", "d": "the drawer", "in": "in", "into": "into", "r": "to the left of"}


@pytest.mark.parametrize("phrases", [vocabulary.PHRASES, kept.PHRASES], ids=["trained", "held out"])
@pytest.mark.parametrize("form", FORMS)
def test_every_phrase_of_every_form_parses(form, phrases):
    for text in phrases[form]:
        said = text.format(**SAID, y="the blue can" if form == "stack" else "the bowl")
        assert parse(said) == FORMS[form], said


@pytest.mark.parametrize("words", [vocabulary.RELATION_WORDS, kept.RELATIONS], ids=["trained", "held out"])
def test_every_word_for_a_relation_is_understood(words):
    for relation in RELATIONS:
        for said in words[relation]:
            assert parse(f"put the red block {said} the tray") == Task("place", "red block", "tray", relation), said


@pytest.mark.parametrize("join", [*vocabulary.JOINS, *vocabulary.BACKWARDS, *kept.JOINS])
def test_every_join_keeps_both_steps(join):
    said = join.format(
        a="put the red block in the bowl",
        a_do="put the red block in the bowl",
        b="open the drawer",
        b_do="open the drawer",
        a_doing="putting the red block in the bowl",
        b_doing="opening the drawer",
    )
    assert parse(said) == Task("place", "red block", "bowl", then=Task("open", "drawer"))


def words_of(templates) -> set[str]:
    return set(re.findall(r"[a-z]+", " ".join(re.sub(r"{\w+}", "", t) for t in templates)))


TRAINED = [
    t
    for part in (vocabulary.PHRASES, vocabulary.RELATION_WORDS, vocabulary.ITS, vocabulary.IN, vocabulary.KINDS)
    for texts in part.values()
    for t in texts
]
TRAINED += [
    *vocabulary.JOINS,
    *vocabulary.BACKWARDS,
    *vocabulary.PREFIXES,
    *vocabulary.SUFFIXES,
    *vocabulary.ADJECTIVES,
    *vocabulary.SHADES,
    *vocabulary.DOING.values(),
    "it",
    "close it",
    "shut it",
    "open it",
    "inside",
    "in there",
    "the one",
]
UNHEARD = set(kept.SYNONYMS.values())
ONLY_HELD_OUT = words_of(t for texts in kept.PHRASES.values() for t in texts) - words_of(TRAINED) - {"i"}


def test_every_held_out_phrase_has_a_word_that_training_never_says():
    """A held-out wording that prefixes, phrases and suffixes of training add up to would measure nothing."""
    for texts in kept.PHRASES.values():
        for text in texts:
            assert words_of([text]) & ONLY_HELD_OUT, text
    assert not set(kept.JOINS) & set(vocabulary.JOINS)
    assert not UNHEARD & words_of(s for said in vocabulary.SYNONYMS.values() for s in said)


@settings(max_examples=300, deadline=None)
@given(tasks, seeds)
def test_training_never_says_what_is_held_out(task, seed):
    text = phrase(task, np.random.default_rng(seed))
    assert not set(re.findall(r"[a-z]+", text)) & (UNHEARD | ONLY_HELD_OUT), text


@settings(max_examples=100, deadline=None)
@given(tasks, seeds)
def test_held_out_wordings_are_held_out(task, seed):
    """Each says something training never does, but for a lone drawer's names, which has few."""
    text = phrase(task, np.random.default_rng(seed), "phrasings")
    assume(task.verb != "place" or kind_of(task.reference) not in ("drawer",))
    assert set(re.findall(r"[a-z]+", text)) & ONLY_HELD_OUT, text


@settings(max_examples=100, deadline=None)
@given(tasks, seeds)
def test_held_out_synonyms_are_said_for_every_colour_that_has_one(task, seed):
    text = phrase(task, np.random.default_rng(seed), "synonyms")
    meant = {kept.SYNONYMS[name.split()[0]] for name in task.names if name.split()[0] in kept.SYNONYMS}
    assert {word for word in UNHEARD if re.search(rf"\b{word}\b", text)} == meant


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80) | st.lists(fragments).map(" ".join))
def test_whatever_is_parsed_was_said(text):
    task = parse(text)
    if task is None:
        return
    words = text.lower().split()
    for name in task.names:
        color, _, kind = name.rpartition(" ")
        assert any(k in word for word in words for k in vocabulary.KINDS[kind])
        called = " ".join((color, kept.SYNONYMS.get(color, color), *vocabulary.SYNONYMS.get(color, ()))).split()
        assert not color or any(c in word for word in words for c in called)


@pytest.mark.parametrize("text", vocabulary.UNRELATED)
def test_small_talk_is_no_task(text):
    assert parse(text) is None


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_noise_is_no_task(seed):
    assert parse(unrelated(np.random.default_rng(seed))) is None


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("Close the open drawer.", Task("close", "drawer")),
        ("push the drawer open", Task("open", "drawer")),
        ("pull the drawer shut", Task("close", "drawer")),
        ("do not pick up the red block", None),
        ("don't open the drawer", None),
        ("put the bowl on the tray", None),
        ("pick up the block", None),  # which?
        ("PUT THE SCARLET CUBE INTO THE DISH", Task("place", "red block", "bowl")),
        ("in the tray put the turquoise tin", Task("place", "cyan can", "tray")),
        (
            "open the drawer and put the blue block in it",
            Task("open", "drawer", then=Task("place", "blue block", "drawer")),
        ),
        ("stack the red block on the blue block", Task("place", "red block", "blue block")),
        ("put the red block left of the bowl", Task("place", "red block", "bowl", "left")),
        ("left of the bowl put the red block", Task("place", "red block", "bowl", "left")),
        (
            "put the red block in the bowl, then close the drawer",
            Task("place", "red block", "bowl", then=Task("close", "drawer")),
        ),
        ("pick up the red block and put it next to the can", None),  # which can?
        ("pick up the red block and put it next to the blue can", Task("place", "red block", "blue can", "beside")),
        ("put the red block left of the drawer", None),
        ("put the red block and the blue block in the bowl", None),
        (
            "open the drawer and pick up the blue block and put it in it",
            Task("open", "drawer", then=Task("place", "blue block", "drawer")),
        ),
        (
            "open the drawer, then put the blue block inside",
            Task("open", "drawer", then=Task("place", "blue block", "drawer")),
        ),
        (
            "before you close the drawer, put the blue block in there",
            Task("place", "blue block", "drawer", then=Task("close", "drawer")),
        ),
        ("put the blue block in there", None),  # in where?
        ("stack the red block on the blue one", Task("place", "red block", "blue block")),
        (
            "put the red can in the bowl and the blue one on the tray",
            Task("place", "red can", "bowl", then=Task("place", "blue can", "tray")),
        ),
        ("have the red block on the blue block's left", Task("place", "red block", "blue block", "left")),
        ("put the red block at the tray's back", Task("place", "red block", "tray", "behind")),
        ("pick up the red one", None),  # the red what?
        ("put the sky-blue cube on the left-hand side of the tray", Task("place", "cyan block", "tray", "left")),
        (
            "close the drawer, but first put the red block in the bowl",
            Task("place", "red block", "bowl", then=Task("close", "drawer")),
        ),
        (
            "put the red block in the bowl before closing the drawer",
            Task("place", "red block", "bowl", then=Task("close", "drawer")),
        ),
        (
            "close the drawer after putting the red block in the bowl",
            Task("place", "red block", "bowl", then=Task("close", "drawer")),
        ),
        (
            "close the drawer after you put the red block in it",
            Task("place", "red block", "drawer", then=Task("close", "drawer")),
        ),
    ],
)
def test_sentences(text, task):
    assert parse(text) == task


def test_missing_names_what_the_scene_lacks():
    scene = Scene.demo(0)
    assert Task("place", "red block", "bowl").missing(scene) == ""
    assert Task("place", "pink block", "bowl").missing(scene) == "pink block"
    assert Task("open", "drawer").missing(scene) == ""

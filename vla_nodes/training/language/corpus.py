"""Sentences to distil the instruction encoder on: robot instructions in many wordings, and general text for the rest.

The grammar only has to cover how people phrase such requests; what the robot is trained to do is elsewhere. Its words
are data: config/language/corpus.yaml.
`held_out` words appear in no training sentence: the test of agreement with the teacher uses them.
"""

from __future__ import annotations

import random
from typing import Any

import yaml

from vla_nodes.share import share_path

WORDS: dict[str, Any] = yaml.safe_load(share_path("config/language/corpus.yaml").read_text())


def instruction(rng: random.Random) -> str:
    """One instruction, in one of its many wordings."""

    def thing() -> str:
        noun = rng.choice(rng.choice(list(WORDS["objects"].values())))
        words = [rng.choice(["the", "the", "the", "a", "that"])]
        if rng.random() < 0.12:
            words.append(rng.choice(WORDS["size"]))
        if rng.random() < 0.75:
            words.append(rng.choice(rng.choice(list(WORDS["colors"].values()))))
        words.append(noun)
        if rng.random() < 0.1:
            words.append(rng.choice(WORDS["where"]))
        return " ".join(words)

    def place() -> str:
        colour = rng.choice(rng.choice(list(WORDS["colors"].values()))) + " " if rng.random() < 0.4 else ""
        return f"the {colour}{rng.choice(rng.choice(list(WORDS['places'].values())))}"

    def clause() -> str:
        forms = ("pick", "into", "onto", "stack", "beside", "shift", "open", "close", "plain")
        form = WORDS[rng.choices(forms, [6, 6, 4, 3, 4, 3, 2, 2, 1])[0]]
        text = rng.choice(form)
        return text.format(
            o=thing(), p=place(), q=thing(), r=rng.choice(WORDS["relation"]), f=rng.choice(WORDS["furniture"])
        )

    text = clause()
    if rng.random() < 0.12:
        text += rng.choice(WORDS["join"]) + clause()
    if rng.random() < 0.2:
        text = rng.choice(WORDS["before"]) + text
    if rng.random() < 0.1:
        text += rng.choice(WORDS["after"])
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:] + rng.choice([".", "!", ""])
    return text


def general(rng: random.Random, words: list[str]) -> str:
    """Text that is no instruction: random words, or short sentence-like strings of them."""
    pick = lambda: rng.choice(words)  # noqa: E731
    kind = rng.random()
    if kind < 0.45:
        return " ".join(pick() for _ in range(rng.randint(1, 6)))
    return rng.choice([
        "the {} is on the {}", "a {} of {}", "{} the {}", "what is a {}", "the {} {} {} the {}", "i like {} and {}",
        "where is the {} {}", "this {} looks {}", "he said that {} was {}", "{} in the {} with a {}",
        "please {} the {}", "put the {} {} in the {}", "pick up the {}", "the {} {}",
    ]).format(*(pick() for _ in range(4)))  # fmt: skip


def has_held_out(text: str) -> bool:
    """Whether a sentence uses a word kept for the test."""
    return any(word.strip(".,!") in WORDS["held_out"] for word in text.lower().split())


def unique(make, count: int, keep, seen: set[str]) -> list[str]:
    """`count` new sentences from make() for which keep(text) holds; adds them to `seen`."""
    texts: list[str] = []
    for _ in range(200 * count):  # a bound, should the grammar run out of sentences
        if len(texts) == count:
            return texts
        text = make()
        if text not in seen and keep(text):
            seen.add(text)
            texts.append(text)
    raise RuntimeError(f"the grammar yields fewer than {count} such sentences")

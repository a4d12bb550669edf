"""How people say a task, and what a sentence asks for. The grammar trains the policy; the parser serves the judge."""

from __future__ import annotations

import re

import numpy as np

from vla_nodes.sim.scene import COLORS
from vla_nodes.sim.tasks import Task

SYNONYMS = {  # heard for a colour; never written in training sentences, where only `TRAIN_SYNONYMS` are
    "red": ("crimson", "scarlet"),
    "green": ("emerald",),
    "blue": ("navy", "azure"),
    "yellow": ("golden",),
    "orange": ("tangerine",),
    "purple": ("violet",),
    "pink": ("rose",),
    "cyan": ("turquoise",),
    "white": (),
    "black": (),
}
TRAIN_SYNONYMS = {"crimson", "emerald", "navy", "violet", "turquoise", "golden"}
KINDS = {"block": ("block", "cube", "brick"), "can": ("can", "cylinder", "tin"), "bowl": ("bowl", "dish"),
         "tray": ("tray", "platter"), "drawer": ("drawer",)}
HELD_OUT_PHRASES = ("fetch {x}", "lift {x} off the table", "{x} goes {in} {y}", "I want {x} {in} {y}",
                    "slide {d} open", "slide {d} shut")  # never trained on

PHRASES = {
    "pick": ("pick up {x}", "pick {x} up", "grab {x}", "lift {x}", "take {x}", "grasp {x}", "get {x}", "lift up {x}",
             "pick up {x} from the table", "hold {x} up", "raise {x}"),
    "place": ("put {x} {in} {y}", "place {x} {in} {y}", "move {x} {into} {y}", "drop {x} {in} {y}", "set {x} {in} {y}",
              "pick up {x} and put it {in} {y}", "take {x} and place it {in} {y}", "pick {x} and drop it {in} {y}",
              "{in} {y} put {x}", "bring {x} to {y}", "grab {x} and put it {in} {y}", "transfer {x} {into} {y}"),
    "open": ("open {d}", "pull {d} open", "pull open {d}", "open up {d}", "pull out {d}"),
    "close": ("close {d}", "shut {d}", "push {d} shut", "push in {d}", "push {d} closed"),
}
PREFIXES = ("", "", "", "", "", "please ", "can you ", "could you ", "robot, ", "now ", "go and ")
SUFFIXES = ("", "", "", "", "", " please", " now", ".", " for me")
UNRELATED = (
    "what time is it",
    "hello robot",
    "how are you today",
    "sing a song",
    "the weather is nice",
    "tell me a joke",
    "stop",
    "where is the red block",
    "who won the game last night",
    "make me a coffee",
    "turn on the lights",
    "drive to the station",
    "write an email to my boss",
    "do nothing",
    "wait",
    "call my mother",
    "what is this",
    "thank you very much",
    "the quick brown fox jumps over the lazy dog",
    "play some music",
    "open the window",
    "close the door",
    "water the plants",
    "pick up the phone",
    "put the car in the garage",
    "lorem ipsum dolor sit amet",
)


def phrase(task: Task, rng: np.random.Generator, held_out: bool = False) -> str:
    """One way of saying a task. ``held_out`` draws from phrases and synonyms that training never uses."""

    def name(thing: str) -> str:
        color, _, kind = thing.rpartition(" ")
        words = KINDS[kind]
        noun = words[0] if rng.random() < 0.6 else str(rng.choice(words))
        heard = [s for s in SYNONYMS.get(color, ()) if (s in TRAIN_SYNONYMS) != held_out]
        if heard and rng.random() < (0.5 if held_out else 0.25):
            color = str(rng.choice(heard))
        article = "the " if rng.random() < 0.95 else ""
        return f"{article}{color} {noun}".replace("  ", " ") if color else f"{article}{noun}"

    phrases = PHRASES[task.verb]
    if held_out:
        slot = {"pick": "{x}", "place": "{y}", "open": "open", "close": "shut"}[task.verb]
        phrases = tuple(p for p in HELD_OUT_PHRASES if slot in p and ("{y}" in p) == (task.verb == "place")) or phrases
    prepositions = {"bowl": ("in", "inside", "into"), "tray": ("on", "onto", "on top of")}.get(task.goal, ("in",))
    where = prepositions[0] if rng.random() < 0.7 else str(rng.choice(prepositions))
    text = str(rng.choice(phrases)).format(
        **{"x": name(task.thing) if task.thing != "drawer" else "", "y": name(task.goal) if task.goal else "",
           "d": "the drawer" if rng.random() < 0.95 else "drawer", "in": where,
           "into": "into" if task.goal == "bowl" else "onto"})
    return str(rng.choice(PREFIXES)) + text + str(rng.choice(SUFFIXES))


def unrelated(rng: np.random.Generator) -> str:
    """A sentence or noise that asks for nothing this robot can do."""
    draw = rng.random()
    if draw < 0.5:
        return str(rng.choice(UNRELATED))
    letters = list("abcdefghijklmnopqrstuvwxyz")
    if draw < 0.8:
        return " ".join("".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(rng.integers(1, 14)))
    return "".join(chr(c) for c in rng.integers(33, 126, rng.integers(3, 60)))


_COLOR_OF = {word: color for color in COLORS for word in (color, *SYNONYMS[color])}
_KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
_MENTION = re.compile(rf"(?:\b({'|'.join(_COLOR_OF)})\s+)?\b({'|'.join(_KIND_OF)})s?\b")

_NO_REQUEST = re.compile(r"^\W*(where|what|who|which|why|when|how)\b|\b(not|never)\b|\b(don|won|can)'t\b")


def parse(text: str) -> Task | None:
    """The task a sentence asks for, by its words, or None. Used to judge success in the simulator only."""
    text = text.lower()[:512]
    if _NO_REQUEST.search(text):
        return None
    mentions = [(_COLOR_OF.get(color, ""), _KIND_OF[kind]) for color, kind in _MENTION.findall(text)]
    things = [f"{color} {kind}" for color, kind in mentions if kind in ("block", "can") and color]
    goals = [kind for _, kind in mentions if kind in ("bowl", "tray")]
    if any(kind == "drawer" for _, kind in mentions) and not things:
        said = re.search(r"\b(open|close|shut)\b", text) or re.search(r"\b(pull|push)\b", text)
        return Task("open" if said[0] in ("open", "pull") else "close", "drawer") if said else None
    if not things:
        return None
    return Task("place", things[0], goals[0]) if goals else Task("pick", things[0])

"""How people say a task, and what a sentence asks for. The grammar trains the policy; the parser serves the judge."""

from __future__ import annotations

import re

import numpy as np

from vla_nodes.sim import held_out as kept
from vla_nodes.sim.scene import COLORS, GRASPABLE
from vla_nodes.sim.tasks import Task, kind_of

SYNONYMS = {  # heard for a colour; those in held_out.py are never written in training sentences
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
KINDS = {"block": ("block", "cube", "brick"), "can": ("can", "cylinder", "tin"), "bowl": ("bowl", "dish"),
         "tray": ("tray", "platter"), "drawer": ("drawer",)}
PHRASES = {
    "pick": ("pick up {x}", "pick {x} up", "grab {x}", "lift {x}", "take {x}", "grasp {x}", "get {x}", "lift up {x}",
             "pick up {x} from the table", "hold {x} up", "raise {x}"),
    "in": ("put {x} {in} {y}", "place {x} {in} {y}", "move {x} {into} {y}", "drop {x} {in} {y}", "set {x} {in} {y}",
           "pick up {x} and put it {in} {y}", "take {x} and place it {in} {y}", "pick {x} and drop it {in} {y}",
           "{in} {y} put {x}", "bring {x} to {y}", "grab {x} and put it {in} {y}", "transfer {x} {into} {y}"),
    "stack": ("stack {x} on {y}", "stack {x} on top of {y}", "put {x} on top of {y}", "put {x} on {y}",
              "place {x} on {y}", "place {x} on top of {y}", "set {x} on {y}", "put {x} onto {y}", "pile {x} on {y}",
              "pick up {x} and put it on {y}", "take {x} and stack it on {y}", "move {x} onto {y}"),
    "relation": ("put {x} {r} {y}", "place {x} {r} {y}", "move {x} {r} {y}", "set {x} {r} {y}", "set {x} down {r} {y}",
                 "pick up {x} and put it {r} {y}", "take {x} and place it {r} {y}", "{r} {y} put {x}",
                 "bring {x} {r} {y}", "move {x} so that it is {r} {y}", "{r} {y} place {x}"),
    "open": ("open {d}", "pull {d} open", "pull open {d}", "open up {d}", "pull out {d}"),
    "close": ("close {d}", "shut {d}", "push {d} shut", "push in {d}", "push {d} closed"),
}  # fmt: skip
IN = {"bowl": ("in", "inside", "into"), "drawer": ("in", "inside", "into"), "tray": ("on", "onto", "on top of")}
RELATION_WORDS = {
    "left": ("to the left of", "left of", "on the left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right of", "on the right side of"),
    "front": ("in front of", "to the front of", "at the front of"),
    "behind": ("behind", "in back of", "at the back of"),
    "beside": ("next to", "beside", "near", "close to", "by"),
}
JOINS = ("{a}, then {b}", "{a} and then {b}", "{a} then {b}", "{a} and {b}", "{a}, after that {b}", "{a}, and {b}",
         "{a}. then {b}", "first {a}, then {b}", "first {a} and then {b}", "{a}. after that, {b}")
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


def _name(thing: str, rng: np.random.Generator, held_out: bool) -> str:
    """What someone calls a thing: a noun with its article, its colour perhaps by another word."""
    if thing == "drawer":
        return "the drawer" if rng.random() < 0.95 else "drawer"
    color, _, kind = thing.rpartition(" ")
    words = KINDS[kind]
    noun = words[0] if rng.random() < 0.6 else str(rng.choice(words))
    heard = [s for s in SYNONYMS.get(color, ()) if (s in kept.SYNONYMS) == held_out]
    if heard and rng.random() < (0.5 if held_out else 0.25):
        color = str(rng.choice(heard))
    article = "the " if rng.random() < 0.95 else ""
    return f"{article}{color} {noun}".replace("  ", " ") if color else f"{article}{noun}"


def _say(task: Task, rng: np.random.Generator, held_out: bool, goal_said: str = "") -> str:
    """One step. ``goal_said`` replaces the goal's name ("it", when the step before has named it)."""
    kind = kind_of(task.goal)
    form = task.verb
    if task.verb == "place":
        form = "relation" if task.relation else "stack" if kind in GRASPABLE else "in"
    phrases = PHRASES[form]
    if held_out and form in kept.PHRASES:
        phrases = kept.PHRASES[form]
    prepositions = IN.get(kind, ("in",))
    where = prepositions[0] if rng.random() < 0.7 else str(rng.choice(prepositions))
    relation = ""
    if task.relation:
        words = (kept.RELATIONS if held_out else RELATION_WORDS)[task.relation]
        relation = words[0] if rng.random() < 0.4 else str(rng.choice(words))
    names = {"x": task.thing, "y": task.goal, "d": "drawer"}
    names = {slot: _name(name, rng, held_out) if name else "" for slot, name in names.items()}
    if goal_said:
        names["y"] = goal_said
        phrases = tuple(p for p in phrases if p.endswith("{y}"))
    return str(rng.choice(phrases)).format(
        **names, r=relation, **{"in": where, "into": "onto" if kind == "tray" else "into"})


def phrase(task: Task, rng: np.random.Generator, held_out: bool = False) -> str:
    """One way of saying a task. ``held_out`` draws from phrases and synonyms that training never uses."""
    steps = list(task.steps)
    text = _say(steps[0], rng, held_out)
    for last, step in zip(steps, steps[1:], strict=False):
        drawer_known = "drawer" in (last.thing, last.goal)
        if step.goal == "drawer" and drawer_known and rng.random() < 0.5:
            said = _say(step, rng, held_out, "it")
        elif step.thing == "drawer" and drawer_known and rng.random() < 0.3:
            said = {"open": "open it", "close": str(rng.choice(["close it", "shut it"]))}[step.verb]
        else:
            said = _say(step, rng, held_out)
            drop = last.verb == step.verb == "place" and said.startswith("put ") and not held_out
            said = said[4:] if drop and text.startswith("put ") and rng.random() < 0.4 else said
        text = str(rng.choice(kept.JOINS if held_out else JOINS)).format(a=text, b=said)
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
_RELATION = re.compile(
    r"\b(?:(?P<left>left(?:[- ]hand)?(?: side)? of)|(?P<right>right(?:[- ]hand)?(?: side)? of)|"
    r"(?P<front>in front of|(?:to|at) the front of)|(?P<behind>behind|in back of|(?:at|to) the (?:back|rear) of)|"
    r"(?P<beside>next to|beside|near|close to|alongside|adjacent to|by))\b")
_NO_REQUEST = re.compile(r"^\W*(where|what|who|which|why|when|how)\b|\b(not|never)\b|\b(don|won|can)'t\b")
_JOINTS = re.compile(r"[.;,!]|\b(?:and|then|after that|afterwards|next(?! to)|finally|first)\b")


def parse(text: str) -> Task | None:
    """The task a sentence asks for, by its words, or None. Used to judge success in the simulator only."""
    text = text.lower()[:512]
    if _NO_REQUEST.search(text):
        return None
    text = re.sub(r"\bcan (you|we|i)\b", "", text)  # "can" is also a thing
    steps: list[Task] = []
    for clause in _JOINTS.split(text):
        last = steps[-1] if steps else None
        drawer_known = last is not None and "drawer" in (last.thing, last.goal)
        if re.search(r"\bit\b", clause) and last is not None:
            if drawer_known and re.search(r"\b(in|inside|into|to) it\b", clause):
                clause = re.sub(r"\bit\b", "the drawer", clause)
            elif drawer_known and re.match(r"\s*(open|close|shut) it\b", clause):
                clause = clause.replace("it", "the drawer")
            elif last.verb == "pick":  # "pick up the red block and put it in the bowl"
                steps.pop()
                clause = re.sub(r"\bit\b", last.thing, clause, count=1)
                if steps and "drawer" in (steps[-1].thing, steps[-1].goal):  # "... and put it in it"
                    clause = re.sub(r"\b(in|inside|into|to) it\b", r"\1 the drawer", clause)
        if not _MENTION.search(clause):
            continue
        step = _parse_step(clause)
        if step is None:
            return None
        steps.append(step)
    task = None
    for step in reversed(steps):
        task = Task(step.verb, step.thing, step.goal, step.relation, task)
    return task


def _parse_step(text: str) -> Task | None:
    """One clause."""
    mentions = [(m.start(), f"{_COLOR_OF.get(m[1], '')} {_KIND_OF[m[2]]}".strip()) for m in _MENTION.finditer(text)]
    mentions = [(at, kind_of(name) if kind_of(name) not in GRASPABLE else name) for at, name in mentions]
    things = [name for _, name in mentions if kind_of(name) in GRASPABLE]
    others = [name for _, name in mentions if kind_of(name) not in GRASPABLE]
    if any(" " not in name for name in things):  # "the block": which?
        return None
    if not things:
        said = re.search(r"\b(open|close|shut)\b", text) or re.search(r"\b(pull|push)\b", text)
        if "drawer" not in others or not said:
            return None
        return Task("open" if said[0] in ("open", "pull") else "close", "drawer")
    if relation := _RELATION.search(text):
        after = [name for at, name in mentions if at >= relation.end()]
        rest = [name for name in things if not after or name != after[0]]
        if not after or not rest or after[0] == "drawer":
            return None
        return Task("place", rest[0], after[0], relation.lastgroup)
    if others:
        return Task("place", things[0], others[0])
    if len(set(things)) > 1:
        return Task("place", things[0], things[1]) if re.search(r"\bon\b|\bonto\b", text) else None
    if re.search(r"\b(put|place|set|drop|move|stack)\b", text):  # where?
        return None
    return Task("pick", things[0])

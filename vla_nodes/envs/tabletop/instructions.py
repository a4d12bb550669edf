"""How people say a task, and what a sentence asks for. The grammar trains the policy, the parser serves success."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from vla_nodes.envs.tabletop import held_out as kept
from vla_nodes.envs.tabletop.scene import COLORS, GRASPABLE
from vla_nodes.envs.tabletop.tasks import Task, kind_of
from vla_nodes.envs.tabletop.vocabulary import (
    ADJECTIVES,
    ARTICLES,
    BACKWARDS,
    DOING,
    IMPOSSIBLE,
    IN,
    ITS,
    JOINS,
    KINDS,
    OTHER_KINDS,
    OTHER_PLACES,
    PHRASES,
    PREFIXES,
    RELATION_WORDS,
    SHADES,
    SUFFIXES,
    SYNONYMS,
    UNRELATED,
)

KNOWN = tuple(f"{c} {k}" for c in COLORS for k in GRASPABLE if not kept.pair(k, c))  # things that training names
STATEMENT = re.compile(r"\{(x|y|d|in|r)\}|([iI]|we) ")  # how a phrase begins that is no request to someone


def _any(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _name(thing: str, rng: np.random.Generator, axis: str = "") -> str:
    """What someone calls a thing: a noun with its article, its colour perhaps by another word."""
    if thing == "drawer":
        return "the drawer" if rng.random() < 0.95 else "drawer"
    color, _, kind = thing.rpartition(" ")
    words = KINDS.get(kind) or (kind,)
    noun = words[0] if rng.random() < 0.6 else _any(rng, words)
    if axis == "synonyms":
        color = kept.SYNONYMS.get(color, color)
    elif color in SYNONYMS and rng.random() < 0.3:
        color = _any(rng, SYNONYMS[color])
        color = color.replace(" ", "-") if rng.random() < 0.3 else color
    article = _any(rng, ARTICLES)
    look = rng.random()
    if not color:
        return f"{article} {noun}".strip()
    if look < 0.05:
        return f"{article} {noun} that is {color}".strip()
    if look < 0.10:
        color = f"{_any(rng, SHADES)} {color}"
    elif look < 0.15:
        color += _any(rng, (" coloured", " colored", "-coloured", "-colored"))
    elif look < 0.20:
        color = f"{_any(rng, ADJECTIVES)} {color}"
    elif look < 0.23:
        color = f"{color} {_any(rng, ADJECTIVES)}"
    return f"{article} {color} {noun}".strip()


def _form(step: Task) -> str:
    """Which of PHRASES say such a step."""
    if step.verb != "place":
        return step.verb
    return "relation" if step.relation else "stack" if kind_of(step.reference) in GRASPABLE else "in"


def _say(task: Task, rng: np.random.Generator, axis: str, goal_said: str = "", last: str = ""
         ) -> tuple[bool, str]:  # fmt: skip
    """Whether it is said as a request, and one step. ``goal_said`` replaces the goal's name ("it", when it is known).

    A goal like the thing may be called "the blue one", and so may a thing like ``last``, the thing spoken of before.
    """
    kind, form = kind_of(task.reference), _form(task)
    phrases: tuple[str, ...] = PHRASES[form]
    relations: Mapping[str, tuple[str, ...]] = RELATION_WORDS
    if axis == "phrasings":
        phrases, relations = kept.PHRASES[form], kept.RELATIONS
    prepositions = IN.get(kind, ("in",))
    where = prepositions[0] if rng.random() < 0.7 else _any(rng, prepositions)
    relation = ""
    if task.relation:
        words = relations[task.relation]
        relation = words[0] if rng.random() < 0.15 else _any(rng, words)
    names = {"x": task.target, "y": task.reference, "d": "drawer"}
    names = {slot: _name(name, rng, axis) if name else "" for slot, name in names.items()}
    if goal_said:
        names["y"] = goal_said
        phrases = tuple(p for p in phrases if p.endswith("{y}"))
    said = _any(rng, phrases)
    if task.relation and axis != "phrasings" and rng.random() < 0.06:
        said = said.replace("{r} {y}", _any(rng, ITS[task.relation]))
    if not axis and 0 <= said.find("{x}") < (said + "{y}").find("{y}") and rng.random() < 0.15:
        for slot, name, before in (("y", task.reference, task.target), ("x", task.target, last)):
            if name and kind_of(name) == kind_of(before):
                names[slot] = f"the {name.split()[0]} one"
    text = said.format(**names, r=relation, **{"in": where, "into": "onto" if kind == "tray" else "into"})
    return not STATEMENT.match(said), text


def _join(first: tuple[bool, str], later: tuple[bool, str], rng: np.random.Generator, joins: tuple[str, ...]) -> str:
    """Two steps, as `_say` gives them, in one sentence."""
    said = {"a": first[1], "b": later[1]}
    for slot, (request, text) in (("a", first), ("b", later)):
        verb, _, rest = text.partition(" ")
        if request:
            said[f"{slot}_do"] = text
        if verb in DOING:
            said[f"{slot}_doing"] = f"{DOING[verb]} {rest}"
    return _any(rng, tuple(j for j in joins if set(re.findall(r"{(\w+)}", j)) <= set(said))).format(**said)


def phrase(task: Task, rng: np.random.Generator, axis: str = "") -> str:
    """One way of saying a task. ``axis``: "phrasings" or "synonyms" for the words of held_out.py, not of training."""
    steps = list(task.steps)
    request, text = _say(steps[0], rng, axis)
    prefix = _any(rng, PREFIXES) if request else ""
    for last, step in zip(steps, steps[1:], strict=False):
        drawer_known = "drawer" in (last.target, last.reference)
        if axis != "phrasings" and rng.random() < 0.08:
            if last.reference == step.target == "drawer" and rng.random() < 0.5:
                request, text = _say(last, rng, axis, "it")
            prefix, text = "", _join((request, text), _say(step, rng, axis), rng, BACKWARDS)
            continue
        if step.reference == "drawer" and drawer_known and rng.random() < 0.5:
            asked, said = _say(step, rng, axis, "it")
            if axis != "phrasings" and rng.random() < 0.4:
                said = re.sub(r"\b(in|into|inside|inside of) it$", _any(rng, ("inside", "in there")), said)
        elif step.target == "drawer" and drawer_known and rng.random() < 0.3:
            asked, said = True, {"open": "open it", "close": _any(rng, ("close it", "shut it"))}[step.verb]
        else:
            other = kind_of(last.reference) in GRASPABLE and kind_of(last.reference) != kind_of(last.target)
            asked, said = _say(step, rng, axis, last="" if other else last.target)
            drop = last.verb == step.verb == "place" and said.startswith("put ") and axis != "phrasings"
            if drop and text.startswith("put ") and rng.random() < 0.4:
                asked, said = False, said[4:]
        text = _join((request, text), (asked, said), rng, kept.JOINS if axis == "phrasings" else JOINS)
    return prefix + text + _any(rng, SUFFIXES)


def plain(task: Task) -> str:
    """A task in the first words that come to mind."""
    said = []
    for step in task.steps:
        where = IN.get(kind_of(step.reference), ("in",))[0]
        relation = RELATION_WORDS[step.relation][0] if step.relation else ""
        names = {"x": f"the {step.target}", "y": f"the {step.reference}", "d": "the drawer"}
        said.append(PHRASES[_form(step)][0].format(**names, r=relation, **{"in": where}))
    return ", then ".join(said)


def unrelated(rng: np.random.Generator, things: tuple[str, ...] = KNOWN, noise: bool = True) -> str:
    """A sentence, or ``noise``, that asks for nothing this robot can do, perhaps about one of ``things``."""
    draw = rng.random() * (1.0 if noise else 0.75)
    if draw < 0.2:
        return _any(rng, UNRELATED)
    if draw < 0.75:
        place = f"the {_any(rng, ('bowl', 'tray'))}"
        thing = _name(_any(rng, things), rng)
        if draw < 0.5:
            return _any(rng, IMPOSSIBLE).format(x=thing, y=place)
        color = f"{_any(rng, tuple(COLORS))} " if rng.random() < 0.7 else ""
        strange = f"the {color}{_any(rng, OTHER_KINDS)}"
        if draw < 0.6:
            return _any(rng, PHRASES["pick"]).format(x=strange)
        if draw < 0.7:
            return _any(rng, PHRASES["in"]).format(x=strange, y=place, **{"in": "in", "into": "into"})
        return _any(rng, PHRASES["in"]).format(x=thing, y=_any(rng, OTHER_PLACES), **{"in": "in", "into": "into"})
    letters = list("abcdefghijklmnopqrstuvwxyz")
    if draw < 0.9:
        return " ".join("".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(rng.integers(1, 14)))
    return "".join(chr(c) for c in rng.integers(33, 126, rng.integers(3, 60)))


_COLOR_OF = {word: color for color in COLORS for word in (color, kept.SYNONYMS.get(color, color), *SYNONYMS[color])}
_KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
_COLOR, _KIND, _LOOK = ("|".join(sorted(words, key=len, reverse=True)) for words in (_COLOR_OF, _KIND_OF, ADJECTIVES))
_MENTION = re.compile(rf"(?:\b({_COLOR})(?:[- ]colou?red)?\s+(?:(?:{_LOOK})\s+)?)?\b({_KIND})s?\b")
_TURNED = re.compile(rf"\b({_KIND}) (?:that|which) is (?:(?:{'|'.join(SHADES)}) )?({_COLOR})\b")  # "cube that is red"
_ONE = re.compile(rf"\b({_COLOR})(?: colou?red)? one\b")
_LIKE = re.compile(rf"\b({'|'.join(sorted((w for k in GRASPABLE for w in KINDS[k]), key=len, reverse=True))})s?\b")
_ALSO = {"left": ("left hand side of", "leftward of"), "right": ("right hand side of", "rightward of"),
         "front": ("front of", "near side of"), "behind": ("rear of", "back of", "backside of", "far side of"),
         "beside": ("close by", "along side of", "side of")}  # fmt: skip
_RELATION_OF = {
    word.replace("-", " "): relation
    for relation, words in RELATION_WORDS.items()
    for word in (*words, *kept.RELATIONS[relation], *_ALSO.get(relation, ()))
}
_RELATION = re.compile(rf"\b({'|'.join(sorted(_RELATION_OF, key=len, reverse=True))})\b")
_ITS = re.compile(r"\b(?:to|on|at) ((?:\w+ ){0,4}?\w+)'s (left|right|front|back|side)(?: side)?\b(?! of)")
_INSIDE = re.compile(rf"\b(?:in|into|inside|inside of|to) (?:it|there)\b|"
                     rf"\binside\b(?!\s+(?:of|{'|'.join(sorted({a for a in ARTICLES if a}))}|{_KIND})\b)")  # fmt: skip
_DOES = {doing: verb for verb, doing in DOING.items()}
_DOING = re.compile(rf"\b({'|'.join(_DOES)})\b")
_SLOTS = {"a": ".+", "b": ".+?", "a_do": ".+", "b_do": ".+?"}
_SLOTS |= {f"{slot}_doing": rf"(?:{'|'.join(DOING)})\b{rest}" for slot, rest in (("a", ".+"), ("b", ".+?"))}
_BACKWARDS = [
    re.compile(re.sub(r"{(\w+)}", lambda slot: f"(?P<{slot[1][0]}>{_SLOTS[slot[1]]})", join) + "$")
    for join in (*BACKWARDS, "{b}, but first, {a}")
]
_NO_REQUEST = re.compile(r"^\W*(where|what|who|which|why|when|how|is|are|i like)\b|\b(not|never)\b|\b(don|won|can)'t\b")
_NO_PICK = re.compile(
    r"\b(put|place|set|drop|move|stack|push|rotate|turn|flip|knock|look|point|touch|paint|break|eat|kick|hit|open|close|"
    rf"clean|wipe|count|describe|photograph|wash|fill|ignore|alone|stay|nudge|drag|throw|squeeze|crush|shake|roll|spin|"
    rf"tilt|tell|avoid|nothing|empty|{'|'.join(OTHER_KINDS)}|"
    rf"{'|'.join(place.split()[-1] for place in OTHER_PLACES)})\b"
)  # no place is named, and it is not to be lifted
_JOINTS = re.compile(r"[.;,:!]|\b(?:and|then|after that|afterwards|next(?! to| door)|finally|first|before(?: you)?|"
                     r"followed by)\b")  # fmt: skip


def parse(text: str) -> Task | None:
    """The task a sentence asks for, by its words, or None. Used to judge success in the simulator only."""
    text = re.sub(r"(?<=\w)-(?=\w)", " ", text.lower()[:512])
    if _NO_REQUEST.search(text):
        return None
    text = re.sub(r"\b(can (you|we|i)|you can)\b", "", text)  # "can" is also a thing
    text = _DOING.sub(lambda said: _DOES[said[1]], _TURNED.sub(r"\2 \1", text))
    text = _ONE.sub(lambda one: " ".join([one[1], *_LIKE.findall(text[: one.start()])[-1:]]), text)
    text = _ITS.sub(r"\2 of \1", text)
    for join in _BACKWARDS:
        if (turned := join.match(text)) and _MENTION.search(turned["b"]):
            first, later = turned["a"], turned["b"]
            text = f"{_INSIDE.sub('in the drawer', first) if 'drawer' in later else first}. {later}"
    steps: list[Task] = []
    for clause in _JOINTS.split(text):
        last = steps[-1] if steps else None
        drawer_known = last is not None and "drawer" in (last.target, last.reference)
        if last is not None and last.verb == "pick" and re.search(r"\bit\b", clause):
            steps.pop()  # "pick up the red block and put it in the bowl"
            clause = re.sub(r"\bit\b", last.target, clause, count=1)
            drawer_known = bool(steps) and "drawer" in (steps[-1].target, steps[-1].reference)
        if drawer_known:  # "... and put it in it"
            clause = _INSIDE.sub("in the drawer", clause)
            clause = re.sub(r"\b(open|close|shut) it\b", r"\1 the drawer", clause)
        if not _MENTION.search(clause):
            continue
        step = _parse_step(clause)
        if step is None:
            return None
        steps.append(step)
    task = None
    for step in reversed(steps):
        task = Task(step.verb, step.target, step.reference, step.relation, task)
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
        said = re.search(r"\b(open|close|shut)(?:e?d)?\b", text) or re.search(r"\b(pull|push)\b", text)
        if "drawer" not in others or not said:
            return None
        return Task("open" if said[1] in ("open", "pull") else "close", "drawer")
    if relation := _RELATION.search(text):
        after = [name for at, name in mentions if at >= relation.end()]
        rest = [name for name in things if not after or name != after[0]]
        if not after or not rest or after[0] == "drawer":
            return None
        return Task("place", rest[0], after[0], _RELATION_OF[relation[1]])
    if others:
        return Task("place", things[0], others[0])
    if len(set(things)) > 1:
        return Task("place", things[0], things[1]) if re.search(r"\b(on|onto|upon|atop)\b", text) else None
    return None if _NO_PICK.search(text) else Task("pick", things[0])

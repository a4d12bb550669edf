"""Sentences to distil the instruction encoder on: robot instructions in many wordings, and general text for the rest.

The grammar only has to cover how people phrase such requests; what the robot is trained to do is elsewhere.
`HELD_OUT` words appear in no training sentence: the test of agreement with the teacher uses them.
"""

from __future__ import annotations

import random

COLOURS = {
    "red": ["red", "crimson", "scarlet", "ruby", "cherry red", "dark red"],
    "blue": ["blue", "navy", "azure", "sky blue", "cobalt", "light blue"],
    "green": ["green", "lime", "emerald", "olive green", "mint", "dark green"],
    "yellow": ["yellow", "golden", "lemon yellow", "amber", "bright yellow"],
    "orange": ["orange", "tangerine", "rust coloured"],
    "purple": ["purple", "violet", "lilac", "magenta", "plum"],
    "white": ["white", "ivory", "cream coloured"],
    "black": ["black", "jet black", "dark"],
    "brown": ["brown", "tan", "chocolate coloured"],
    "grey": ["grey", "gray", "silver"],
    "pink": ["pink", "rose", "fuchsia"],
}
THINGS = {
    "cube": ["cube", "block", "box", "brick", "square block", "die"],
    "ball": ["ball", "sphere", "orb", "marble"],
    "cylinder": ["cylinder", "can", "tin", "tube", "rod"],
    "mug": ["mug", "cup", "coffee mug", "tea cup", "beaker"],
    "bottle": ["bottle", "flask", "water bottle"],
    "plate": ["plate", "dish", "saucer"],
    "apple": ["apple", "fruit"],
    "banana": ["banana"],
    "book": ["book", "notebook"],
    "pen": ["pen", "pencil", "marker"],
    "spoon": ["spoon", "fork", "knife"],
    "toy": ["toy", "toy car", "teddy bear", "figure"],
    "screwdriver": ["screwdriver", "wrench", "hammer", "tool"],
    "phone": ["phone", "remote control"],
    "object": ["object", "thing", "item", "one", "piece"],
}
PLACES = {
    "bowl": ["bowl", "dish", "basin"],
    "bin": ["bin", "trash can", "waste basket", "bucket", "container"],
    "tray": ["tray", "platter"],
    "basket": ["basket", "crate", "box"],
    "table": ["table", "desk", "counter", "worktop"],
    "shelf": ["shelf", "rack", "ledge"],
    "plate": ["plate", "saucer"],
    "pad": ["mat", "pad", "coaster", "square", "target", "zone"],
}
FURNITURE = ["drawer", "top drawer", "bottom drawer", "middle drawer", "cabinet", "cupboard", "door", "lid",
             "microwave", "box", "fridge", "oven"]  # fmt: skip
PICK = ["pick up {o}", "pick {o} up", "grab {o}", "take {o}", "lift {o}", "lift up {o}", "raise {o}", "grasp {o}",
        "get {o}", "fetch {o}", "hold {o}", "collect {o}", "reach for {o}", "seize {o}", "pick {o} off the table",
        "take hold of {o}", "bring me {o}", "hand me {o}", "elevate {o}"]  # fmt: skip
INTO = ["put {o} in {p}", "put {o} into {p}", "place {o} in {p}", "place {o} inside {p}", "drop {o} into {p}",
        "set {o} in {p}", "move {o} to {p}", "move {o} into {p}", "transfer {o} to {p}", "deposit {o} in {p}",
        "pick up {o} and place it in {p}", "take {o} and put it in {p}", "grab {o} and drop it in {p}",
        "throw {o} into {p}", "store {o} in {p}", "{o} goes in {p}", "into {p} put {o}",
        "fill {p} with {o}"]  # fmt: skip
ONTO = ["put {o} on {p}", "place {o} on {p}", "set {o} down on {p}", "lay {o} on {p}", "put {o} onto {p}",
        "place {o} on top of {p}", "rest {o} on {p}", "move {o} onto {p}", "pick up {o} and set it on {p}"]  # fmt: skip
STACK = ["stack {o} on {q}", "put {o} on top of {q}", "place {o} on {q}", "pile {o} onto {q}", "balance {o} on {q}",
         "build a tower with {o} on {q}"]  # fmt: skip
BESIDE = ["move {o} {r} {q}", "put {o} {r} {q}", "place {o} {r} {q}", "slide {o} {r} {q}", "push {o} {r} {q}"]
RELATION = ["to the left of", "to the right of", "next to", "beside", "behind", "in front of", "near", "away from",
            "left of", "right of", "close to", "between the wall and"]  # fmt: skip
SHIFT = ["push {o} to the left", "push {o} to the right", "slide {o} forward", "pull {o} towards me",
         "move {o} backward", "nudge {o} left", "rotate {o}", "turn {o} around", "flip {o} over", "tip {o} over",
         "wipe the table with {o}", "point at {o}", "touch {o}", "look at {o}", "do not touch {o}"]  # fmt: skip
OPEN = ["open the {f}", "pull the {f} open", "pull open the {f}", "slide the {f} open", "unlock the {f}"]
CLOSE = ["close the {f}", "shut the {f}", "push the {f} closed", "push the {f} shut", "slide the {f} closed"]
PLAIN = ["stop", "stop moving", "go home", "return to the start position", "wait", "open the gripper", "let go",
         "release it", "close the gripper", "clean up the table", "tidy up", "hello robot", "move up", "move down",
         "go left", "go right", "turn on the light", "press the button", "pour the water", "do nothing"]  # fmt: skip
BEFORE = ["please ", "could you ", "can you ", "would you please ", "robot, ", "now ", "i want you to ",
          "i need you to ", "carefully ", "slowly ", "go ahead and ", "hey, ", "kindly "]  # fmt: skip
AFTER = [" please", " now", " for me", " carefully", " thanks", " if you can", " right away", " gently"]
JOIN = [" and then ", ", then ", " and ", ", after that "]
WHERE = ["on the left", "on the right", "in the middle", "at the back", "near the edge", "closest to you",
         "on the table"]  # fmt: skip
SIZE = ["small", "large", "big", "tiny", "little", "tall"]
HELD_OUT = {"scarlet", "cobalt", "emerald", "violet", "sphere", "brick", "flask", "beaker", "seize", "elevate",
            "platter", "crate", "deposit", "cupboard", "nudge", "kindly"}  # fmt: skip


def instruction(rng: random.Random) -> str:
    """One instruction, in one of its many wordings."""

    def thing() -> str:
        noun = rng.choice(rng.choice(list(THINGS.values())))
        words = [rng.choice(["the", "the", "the", "a", "that"])]
        if rng.random() < 0.12:
            words.append(rng.choice(SIZE))
        if rng.random() < 0.75:
            words.append(rng.choice(rng.choice(list(COLOURS.values()))))
        words.append(noun)
        if rng.random() < 0.1:
            words.append(rng.choice(WHERE))
        return " ".join(words)

    def place() -> str:
        colour = rng.choice(rng.choice(list(COLOURS.values()))) + " " if rng.random() < 0.4 else ""
        return f"the {colour}{rng.choice(rng.choice(list(PLACES.values())))}"

    def clause() -> str:
        form = rng.choices(
            [PICK, INTO, ONTO, STACK, BESIDE, SHIFT, OPEN, CLOSE, PLAIN], [6, 6, 4, 3, 4, 3, 2, 2, 1]
        )[0]  # fmt: skip
        text = rng.choice(form)
        return text.format(o=thing(), p=place(), q=thing(), r=rng.choice(RELATION), f=rng.choice(FURNITURE))

    text = clause()
    if rng.random() < 0.12:
        text += rng.choice(JOIN) + clause()
    if rng.random() < 0.2:
        text = rng.choice(BEFORE) + text
    if rng.random() < 0.1:
        text += rng.choice(AFTER)
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
    return any(word.strip(".,!") in HELD_OUT for word in text.lower().split())


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

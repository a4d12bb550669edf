"""What training never sees, all in one place: the evaluation of generalisation draws from here.

Five axes: "pairs" of colour and shape, "phrasings" (verbs, relations, order), "synonyms" of colours, "placements"
outside the trained region, and "camera" poses jittered farther than in training.
"""

from __future__ import annotations

AXES = ("pairs", "phrasings", "synonyms", "placements", "camera")
PAIRS = {("block", "purple"), ("block", "orange"), ("can", "green"), ("can", "white")}  # (kind, colour)
MARGIN = 0.025  # m around the trained region where placements are held out
CAMERA_JITTER = (0.025, 0.04)  # m, least and most per axis of the camera's position; training stays within 0.02
SYNONYMS = {"red": "scarlet", "blue": "azure", "orange": "tangerine", "pink": "rose"}  # one for a colour
PHRASES = {
    "pick": ("fetch {x}", "lift {x} off the table", "seize {x}"),
    "in": ("{x} goes {in} {y}", "I want {x} {in} {y}", "deposit {x} {in} {y}"),
    "stack": ("balance {x} on {y}", "{x} goes on top of {y}", "I want {x} on {y}"),
    "relation": ("I want {x} {r} {y}", "{x} goes {r} {y}", "shift {x} {r} {y}"),
    "open": ("slide {d} open",),
    "close": ("slide {d} shut",),
}
RELATIONS = {"left": ("on the left hand side of",), "right": ("on the right hand side of",), "front": ("in front of",),
             "behind": ("to the rear of",), "beside": ("alongside",)}  # fmt: skip
JOINS = ("{a}, afterwards {b}", "{a}; {b}", "{a}, next {b}")


def pair(kind: str, color: str) -> bool:
    """Whether a colour on a shape is held out."""
    return (kind, color) in PAIRS

"""What stands on the table: a seeded, JSON-serialisable description, with no simulator in it.

Frame: base (panda_link0, REP 103: x forward, y left, z up); the table top is z = 0. Units: m, rad.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vla_nodes.envs.tabletop import held_out

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.83, 0.10, 0.08),
    "green": (0.13, 0.62, 0.18),
    "blue": (0.10, 0.27, 0.85),
    "yellow": (0.95, 0.82, 0.10),
    "orange": (0.97, 0.48, 0.06),
    "purple": (0.46, 0.14, 0.66),
    "pink": (0.97, 0.50, 0.70),
    "cyan": (0.10, 0.78, 0.82),
    "white": (0.93, 0.93, 0.93),
    "black": (0.07, 0.07, 0.08),
}
BLOCK_SIZE = 0.04  # edge of a block
CAN_RADIUS, CAN_HEIGHT = 0.021, 0.055
BOWL_RADIUS, BOWL_HEIGHT = 0.075, 0.045  # to the middle of the wall
TRAY_SIZE, TRAY_HEIGHT = (0.16, 0.20), 0.018  # outer x, y; rim height
DRAWER_TRAVEL = 0.16
CABINET_SIZE = (0.20, 0.22, 0.11)  # x, y, z
CABINET_POSITION = (0.70, -0.30)

# Where objects may stand: reachable top-down, in view, clear of the drawer's path.
REGION_X, REGION_Y = (0.34, 0.62), (-0.12, 0.27)
HAND_HALF_WIDTH = 0.115  # along y, with margin: what a top-down grasp needs beside the cabinet and its open drawer
# What keeps the fingers of a top-down grasp clear of the neighbours.
CLEARANCE = {"block": 0.050, "can": 0.050, "bowl": 0.090, "tray": 0.120}
GRASPABLE = ("block", "can")
# Shapes that are looked at and never asked for: geom, its size in m as MuJoCo takes it, and half its height.
SHAPES = {
    "ball": ("sphere", (0.023, 0.0, 0.0), 0.023),
    "egg": ("ellipsoid", (0.018, 0.018, 0.03), 0.03),
    "slab": ("box", (0.03, 0.03, 0.006), 0.006),
    "post": ("box", (0.012, 0.012, 0.04), 0.04),
    "pill": ("capsule", (0.016, 0.02, 0.0), 0.036),
}
CLEARANCE |= dict.fromkeys(SHAPES, 0.05)
HALF_HEIGHT = {"block": BLOCK_SIZE / 2, "can": CAN_HEIGHT / 2, **{name: shape[2] for name, shape in SHAPES.items()}}
UNNAMED = "unnamed"
NAMED_APART = 0.2  # what a colour without a name differs by, in one channel at least, from every one with a name


@dataclass
class Thing:
    """An object on the table. ``name`` is unique in a scene and is how people call it ("red block", "bowl")."""

    kind: str
    color: str
    x: float
    y: float
    yaw: float
    rgb: tuple[float, float, float]

    @property
    def name(self) -> str:
        return self.kind if self.kind in ("bowl", "tray") else f"{self.color} {self.kind}"


@dataclass
class View:
    """The fixed camera: its position and the point it looks at, in base; vertical field of view in degrees."""

    position: tuple[float, float, float] = (0.48, 0.62, 0.80)
    target: tuple[float, float, float] = (0.47, -0.03, 0.03)
    fovy: float = 47.0


@dataclass
class Scene:
    seed: int
    things: list[Thing] = field(default_factory=list)
    drawer_opening: float = 0.0  # m
    view: View = field(default_factory=View)
    light: tuple[float, float, float] = (0.3, 0.2, 1.5)  # position of the main light
    brightness: float = 1.0
    table_rgb: tuple[float, float, float] = (0.72, 0.60, 0.46)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        raw = json.loads(text)
        things = [Thing(**{**t, "rgb": tuple(t["rgb"])}) for t in raw.pop("things")]
        stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.pop("view").items()}
        view = View(**stored)
        raw = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(things=things, view=view, **raw)

    def find(self, name: str) -> Thing | None:
        return next((t for t in self.things if t.name == name), None)

    @classmethod
    def demo(cls, seed: int) -> Scene:
        """What ``./run`` and the launch file start with: four blocks, a bowl, a tray and the drawer, placed by seed."""
        rng = np.random.default_rng(seed)
        blocks = [("block", color) for color in ("red", "green", "blue", "yellow")]
        return cls(seed, _place([("bowl", "grey"), ("tray", "brown"), *blocks], rng))

    @classmethod
    def random(cls, seed: int, axis: str = "") -> Scene:
        """A training scene: anything the demo scene can hold and more, with light, table and camera jittered.

        ``axis`` is what differs from training, one of held_out.AXES.
        """
        rng = np.random.default_rng(seed)
        kinds: list[tuple[str, str]] = []
        if rng.random() < 0.85:
            kinds.append(("bowl", "grey"))
        if rng.random() < 0.75:
            kinds.append(("tray", "brown"))
        colors = list(rng.permutation(list(COLORS)))
        if rng.random() < 0.5:  # the everyday four more often than chance would have it
            everyday = ["red", "green", "blue", "yellow"]
            colors = list(rng.permutation(everyday)) + [c for c in colors if c not in everyday]
        for color in colors[: rng.integers(1, 6)]:
            kind = "can" if rng.random() < 0.35 else "block"
            kinds.append((kind, str(color)))
            if rng.random() < 0.25:  # the same colour in the other shape, so that colour alone does not tell them
                kinds.append(("block" if kind == "can" else "can", str(color)))
        kinds = [named for named in kinds if not held_out.pair(*named)]
        if not any(kind in GRASPABLE for kind, _ in kinds):
            kinds.append(("block", "red"))
        if axis == "pairs":
            kept = sorted(held_out.PAIRS)
            kinds = [*kinds[:4], *(kept[i] for i in rng.permutation(len(kept))[:2])]
        scene = cls(seed, _place(kinds, rng, 0.04, held_out.MARGIN if axis == "placements" else 0.0))
        if rng.random() < 0.35:
            scene.drawer_opening = float(rng.uniform(0.05, 1.0) * DRAWER_TRAVEL)
        view = View()
        shift = rng.uniform(-0.02, 0.02, 3)
        if axis == "camera":
            shift = np.sign(shift) * rng.uniform(*held_out.CAMERA_JITTER, 3)
        scene.view = View(
            _three(np.asarray(view.position) + shift),
            _three(np.asarray(view.target) + rng.uniform(-0.015, 0.015, 3)),
            view.fovy,
        )
        scene.light = (float(rng.uniform(-0.4, 0.9)), float(rng.uniform(-0.6, 0.8)), float(rng.uniform(1.2, 1.9)))
        scene.brightness = float(rng.uniform(0.75, 1.15))
        shade = rng.uniform(0.75, 1.2)
        rgb = np.clip(np.asarray(scene.table_rgb) * shade + rng.uniform(-0.08, 0.08, 3), 0.15, 0.95)
        scene.table_rgb = _three(rgb)
        return scene


def _three(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z


def reachable(x: float, y: float, margin: float = 0.0) -> bool:
    """Whether a hand can put something down at (x, y), and the camera see it there."""
    beside_cabinet = x > 0.40 and y < CABINET_POSITION[1] + CABINET_SIZE[1] / 2 + HAND_HALF_WIDTH
    inside = REGION_X[0] - margin < x < REGION_X[1] + margin and REGION_Y[0] - margin < y < REGION_Y[1] + margin
    return inside and not beside_cabinet


def _place(kinds: list[tuple[str, str]], rng: np.random.Generator, color_noise: float = 0.0,
           beyond: float = 0.0) -> list[Thing]:  # fmt: skip
    """Random places that keep every pair clear of each other; the crowd starts over when someone finds no room.

    When starting over does not help either, the last of the crowd stays away. With ``beyond`` m, what can be grasped
    stands in a band of that width around the region instead of in it.
    """
    for _ in range(300):
        things: list[Thing] = []
        for kind, color in kinds:
            for _ in range(60):
                margin = -beyond if kind in GRASPABLE else max(0.0, CLEARANCE[kind] - 0.05)
                # rng.uniform to the last bit, and several times faster: a crowd takes thousands of tries
                x = REGION_X[0] + margin + (REGION_X[1] - margin - (REGION_X[0] + margin)) * rng.random()
                y = REGION_Y[0] + margin + (REGION_Y[1] - margin - (REGION_Y[0] + margin)) * rng.random()
                if beyond and kind in GRASPABLE and reachable(x, y):
                    continue
                if reachable(x, y, beyond) and all(
                    math.hypot(x - o.x, y - o.y) > CLEARANCE[kind] + CLEARANCE[o.kind] for o in things
                ):
                    break
            else:
                break
            base = COLORS.get(color, (0.45, 0.47, 0.50) if kind == "bowl" else (0.42, 0.27, 0.16))
            rgb = np.clip(np.asarray(base) + rng.uniform(-color_noise, color_noise, 3), 0, 1)
            yaw = rng.uniform(-0.6, 0.6) if kind in (*GRASPABLE, *SHAPES) else 0.0
            things.append(Thing(kind, color, float(x), float(y), float(yaw), _three(rgb)))
        else:
            return things
    return _place(kinds[:-1], rng, color_noise, beyond)


def strange(things: list[Thing], rng: np.random.Generator) -> list[Thing]:
    """Most of what can be grasped changed: to a colour that has no name, or to a shape that nobody asks for.

    What a block is then does not depend on its colour, nor what orange is on its shape. No unnamed colour is near one
    that some kind is never seen in: there too it would tell the kind.
    """
    known, kept = np.array(list(COLORS.values())), {color for _, color in held_out.PAIRS}
    changed: list[Thing] = []
    for number, thing in enumerate(things):
        draw = rng.random()
        if thing.kind in GRASPABLE and draw < 0.3:
            while True:
                rgb = rng.random(3)
                gap = np.abs(known - rgb)
                nearest = list(COLORS)[int(np.linalg.norm(gap, axis=1).argmin())]
                if gap.max(1).min() > NAMED_APART and nearest not in kept:
                    break
            thing = replace(thing, color=f"{UNNAMED}{number}", rgb=_three(rgb))
        elif thing.kind in GRASPABLE and draw < 0.75:
            color = str(rng.choice(sorted(kept) if rng.random() < 0.5 else list(COLORS)))
            rgb = np.clip(COLORS[color] + rng.uniform(-0.04, 0.04, 3), 0, 1)
            other = replace(thing, kind=str(rng.choice(list(SHAPES))), color=color, rgb=_three(rgb))
            thing = thing if any(other.name == done.name for done in changed) else other
        changed.append(thing)
    return changed


def rearranged(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    """The same things in other places."""
    found = _place([(t.kind, t.color) for t in scene.things], rng)
    return [Thing(f.kind, f.color, f.x, f.y, f.yaw, t.rgb) for f, t in zip(found, scene.things, strict=False)]

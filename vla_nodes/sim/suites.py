"""Seeded scenes with a task each, by family: what training draws from, and what evaluation measures on."""

from __future__ import annotations

import numpy as np

from vla_nodes.sim import held_out, language
from vla_nodes.sim import scene as sc
from vla_nodes.sim.scene import Scene
from vla_nodes.sim.tasks import FAMILIES, RELATIONS, Task, destination, kind_of, related

TRIES = 200  # scenes looked at before a family is given up for a seed
OPEN = 0.13  # m of drawer travel from which something can be put inside


def free(task: Task, scene: Scene) -> bool:
    """Whether a relation is not there already, nothing stands where it would be, and a hand reaches there."""
    goal, thing = scene.find(task.goal), scene.find(task.thing)
    if related(task, np.array([thing.x - goal.x, thing.y - goal.y])):
        return False
    x, y, _ = destination(task, np.array([goal.x, goal.y, 0.0]))
    others = [o for o in scene.things if o.name not in (task.thing, task.goal)]
    clear = all(np.hypot(x - o.x, y - o.y) > sc.CLEARANCE[thing.kind] + sc.CLEARANCE[o.kind] - 0.01 for o in others)
    return clear and sc.reachable(x, y, 0.03)


def _pick(rng: np.random.Generator, options: list):
    return options[rng.integers(len(options))]


def step(family: str, scene: Scene, rng: np.random.Generator, avoid: tuple[str, ...] = (), axis: str = ""
         ) -> Task | None:  # fmt: skip
    """One task of a family that this scene allows now, or None."""
    things = [t.name for t in scene.things if t.kind in sc.GRASPABLE and t.name not in avoid]
    subjects = [n for n in things if axis != "pairs" or (kind_of(n), n.split()[0]) in held_out.PAIRS]
    goals = [t.name for t in scene.things if t.kind in ("bowl", "tray")]
    if family == "drawer":
        return Task("open" if scene.drawer_opening < 0.05 else "close", "drawer")
    if not subjects:
        return None
    thing = _pick(rng, subjects)
    if family == "pick-and-place":
        if scene.drawer_opening >= OPEN and rng.random() < 0.25:
            return Task("place", thing, "drawer")
        return Task("place", thing, _pick(rng, goals)) if goals and rng.random() < 0.6 else Task("pick", thing)
    references = [n for n in things if n != thing] + goals
    if not references:
        return None
    if rng.random() < 0.25 and len(things) > 1:
        return Task("place", thing, _pick(rng, [n for n in things if n != thing]))
    task = Task("place", thing, _pick(rng, references), _pick(rng, list(RELATIONS)))
    return task if free(task, scene) else None


def two_steps(scene: Scene, rng: np.random.Generator, axis: str = "") -> Task | None:
    """Two things to do one after the other, the second possible once the first is done."""
    opened = scene.drawer_opening >= OPEN
    shut = scene.drawer_opening < 0.02
    draw = rng.random()

    def place(avoid: tuple[str, ...] = (), drawer: bool = False) -> Task | None:
        if drawer:
            subject = step("pick-and-place", scene, rng, avoid, axis)
            return subject and Task("place", subject.thing, "drawer")
        if rng.random() < 0.25:
            return step("rearrangement", scene, rng, avoid, axis)
        for _ in range(8):
            task = step("pick-and-place", scene, rng, avoid, axis)
            if task is not None and task.goal in ("bowl", "tray"):
                return task
        return None

    drawer = Task("close", "drawer") if not shut else Task("open", "drawer")
    if shut and draw < 0.40:
        first, second = drawer, place(drawer=True)
    elif opened and draw < 0.30:
        first, second = place(drawer=True), drawer
    elif draw < 0.65:
        first, second = place(), drawer
    elif draw < 0.75:
        first, second = drawer, step("pick-and-place", scene, rng, axis=axis)
    else:
        first = place()
        used = (first.thing,) if first else ()
        second = place(avoid=used) if rng.random() < 0.75 else step("pick-and-place", scene, rng, used, axis)
    if first is None or second is None or first.thing == second.goal:
        return None
    if first.goal and first.goal == second.goal and first.relation == second.relation:  # no room for two
        return None
    if second.goal == "drawer" and first.verb == "close":
        return None
    return Task(first.verb, first.thing, first.goal, first.relation, second)


def draw(family: str, seed: int, axis: str = "", demo: float = 0.0) -> tuple[Scene, Task, str]:
    """The scene, task and sentence of one episode; all follow from the seed.

    ``axis``: "" or one of held_out.AXES. ``demo``: the share of scenes that look like the one ./run starts with.
    """
    if family not in FAMILIES:
        raise ValueError(f"no task family {family!r}; there are {', '.join(FAMILIES)}")
    rng = np.random.default_rng([seed, 41, FAMILIES.index(family)])
    for _ in range(TRIES):
        inner = int(rng.integers(2**31))
        scene = Scene.demo(inner) if rng.random() < demo and axis != "pairs" else Scene.random(inner, axis)
        if family in ("drawer", "multi-step") or rng.random() < 0.2:
            choice = rng.random()
            scene.drawer_opening = 0.0 if choice < 0.5 else float(rng.uniform(OPEN, 0.97 * sc.DRAWER_TRAVEL))
        task = two_steps(scene, rng, axis) if family == "multi-step" else step(family, scene, rng, axis=axis)
        if task is not None:
            return scene, task, language.phrase(task, rng, held_out=axis == "phrasings")
    raise ValueError(f"seed {seed}: no scene for {family} in {TRIES} tries")

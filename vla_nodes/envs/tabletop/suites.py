"""Seeded scenes with a task each, by family: what training draws from, and what evaluation measures on."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from vla_nodes.envs.base import Group, Suites
from vla_nodes.envs.tabletop import held_out, instructions
from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.tasks import FAMILIES, NOTHING, RELATIONS, Task, destination, kind_of, related

TRIES = 200  # scenes looked at before a family is given up for a seed
OPEN = 0.13  # m of drawer travel from which something can be put inside
STEP_LIMIT = 25.0  # s of simulated time for each step of an instruction
IDLE_LIMIT = 20.0  # s for which a robot must leave everything alone when there is nothing it could do
GIVEN_UP = 8.0  # s without an action after which an episode is over: the policy has said why it holds
# An axis means nothing for a family whose instruction cannot show it: a drawer has no colour and stands where it is.
HELD_OUT = {
    axis: tuple(f"{family}/{axis}" for family in FAMILIES if family != "drawer" or axis in ("phrasings", "camera"))
    for axis in held_out.AXES
}
DRAWN = (*FAMILIES, "stacking")  # the last is the part of rearrangement that asks for the most exact hand
IDLE = ("absent", "nonsense")  # something named is not there, or it is nothing this robot can do: nothing may move
HELD_OUT_NAMES = tuple(name for names in HELD_OUT.values() for name in names)
SUITES = (*DRAWN, *HELD_OUT_NAMES, *IDLE, "demo", "random")
LAYOUT = Suites(
    names=SUITES,
    groups={
        "all": Group(FAMILIES, title="all families"),
        **{axis: Group(names, title=f"held-out {axis}", baseline="all") for axis, names in HELD_OUT.items()},
        "held-out": Group(HELD_OUT_NAMES),
        "full": Group((*FAMILIES, *HELD_OUT_NAMES, *IDLE)),
    },
    default="all",
    mixed=("demo", "random"),
    idle=IDLE,
    varied="random",
    about=f"""a task family ({", ".join(FAMILIES)}; stacking is the hardest part of rearrangement), all of
them, a held-out axis ({", ".join(HELD_OUT)}) or one family on it (rearrangement/pairs), held-out (every axis), absent
(something named is not there: nothing may be touched), nonsense (nothing this robot can do: likewise), demo (the scene
of ./run), random, full (all of these but stacking, demo and random)""",
)


def free(task: Task, scene: Scene) -> bool:
    """Whether a relation is not there already, nothing stands where it would be, and a hand reaches there."""
    goal, thing = scene.find(task.reference), scene.find(task.target)
    assert goal is not None and thing is not None
    if related(task, np.array([thing.x - goal.x, thing.y - goal.y])):
        return False
    x, y, _ = destination(task, np.array([goal.x, goal.y, 0.0]))
    others = [o for o in scene.things if o.name not in (task.target, task.reference)]
    clear = all(np.hypot(x - o.x, y - o.y) > sc.CLEARANCE[thing.kind] + sc.CLEARANCE[o.kind] - 0.01 for o in others)
    return clear and sc.reachable(x, y, 0.03)


def _pick(rng: np.random.Generator, options: list) -> Any:
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
    if not references or (family == "stacking" and len(things) < 2):
        return None
    if (family == "stacking" or rng.random() < 0.25) and len(things) > 1:
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
            return subject and Task("place", subject.target, "drawer")
        if rng.random() < 0.25:
            return step("rearrangement", scene, rng, avoid, axis)
        for _ in range(8):
            task = step("pick-and-place", scene, rng, avoid, axis)
            if task is not None and task.reference in ("bowl", "tray"):
                return task
        return None

    first: Task | None
    second: Task | None
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
        used = (first.target,) if first else ()
        second = place(avoid=used) if rng.random() < 0.75 else step("pick-and-place", scene, rng, used, axis)
    if first is None or second is None or first.target == second.reference:
        return None
    if first.reference and first.reference == second.reference and first.relation == second.relation:  # no room for two
        return None
    task = replace(first, then=second)
    return None if obstacle(task, scene) else task


def obstacle(task: Task, scene: Scene) -> str:
    """Why this scene does not allow a task, in one line, or ""; every step as the ones before it leave the table."""
    if gone := task.missing(scene):
        return f"there is no {gone} in this scene"
    now = replace(scene, things=[replace(thing) for thing in scene.things])
    placed: list[Task] = []
    for step in task.steps:
        if step.target == "drawer":
            now.drawer_opening = sc.DRAWER_TRAVEL if step.verb == "open" else 0.0
            continue
        if any(step.target in (done.target, done.reference) for done in placed):
            return f"moving the {step.target} would undo what the step before it did"
        if step.verb == "pick":
            continue
        if step.reference == step.target:
            return f"the {step.target} cannot be put in relation to itself"
        if step.reference == "drawer" and now.drawer_opening < OPEN:
            return "the drawer is shut"
        thing, goal = now.find(step.target), now.find(step.reference)
        assert thing is not None
        if step.relation and not free(step, now):
            assert goal is not None
            where = {"beside": "next to", "front": "in front of", "behind": "behind"}.get(
                step.relation, f"{step.relation} of"
            )
            there = related(step, np.array([thing.x - goal.x, thing.y - goal.y]))
            return (f"the {step.target} is {where} the {step.reference} already" if there
                    else f"there is no free place in reach {where} the {step.reference}")  # fmt: skip
        at = (sc.CABINET_POSITION[0], sc.CABINET_POSITION[1], 0.0) if goal is None else (goal.x, goal.y, 0.0)
        thing.x, thing.y, _ = (float(v) for v in destination(step, np.array(at)))
        placed.append(step)
    return ""


def draw(family: str, seed: int, axis: str = "", demo: float = 0.0) -> tuple[Scene, Task, str]:
    """The scene, task and sentence of one episode; all follow from the seed.

    ``axis``: "" or one of held_out.AXES. ``demo``: the share of scenes that look like the one ./run starts with.
    """
    if family not in DRAWN:
        raise ValueError(f"no task family {family!r}; there are {', '.join(DRAWN)}")
    rng = np.random.default_rng([seed, 41, DRAWN.index(family)])
    for _ in range(TRIES):
        inner = int(rng.integers(2**31))
        scene = Scene.demo(inner) if rng.random() < demo and axis != "pairs" else Scene.random(inner, axis)
        if family in ("drawer", "multi-step") or rng.random() < 0.2:
            choice = rng.random()
            scene.drawer_opening = 0.0 if choice < 0.5 else float(rng.uniform(OPEN, 0.97 * sc.DRAWER_TRAVEL))
        task = two_steps(scene, rng, axis) if family == "multi-step" else step(family, scene, rng, axis=axis)
        if task is not None and (axis != "synonyms" or any(n.split()[0] in held_out.SYNONYMS for n in task.names)):
            return scene, task, instructions.phrase(task, rng, axis)
    raise ValueError(f"seed {seed}: no scene for {family} in {TRIES} tries")


def draw_task(scene: Scene, seed: int) -> tuple[Scene, Task, str]:
    """Any task that a scene allows, and a sentence for it; the families take turns by seed."""
    rng = np.random.default_rng([seed, 47])
    for attempt in range(4 * TRIES):
        family = FAMILIES[(seed + attempt // TRIES) % len(FAMILIES)]
        task = two_steps(scene, rng) if family == "multi-step" else step(family, scene, rng)
        if task is not None:
            return scene, task, instructions.phrase(task, rng)
    raise ValueError("no task for a scene that has a drawer: this cannot be")


def draw_absent(seed: int) -> tuple[Scene, Task, str]:
    """A scene, and a sentence of which one thing it names has been taken off the table."""
    families = [family for family in FAMILIES if family != "drawer"]
    for attempt in range(TRIES):
        scene, task, text = draw(families[seed % len(families)], seed + attempt * 1_000_003)
        rng = np.random.default_rng([seed, 43, attempt])
        gone = _pick(rng, [name for name in task.names if name != "drawer"])
        scene.things = [thing for thing in scene.things if thing.name != gone]
        if any(thing.kind in sc.GRASPABLE for thing in scene.things):
            return scene, task, text
    raise ValueError(f"seed {seed}: no scene with something left on the table in {TRIES} tries")


def draw_nonsense(seed: int) -> tuple[Scene, Task, str]:
    """Any scene, and a sentence that asks for nothing this robot can do, most often about something in it."""
    rng = np.random.default_rng([seed, 53])
    scene = Scene.random(int(rng.integers(2**31)))
    things = tuple(thing.name for thing in scene.things if thing.kind in sc.GRASPABLE)
    return scene, NOTHING, instructions.unrelated(rng, things, noise=False)


def idle(task: Task, scene: Scene) -> bool:
    """Whether success is that the robot leaves everything alone."""
    return task == NOTHING or bool(task.missing(scene))


def episode(suite: str, seed: int, instruction: str | None = None) -> tuple[Scene, Task, str]:
    """The scene, task and sentence of one episode of a suite, one of SUITES; all follow from the seed.

    With an ``instruction`` the scene is the demo scene of that seed. ValueError for what cannot be done there.
    """
    if instruction:
        scene, task = Scene.demo(seed), instructions.parse(instruction)
        problem = obstacle(task, scene) if task else "no task known for it"
        if task is None or problem:
            raise ValueError(f"{instruction!r} with seed {seed}: {problem}")
        return scene, task, instruction
    if suite in IDLE:
        return draw_absent(seed) if suite == "absent" else draw_nonsense(seed)
    if suite in ("demo", "random"):
        return draw_task(Scene.demo(seed) if suite == "demo" else Scene.random(seed), seed)
    family, _, axis = suite.partition("/")
    return draw(family, seed, axis)


def feasible_seeds(instruction: str | None, first: int, episodes: int) -> list[int]:
    """Seeds from ``first`` on whose demo scene allows an instruction; plain consecutive ones if there are too few."""
    consecutive = list(range(first, first + episodes))
    task = instructions.parse(instruction) if instruction else None
    if task is None or task.missing(Scene.demo(first)):
        return consecutive
    near = (seed for seed in range(first, first + 20 * episodes + 30) if not obstacle(task, Scene.demo(seed)))
    found = list(islice(near, episodes))
    return found if len(found) == episodes else consecutive


def time_limit(task: Task | None) -> float:
    """s of simulated time that a task may take."""
    return STEP_LIMIT * (1 if task is None else len(list(task.steps)))

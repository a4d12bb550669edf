"""Tasks, and the success checker that reads the simulator's own state. Neither is ever seen by a policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.envs.tabletop.world import World

LIFTED = 0.08  # m above its resting height counts as picked up
HOLD_SECONDS = 1.0  # a success must last this long
OPEN_ENOUGH, SHUT = 0.75 * sc.DRAWER_TRAVEL, 0.01  # m of drawer travel
FAMILIES = ("pick-and-place", "drawer", "rearrangement", "multi-step")
# Directions as the robot sees them from its base (REP 103): left is +y, and in front is on the robot's side, -x.
DIRECTIONS = {"left": (0.0, 1.0), "right": (0.0, -1.0), "front": (-1.0, 0.0), "behind": (1.0, 0.0)}
RELATIONS = (*DIRECTIONS, "beside")
# Distance of the middles when something is put next to something, m along x and y.
APART = {"block": (0.10, 0.10), "can": (0.10, 0.10), "bowl": (0.14, 0.145), "tray": (0.14, 0.16)}
DROP = {"bowl": 0.05, "tray": 0.05, "drawer": 0.06}  # height of a thing's middle when it is let go, m over the table
DRAWER_MIDDLE = 0.10  # m behind the handle
NEARBY = 0.06  # m more than APART that still counts as next to


@dataclass(frozen=True)
class Task:
    """What an instruction asks for: a verb, the object it is done to and, for placing, where; and what comes after.

    verb: pick, place, open, close. target: a name such as "red block", or "drawer". reference: "" or the name of what
    the target goes to; relation to it: "" (into or onto it), left, right, front, behind, beside.
    """

    verb: str
    target: str
    reference: str = ""
    relation: str = ""
    then: Task | None = None

    @classmethod
    def from_dict(cls, values: dict) -> Task:
        """The inverse of dataclasses.asdict."""
        then = values.get("then")
        return cls(**{**values, "then": cls.from_dict(then) if then else None})

    @property
    def steps(self) -> Iterator[Task]:
        """This step and those after it."""
        task: Task | None = self
        while task is not None:
            yield task
            task = task.then

    @property
    def family(self) -> str:
        if self.then is not None:
            return "multi-step"
        if self.target == "drawer":
            return "drawer"
        stacked = self.reference.rpartition(" ")[2] in sc.GRASPABLE
        return "rearrangement" if self.relation or stacked else "pick-and-place"

    @property
    def names(self) -> tuple[str, ...]:
        """All it mentions, in order."""
        return tuple(dict.fromkeys(n for step in self.steps for n in (step.target, step.reference) if n))

    def missing(self, scene: sc.Scene) -> str:
        """The first thing the task names that the scene does not hold, or ""."""
        return next((n for n in self.names if n != "drawer" and scene.find(n) is None), "")

    def success(self, world: World) -> bool:
        """This step is done now (not those after it); the caller asks for it to last HOLD_SECONDS."""
        if self.verb == "open":
            return world.drawer_opening() > OPEN_ENOUGH
        if self.verb == "close":
            return world.drawer_opening() < SHUT
        if self.verb == "pick":
            return world.position(self.target)[2] > LIFTED and world.touched_by_fingers(self.target) == 2
        return placed(world, self) and world.touched_by_fingers(self.target) == 0

    def progress(self, world: World) -> str:
        """One line of truth for a person."""
        return "; ".join(step._progress(world) for step in self.steps)

    def _progress(self, world: World) -> str:
        if self.target == "drawer":
            return f"drawer open {100 * world.drawer_opening():.1f} cm"
        height = 100 * world.position(self.target)[2]
        held = world.touched_by_fingers(self.target) == 2
        where = ""
        if self.reference and placed(world, self):
            where = f", {self.relation or 'in or on'} the {self.reference}" if self.family == "rearrangement" else (
                f", in the {self.reference}")  # fmt: skip
        return f"{self.target} {'held ' if held else ''}at {height:.1f} cm{where}"


NOTHING = Task("", "")  # what a sentence asks for that this robot cannot do: nothing may be touched


def kind_of(name: str) -> str:
    return name.rpartition(" ")[2]


def place_of(world: World, name: str) -> np.ndarray:
    """(3,) m in base: the origin of a thing, or the middle of the drawer's handle."""
    return world.handle_position() if name == "drawer" else world.position(name)


def destination(task: Task, goal: np.ndarray) -> np.ndarray:
    """(3,) m in base where the thing's middle is let go, for a goal standing at ``goal`` (3,) (see place_of)."""
    kind, half = kind_of(task.reference), sc.HALF_HEIGHT[kind_of(task.target)]
    if task.relation:
        direction = DIRECTIONS[side_of(task, goal)]
        offset = np.multiply(APART[kind], direction)
        return np.array([goal[0] + offset[0], goal[1] + offset[1], half + 0.004])
    if kind in sc.HALF_HEIGHT:
        return np.array([goal[0], goal[1], goal[2] + sc.HALF_HEIGHT[kind] + half + 0.003])
    return np.array([goal[0] + (DRAWER_MIDDLE if kind == "drawer" else 0.0), goal[1], DROP[kind]])


def side_of(task: Task, goal: np.ndarray) -> str:
    """The direction of a relation; "beside" means the side with more table, left of things on the right."""
    middle = (sc.REGION_Y[0] + sc.REGION_Y[1]) / 2
    return ("right" if goal[1] > middle else "left") if task.relation == "beside" else task.relation


def placed(world: World, task: Task) -> bool:
    """Whether a place task's thing is where it should be, resting there, whoever holds it."""
    thing, kind = world.position(task.target), kind_of(task.reference)
    if not task.relation and kind not in sc.GRASPABLE:
        return contains(world, task.reference, task.target)
    offset = thing - world.position(task.reference)
    if not task.relation:  # stacked
        rise = sc.HALF_HEIGHT[kind] + sc.HALF_HEIGHT[kind_of(task.target)]
        return bool(np.hypot(*offset[:2]) < 0.028 and abs(offset[2] - rise) < 0.008)
    return bool(thing[2] < sc.HALF_HEIGHT[kind_of(task.target)] + 0.012 and related(task, offset))


def related(task: Task, offset: np.ndarray) -> bool:
    """Whether a thing ``offset`` (2 or 3,) m away from the goal stands in the task's relation to it."""
    distance, reach = float(np.hypot(*offset[:2])), max(APART[kind_of(task.reference)]) + NEARBY
    if task.relation == "beside":
        return distance < reach
    along = float(offset[:2] @ DIRECTIONS[task.relation])
    across = float(np.linalg.norm(offset[:2] - along * np.asarray(DIRECTIONS[task.relation])))
    return distance < 1.6 * reach and along > 0.03 and across < along  # within 45 degrees of the direction


def contains(world: World, container: str, thing: str) -> bool:
    """Whether an object rests inside the bowl or the drawer or on the tray (position in the container's own frame)."""
    if container == "drawer":
        x, y, z = world.position(thing) - world.handle_position()
        return bool(0.02 < x < 0.21 and abs(y) < 0.10 and z < 0.0)
    offset = world.rotation(container).T @ (world.position(thing) - world.position(container))
    upright = world.rotation(container)[2, 2] > 0.9
    if container == "bowl":
        inside = np.hypot(*offset[:2]) < sc.BOWL_RADIUS - 0.012 and 0.0 < offset[2] < sc.BOWL_HEIGHT + 0.015
    else:
        inside = (
            abs(offset[0]) < sc.TRAY_SIZE[0] / 2 and abs(offset[1]) < sc.TRAY_SIZE[1] / 2 and 0.0 < offset[2] < 0.06
        )
    return bool(upright and inside)


class SuccessChecker:
    """Turns instant success into success that lasted; one per instruction. Call ``update`` several times a second.

    Steps count in their order: one that comes true before its turn must be undone and done again. At the end the last
    must last while what the placing steps placed is still in its place.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.steps = list(task.steps)
        self.reached = 0  # steps that have come true
        self.early: set[int] = set()  # steps that came true before their turn and still are
        self._before: list[bool] | None = None
        self._since: float | None = None
        self.succeeded = False

    def update(self, world: World) -> bool:
        now = [step.success(world) for step in self.steps]
        self._in_order(now)
        while self.reached < len(self.steps) - 1 and now[self.reached] and self.reached not in self.early:
            self.reached += 1
        last = self.reached == len(self.steps) - 1 and self.reached not in self.early
        kept = all(done for step, done in zip(self.steps[:-1], now, strict=False) if step.verb == "place")
        if not (last and kept and now[-1]):
            self._since = None
        elif self._since is None:
            self._since = world.time
        elif world.time - self._since >= HOLD_SECONDS:
            self.succeeded = True
        return self.succeeded

    def _in_order(self, now: list[bool]) -> None:
        """Keep ``early``. A step about what an earlier one moves may come true by that one's doing: it is not meant."""
        before = now if self._before is None else self._before
        moved: set[str] = set()
        for index, step in enumerate(self.steps):
            if not now[index]:
                self.early.discard(index)
            elif index > self.reached and not before[index] and not {step.target, step.reference} & moved:
                self.early.add(index)
            moved.add(step.target)
        self._before = now

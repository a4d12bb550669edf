"""Tasks, and the judge that reads the simulator's own state. Neither is ever seen by a policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_nodes.sim import scene as sc
from vla_nodes.sim.world import World

LIFTED = 0.08  # m above its resting height counts as picked up
HOLD_SECONDS = 1.0  # a success must last this long


@dataclass(frozen=True)
class Task:
    """What an instruction asks for: a verb, the object it is done to and, for placing, where.

    verb: pick, place, open, close. thing: a name such as "red block", or "drawer". goal: "bowl", "tray" or "".
    """

    verb: str
    thing: str
    goal: str = ""

    @property
    def family(self) -> str:
        return "drawer" if self.thing == "drawer" else "pick-and-place"

    def missing(self, scene: sc.Scene) -> str:
        """The first thing the task names that the scene does not hold, or ""."""
        for name in (self.thing, self.goal):
            if name and name != "drawer" and scene.find(name) is None:
                return name
        return ""

    def success(self, world: World) -> bool:
        """True now; the caller asks for it to last HOLD_SECONDS."""
        if self.verb == "open":
            return world.drawer_opening() > 0.75 * sc.DRAWER_TRAVEL
        if self.verb == "close":
            return world.drawer_opening() < 0.01
        if self.verb == "pick":
            return world.position(self.thing)[2] > LIFTED and world.touched_by_fingers(self.thing) == 2
        return contains(world, self.goal, self.thing) and world.touched_by_fingers(self.thing) == 0

    def progress(self, world: World) -> str:
        """One line of truth for a person."""
        if self.thing == "drawer":
            return f"drawer open {100 * world.drawer_opening():.1f} cm"
        height = 100 * world.position(self.thing)[2]
        held = world.touched_by_fingers(self.thing) == 2
        where = f", in the {self.goal}" if self.goal and contains(world, self.goal, self.thing) else ""
        return f"{self.thing} {'held ' if held else ''}at {height:.1f} cm{where}"


def contains(world: World, container: str, thing: str) -> bool:
    """Whether an object rests inside the bowl or on the tray (position in the container's own frame)."""
    offset = world.rotation(container).T @ (world.position(thing) - world.position(container))
    upright = world.rotation(container)[2, 2] > 0.9
    if container == "bowl":
        inside = np.hypot(*offset[:2]) < sc.BOWL_RADIUS - 0.012 and 0.0 < offset[2] < sc.BOWL_HEIGHT + 0.015
    else:
        inside = (
            abs(offset[0]) < sc.TRAY_SIZE[0] / 2 and abs(offset[1]) < sc.TRAY_SIZE[1] / 2 and 0.0 < offset[2] < 0.06
        )
    return bool(upright and inside)


class Judge:
    """Turns instant success into success that lasted; one per instruction."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._since: float | None = None
        self.succeeded = False

    def update(self, world: World) -> bool:
        if not self.task.success(world):
            self._since = None
        elif self._since is None:
            self._since = world.time
        elif world.time - self._since >= HOLD_SECONDS:
            self.succeeded = True
        return self.succeeded

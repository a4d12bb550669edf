"""Pictures of static scenes for stage 1, and the labels of any picture of this world: what stands where."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.envs.tabletop.camera import Camera
from vla_nodes.envs.tabletop.rollout import Rollout
from vla_nodes.envs.tabletop.tasks import Task, destination, kind_of, place_of
from vla_nodes.envs.tabletop.world import World

PICTURES = 6  # of one scene, all different


def names_of(scene: sc.Scene) -> list[str]:
    """What can be referred to, in the order of the labels."""
    return [thing.name for thing in scene.things] + ["drawer"]


def header(scene: sc.Scene) -> dict[str, Any]:
    """What a recorded episode says about its scene."""
    return {"things": names_of(scene), "scene": scene.to_json()}


def owners(world: World) -> np.ndarray:
    """(geoms + 1,) uint8: for each geom id the index + 1 of the thing it belongs to, 0 for none (also of id -1)."""
    names = names_of(world.scene)
    table = np.zeros(world.model.ngeom + 1, np.uint8)  # the last entry answers for id -1
    for index, name in enumerate(names[:-1]):
        table[:-1][world.model.geom_bodyid == world.model.body(name).id] = index + 1
    table[world.model.geom("drawer handle").id] = len(names)
    return table


def labels(world: World, camera: Camera, cells: int) -> dict[str, np.ndarray]:
    """segmentation (cells, cells) uint8 index + 1 of what stands there, thing_positions (n, 3) m, drawer_opening m."""
    positions = [world.position(name) for name in names_of(world.scene)[:-1]] + [world.handle_position()]
    return {
        "segmentation": owners(world)[camera.segmentation(cells, cells)],
        "thing_positions": np.array(positions, np.float32),
        "drawer_opening": np.asarray(world.drawer_opening()),
    }


def draw(seed: int, unusual: float) -> tuple[sc.Scene, np.random.Generator]:
    """Scene ``seed``, in the given share of seeds with unusual objects, and the generator of its pictures."""
    rng = np.random.default_rng([seed, 7])
    scene = sc.Scene.random(seed) if rng.random() < 0.75 else sc.Scene.demo(seed)
    inner = np.random.default_rng([seed, 8])
    if inner.random() < unusual:
        scene.things = sc.strange(scene.things, inner)
    return scene, rng


def put(world: World, name: str, position: np.ndarray, yaw: float) -> None:
    """Set-up only: a thing is at once somewhere else (position (3,) of its middle, m)."""
    address = world.model.joint(name).qposadr[0]
    world.data.qpos[address : address + 7] = [*position, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]


def shuffle(world: World, rollout: Rollout, rng: np.random.Generator) -> None:
    """A new arrangement: the arm anywhere, the drawer anyhow, things about the table, in the hand or in a container."""
    scene = world.scene
    world.data.qpos[world.model.joint("drawer").qposadr[0]] = (
        0.0 if rng.random() < 0.5 else rng.uniform(0.01, sc.DRAWER_TRAVEL)
    )
    things = sc.rearranged(scene, rng)
    for thing in things:
        put(world, thing.name, np.array([thing.x, thing.y, sc.HALF_HEIGHT.get(thing.kind, 0.0)]), thing.yaw)
    tool = rng.uniform([0.32, -0.28, 0.03], [0.64, 0.27, 0.40])
    objects = [t for t in things if t.kind in sc.GRASPABLE]
    if objects and rng.random() < 0.4:  # the hand over something
        near = objects[rng.integers(len(objects))]
        tool = np.array([near.x, near.y, 0.02]) + np.abs(rng.normal(0, [0.01, 0.01, 0.06])) * rng.choice([-1, 1, 1], 3)
        tool[2] = max(tool[2], 0.02)
    rollout.place(tool, float(rng.choice([1.0, rng.random()])))
    goals = [t.name for t in things if t.kind in ("bowl", "tray")] + ["drawer"]
    for thing in rng.permutation(np.array([t.name for t in objects])) if objects else []:
        draw, name = rng.random(), str(thing)
        if draw < 0.12 and world.opening() > 0.3:
            put(world, name, world.tool_pose()[:3, 3] + rng.normal(0, 0.003, 3), rng.uniform(-0.1, 0.1))
        elif draw < 0.30:
            goal = str(rng.choice(goals + [o.name for o in objects if o.name != name][:1]))
            mujoco.mj_kinematics(world.model, world.data)
            spot = destination(Task("place", name, goal), place_of(world, goal))
            fallen = 0.02 if kind_of(goal) in ("bowl", "tray", "drawer") else 0.0
            put(world, name, spot - [*rng.normal(0, 0.01, 2), fallen], rng.uniform(-0.6, 0.6))
    mujoco.mj_forward(world.model, world.data)

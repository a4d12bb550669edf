"""Still scenes for stage 1: nothing moves, everything is somewhere else in every picture, and all of it is labelled.

A still costs a hundredth of a demonstration, and grounding needs many scenes rather than many moments of one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import mujoco
import numpy as np
from tqdm import tqdm

from vla_nodes.datasets.episode import EpisodeWriter
from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.envs.tabletop.camera import Camera
from vla_nodes.envs.tabletop.rollout import Rollout
from vla_nodes.envs.tabletop.tasks import Task, destination, kind_of, place_of
from vla_nodes.envs.tabletop.world import World
from vla_nodes.evaluation.collect import CELLS, IMAGE, label_table

PICTURES = 6  # of one scene, all different


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


def still_one(job: tuple[int, Path, float]) -> None:
    """PICTURES stills of scene ``seed``, in one episode file; in the given share of scenes with strange things."""
    seed, path, share = job
    rng = np.random.default_rng([seed, 7])
    scene = sc.Scene.random(seed) if rng.random() < 0.75 else sc.Scene.demo(seed)
    inner = np.random.default_rng([seed, 8])
    if inner.random() < share:
        scene.things = sc.strange(scene.things, inner)
    world = World(scene)
    rollout, camera, writer = Rollout(world), Camera(world, IMAGE, IMAGE), EpisodeWriter()
    names, table = label_table(world)
    try:
        for picture in range(PICTURES):
            shuffle(world, rollout, rng)
            image = camera.render()
            places = [world.position(n) for n in names[:-1]] + [world.handle_position()]
            writer.add(
                image.color,
                image.depth,
                stamp=float(picture),
                ee_pose=world.tool_pose(),
                segmentation=table[camera.segmentation(CELLS, CELLS)],
                thing_positions=np.array(places, np.float32),
                drawer_opening=world.drawer_opening(),
            )
    finally:
        camera.close()
    writer.write(path, {"things": names, "intrinsics": camera.intrinsics.tolist(), "camera_pose": camera.pose.tolist(),
                        "seed": seed, "source": "still scenes in simulation", "scene": scene.to_json()})  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_nodes stills", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures; existing ones are kept")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=500_000, help="seed of the first scene (default %(default)s)")
    parser.add_argument(
        "--strange",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="of scenes with unnamed colours and with shapes nobody asks for (default %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args(argv)
    seeds = range(args.seed, args.seed + args.scenes)
    jobs = [(seed, args.out / f"{seed:07d}.safetensors", args.strange) for seed in seeds]
    jobs = [job for job in jobs if not job[1].exists()]
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for _ in tqdm(pool.imap_unordered(still_one, jobs), total=len(jobs), unit="scene"):
            pass
    rate = len(jobs) * PICTURES / max(time.monotonic() - started, 1e-9)
    print(f"{len(jobs)} scenes of {PICTURES} pictures, {rate:.1f} pictures a second, in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

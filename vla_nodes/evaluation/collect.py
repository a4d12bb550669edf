"""Demonstrations: the scripted expert in random scenes, disturbed on purpose, recorded with what the camera saw.

Every episode is made from its seed alone, so a folder can be filled by several processes, stopped and resumed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vla_nodes.datasets.episode import EpisodeWriter
from vla_nodes.envs.tabletop import suites
from vla_nodes.envs.tabletop.camera import Camera
from vla_nodes.envs.tabletop.expert import PRIMITIVES, Expert
from vla_nodes.envs.tabletop.rollout import Rollout
from vla_nodes.envs.tabletop.tasks import Judge
from vla_nodes.envs.tabletop.world import World
from vla_nodes.policy.runtime import PolicyRuntime

HORIZON, PERIOD, TICK = 16, 0.05, 0.10  # rows of a chunk, s between them, s between observations
IMAGE, CELLS = 224, 56  # camera image and label resolution
TIME_LIMIT, AFTERWARDS = 20.0, 1.3  # s to succeed in a step, s recorded after success so that rest is learnt too
SHARES = {"pick-and-place": 0.26, "drawer": 0.12, "rearrangement": 0.24, "multi-step": 0.26, "stacking": 0.12}
THROWN_AWAY = "thrown_away.jsonl"  # beside the episodes: seeds that failed, so that they are not tried again
DEMO = 0.3  # share of scenes like the one ./run starts with


class Disturbance:
    """Pushes on what is executed, never on the recorded label: the data then holds mistakes and their mending."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.level = rng.choice([0.0, 0.5, 1.0], p=[0.25, 0.4, 0.35])
        self._until, self._push = 0.0, np.zeros(3)

    def __call__(self, chunk: np.ndarray, now: float) -> np.ndarray:
        """chunk (H, 7) as planned at ``now`` s; returns the one to execute."""
        disturbed = chunk.copy()
        if now > self._until:
            self._push = np.zeros(3)
            if self.rng.random() < 0.07 * self.level:
                self._until = now + self.rng.uniform(0.2, 0.7)
                self._push = self.rng.normal(0, 0.10, 3) * [1, 1, 0.7]
        disturbed[:, :3] += self._push * PERIOD + self.rng.normal(0, 0.012, 3) * PERIOD * self.level
        if self.rng.random() < 0.004 * self.level:
            disturbed[:, 6] = 1.0 - disturbed[:, 6]
        return disturbed


def label_table(world: World) -> tuple[list[str], np.ndarray]:
    """Names of what can be referred to, and for each geom id the index + 1 of the thing it belongs to (0 = none)."""
    names = [t.name for t in world.scene.things] + ["drawer"]
    table = np.zeros(world.model.ngeom + 1, np.uint8)  # the last entry answers for id -1
    for index, name in enumerate(names[:-1]):
        table[:-1][world.model.geom_bodyid == world.model.body(name).id] = index + 1
    table[world.model.geom("drawer handle").id] = len(names)
    return names, table


def collect_one(seed: int, path: Path, policy: Path | None = None, only: str | None = None) -> str:
    """Make episode ``seed``, of the task family ``only`` if given; returns "" or why it was thrown away.

    With a ``policy`` checkpoint the policy drives for most of the episode while the expert only says what it would do
    (DAgger, Ross et al., arXiv 1011.0686): the data then holds the states the policy's own mistakes lead to.
    """
    rng = np.random.default_rng(seed)
    family = only or rng.choice(list(SHARES), p=list(SHARES.values()))
    scene, task, text = suites.draw(str(family), seed, demo=DEMO)
    limit = TIME_LIMIT * len(list(task.steps))
    world = World(scene)
    rollout = Rollout(world)
    if rng.random() < 0.45:
        start = rng.uniform([0.32, -0.22, 0.10], [0.60, 0.25, 0.40])
        rollout.place(start, opening=float(rng.choice([1.0, rng.random()])))
    camera = Camera(world, IMAGE, IMAGE)
    names, table = label_table(world)
    expert, judge, disturb, writer = Expert(task, scene), Judge(task), Disturbance(rng), EpisodeWriter()
    runtime = None
    if policy is not None:
        runtime = PolicyRuntime.load(policy, device="cpu")
        runtime.set_instruction(text)
    # After so many seconds the expert takes over, so that every episode also shows the way out.
    help_after = rng.uniform(4.0, 0.7 * limit)
    ended = None
    try:
        while world.time < limit and (ended is None or world.time - ended < AFTERWARDS):
            actions, primitive = expert.plan(world, rollout.velocity, HORIZON, PERIOD)
            image = camera.render()
            q, qd, _ = world.joint_state()
            step, finished = expert.step, expert.finished
            things = [world.position(n) for n in names[:-1]] + [world.handle_position()]
            writer.add(
                image.color,
                image.depth,
                stamp=world.time,
                joint_positions=q[:7],
                joint_velocities=qd[:7],
                gripper=world.opening(),
                ee_pose=world.tool_pose(),
                actions=actions.astype(np.float32),
                primitive=PRIMITIVES.index(primitive),
                segmentation=table[camera.segmentation(CELLS, CELLS)],
                thing_positions=np.array(things, np.float32),
                drawer_opening=world.drawer_opening(),
                step=step,
                done=finished,
            )
            executed = disturb(actions, world.time) if ended is None else actions
            if runtime is not None:
                chosen = runtime.step(rollout.observation(camera, image))
                if world.time < help_after and chosen.actions is not None:
                    executed = chosen.actions
            stamp, latency = world.time, round(rng.uniform(0.02, 0.09), 2)
            rollout.run(latency)
            rollout.submit(executed, stamp, PERIOD)
            rollout.run(TICK - latency)
            if judge.update(world) and ended is None:
                ended = world.time
        if not judge.succeeded:
            return f"seed {seed}: {task} failed ({task.progress(world)})"
        writer.write(
            path,
            {
                "instruction": text,
                "task": asdict(task),
                "things": names,
                "primitives": PRIMITIVES,
                "intrinsics": camera.intrinsics.tolist(),
                "camera_pose": camera.pose.tolist(),
                "period": PERIOD,
                "tick": TICK,
                "success": True,
                "seed": seed,
                "source": "scripted expert in simulation",
                "scene": scene.to_json(),
            },
        )
        return ""
    finally:
        camera.close()


Job = tuple[int, Path, Path | None, str | None]


def _job(job: Job) -> tuple[int, str]:
    return job[0], collect_one(*job)


def open_jobs(out: Path, seeds: range, policy: Path | None, only: str | None = None) -> tuple[list[Job], int]:
    """What is still to do of these seeds, and how many of them are known to fail (with or without a policy, as now)."""
    failed = set()
    for text in (out / THROWN_AWAY).read_text().splitlines() if (out / THROWN_AWAY).exists() else []:
        try:
            row = json.loads(text)
            failed |= {row["seed"]} if row["policy"] == bool(policy) else set()
        except (ValueError, LookupError, TypeError):
            continue  # a line cut off by a kill: that seed is tried again
    left = [(seed, out / f"{seed:07d}.safetensors", policy, only) for seed in seeds]
    left = [job for job in left if not job[1].exists()]
    return [job for job in left if job[0] not in failed], sum(job[0] in failed for job in left)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_nodes collect", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the episodes; existing ones are kept")
    parser.add_argument("--episodes", type=int, default=800)
    parser.add_argument("--seed", type=int, default=100_000, help="seed of the first episode (default %(default)s)")
    parser.add_argument("--policy", type=Path, help="checkpoint that drives while the expert only labels")
    parser.add_argument("--only", choices=list(SHARES), help="one task family; without it a mixture")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args(argv)
    jobs, noted = open_jobs(args.out, range(args.seed, args.seed + args.episodes), args.policy, args.only)
    if noted:
        print(f"{noted} seeds failed before and are left out; delete {args.out / THROWN_AWAY} to try them again")
    started, thrown = time.monotonic(), 0
    args.out.mkdir(parents=True, exist_ok=True)
    with (multiprocessing.get_context("spawn").Pool(args.workers) as pool, tqdm(total=len(jobs), unit="episode") as bar,
          open(args.out / THROWN_AWAY, "a") as failures):  # fmt: skip
        for seed, reason in pool.imap_unordered(_job, jobs):
            bar.update()
            bar.set_postfix_str(f"{60 * bar.n / max(time.monotonic() - started, 1e-9):.1f} a minute", refresh=False)
            if reason:
                thrown += 1
                tqdm.write(reason)
                failures.write(json.dumps({"seed": seed, "policy": bool(args.policy), "reason": reason}) + "\n")
                failures.flush()
    rate = len(jobs) / max(time.monotonic() - started, 1e-9) * 60
    print(f"{len(jobs) - thrown} episodes written, {thrown} failed and thrown away, {rate:.1f} a minute, in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

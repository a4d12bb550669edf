"""Closed-loop evaluation: the policy against the simulator's judge, through the nodes' own executor and controller."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vla_nodes.policy.runtime import PolicyRuntime
from vla_nodes.share import share_path
from vla_nodes.sim import language
from vla_nodes.sim.render import Camera
from vla_nodes.sim.scene import Scene
from vla_nodes.sim.tasks import Judge, Task
from vla_nodes.sim.world import World
from vla_nodes.train.rollout import STEP, Rollout

TICK, LATENCY = 0.10, 0.05  # s between observations; s from exposure to the chunk's arrival
TIME_LIMIT = 25.0
SHIPPED = "resource/checkpoints/nano"


@dataclass
class Result:
    seed: int
    family: str
    instruction: str
    success: bool
    seconds: float  # simulated
    reason: str  # "" or why it failed
    mean_jerk: float  # m/s^3 of the tool
    peak_jerk: float  # 99th percentile


@lru_cache(maxsize=1)
def _runtime(checkpoint: str) -> PolicyRuntime:
    return PolicyRuntime.load(Path(checkpoint), device="cpu", threads=1)


def run_episode(runtime: PolicyRuntime, scene: Scene, task: Task, text: str, time_limit: float = TIME_LIMIT,
                frames: list | None = None) -> Result:  # fmt: skip
    """One instruction from a fresh start to success, or to the time limit."""
    world = World(scene)
    rollout, camera, judge = Rollout(world), Camera(world), Judge(task)
    runtime.set_instruction(text)
    touched, lifted, tool, hold = False, False, [], ""
    try:
        while world.time < time_limit and not judge.succeeded:
            stamp, image = world.time, camera.render()
            if frames is not None:
                frames.append(image.color)
            output = runtime.step(rollout.observation(camera, image))
            hold = output.hold_reason
            for part, seconds in enumerate((LATENCY, TICK - LATENCY)):
                if part and output.actions is not None:
                    rollout.submit(output.actions, stamp, runtime.config.period, text)
                for _ in range(round(seconds / STEP)):
                    rollout.run(STEP)
                    tool.append(world.tool_pose()[:3, 3])
            body = "drawer" if task.thing == "drawer" else task.thing
            touched |= world.touched_by_fingers(body) > 0
            lifted |= task.verb in ("pick", "place") and world.position(task.thing)[2] > 0.06
            judge.update(world)
    finally:
        camera.close()
    reason = (
        ""
        if judge.succeeded
        else hold or ("dropped or misplaced" if lifted else "missed grasp" if touched else "never reached it")
    )
    jerk = np.linalg.norm(np.diff(np.array(tool), 3, axis=0), axis=1) / STEP**3
    return Result(
        scene.seed,
        task.family,
        text,
        judge.succeeded,
        world.time,
        reason,
        float(jerk.mean()),
        float(np.quantile(jerk, 0.99)),
    )


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927), fractions."""
    if count == 0:
        return 0.0, 1.0
    p = successes / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # Both ends are inside 0..1 but for rounding.
    return max(0.0, (middle - half) / (1 + z * z / count)), min(1.0, (middle + half) / (1 + z * z / count))


def episode_of(suite: str, seed: int, instruction: str | None) -> tuple[Scene, Task, str]:
    """The scene, task and sentence of one episode of a suite; all follow from the seed."""
    rng = np.random.default_rng([seed, 99])
    scene = Scene.demo(seed) if suite == "demo" or instruction else Scene.random(seed)
    if instruction:
        task = language.parse(instruction)
        if task is None or task.missing(scene):
            raise ValueError(f"{instruction!r} is no task in the demo scene; name one of its things")
        return scene, task, instruction
    objects = [t.name for t in scene.things if t.kind in ("block", "can")]
    goals = [t.name for t in scene.things if t.kind in ("bowl", "tray")]
    options = [Task("pick", str(rng.choice(objects)))] * 2
    options += [Task("place", str(rng.choice(objects)), goal) for goal in goals] * 2
    options += [Task("open" if scene.drawer_opening < 0.05 else "close", "drawer")]
    task = options[rng.integers(len(options))]
    return scene, task, language.phrase(task, rng, held_out=suite == "held-out phrases")


def _job(job: tuple[str, str, int, str | None]) -> Result:
    checkpoint, suite, seed, instruction = job
    return run_episode(_runtime(checkpoint), *episode_of(suite, seed, instruction))


def report(results: list[Result]) -> str:
    """A table a person can read, one row per family."""
    rows = ["family            success            95 % interval     mean time   jerk mean / p99 (m/s^3)"]
    for family in [*sorted({r.family for r in results}), "all"]:
        part = [r for r in results if family in ("all", r.family)]
        won = sum(r.success for r in part)
        low, high = wilson(won, len(part))
        seconds = np.mean([r.seconds for r in part if r.success]) if won else float("nan")
        rows.append(f"{family:16}  {won:3}/{len(part):<3} = {won / len(part):6.1%}   {low:6.1%} to {high:6.1%}   "
                    f"{seconds:6.1f} s   "
                    f"{np.mean([r.mean_jerk for r in part]):6.1f} / "
                    f"{np.mean([r.peak_jerk for r in part]):6.1f}")  # fmt: skip
    for r in results:
        if not r.success:
            rows.append(f'  failed: seed {r.seed}, "{r.instruction}": {r.reason}')
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_nodes eval", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help=f"checkpoint folder (default: the shipped {SHIPPED})")
    parser.add_argument("--suite", choices=("demo", "random", "held-out phrases"), default="random",
                        help="demo: the scene of ./run; random: training's distribution, unseen seeds")
    parser.add_argument("--instruction", help="the same sentence in every demo scene instead of a suite's own")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first episode (training uses 100000 and up)")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--json", type=Path, help="also write every episode's result here")
    args = parser.parse_args(argv)
    checkpoint = str(args.checkpoint or share_path(SHIPPED))
    jobs = [(checkpoint, args.suite, seed, args.instruction) for seed in range(args.seed, args.seed + args.episodes)]
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        results = list(tqdm(pool.imap(_job, jobs), total=len(jobs), unit="episode"))
    print(report(results))
    print(f"{len(results)} episodes in {time.monotonic() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

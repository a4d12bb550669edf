"""Pictures of static scenes for stage 1: nothing moves, everything is somewhere else in every picture, and all of it is
labelled.

Such a picture costs a hundredth of a demonstration, and grounding needs many scenes rather than many moments of one.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import click

from vla_nodes import cli
from vla_nodes.datasets.episode import EpisodeWriter
from vla_nodes.envs import base as envs
from vla_nodes.progress import progress


def collect_one(job: tuple[str, int, Path, float]) -> int:
    """The pictures of scene ``seed`` of an environment, in one episode file; returns how many there are."""
    name, seed, path, unusual = job
    env, writer = envs.make_static_scenes(name), EpisodeWriter()
    try:
        header, pictures = env.static_scene(seed, unusual)
        for number, (observation, labels) in enumerate(pictures):
            camera = observation.cameras[env.contract.cameras[0].name]
            writer.add(camera.color, camera.depth, stamp=float(number), ee_pose=observation.tool_pose, **labels)
    finally:
        env.close()
    seen = {"intrinsics": camera.intrinsics.tolist(), "camera_pose": camera.pose.tolist()}
    writer.write(path, {**header, **seen, "seed": seed, "source": "static scenes in simulation"})
    return len(writer)


def collect(args: cli.Options) -> None:
    """The command."""
    jobs = [(args.env, seed, args.out / f"{seed:07d}.safetensors", args.unusual)
            for seed in range(args.seed, args.seed + args.scenes)]  # fmt: skip
    jobs = [job for job in jobs if not job[2].exists()]
    started, pictures = time.monotonic(), 0
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for count in progress(pool.imap_unordered(collect_one, jobs), total=len(jobs), unit="scenes"):
            pictures += count
    rate = pictures / max(time.monotonic() - started, 1e-9)
    print(f"{len(jobs)} scenes, {pictures} pictures, {rate:.1f} pictures a second, in {args.out}")


command = cli.Command(
    "collect-static-scenes",
    """
    Pictures of static scenes for stage 1: nothing moves, everything is somewhere else in every picture, all labelled.

    Such a picture costs a hundredth of a demonstration, and grounding needs many scenes rather than many moments of
    one. What is there is kept.
    """,
    collect,
    cli.out("folder for the pictures", required=True),
    cli.option("--env", type=click.Choice(envs.NAMES), default=envs.DEFAULT, help="environment"),
    cli.count("--scenes", "scenes, of several pictures each", 2000),
    cli.seed("seed of the first scene", 500_000),
    cli.number("--unusual", "share of scenes with objects nobody asks for, in looks without a name", 0.3, most=1.0),
    cli.workers(),
    examples="""
    python -m vla_nodes collect-static-scenes --out work/scenes --scenes 1500
    """,
    errors=(OSError, envs.EnvError),
)


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Pictures of static scenes for stage 1: nothing moves, everything is somewhere else in every picture, and all of it is
labelled.

Such a picture costs a hundredth of a demonstration, and grounding needs many scenes rather than many moments of one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

from tqdm import tqdm

from vla_nodes.datasets.episode import EpisodeWriter
from vla_nodes.envs import base as envs


def collect_one(job: tuple[str, int, Path, float]) -> int:
    """The pictures of scene ``seed`` of an environment, in one episode file; returns how many there are."""
    name, seed, path, unusual = job
    env, writer = envs.make_static_scenes(name), EpisodeWriter()
    try:
        header, pictures = env.static_scene(seed, unusual)
        for number, (observation, labels) in enumerate(pictures):
            writer.add(observation.color, observation.depth, stamp=float(number), ee_pose=observation.ee_pose, **labels)
    finally:
        env.close()
    camera = {"intrinsics": observation.intrinsics.tolist(), "camera_pose": observation.camera_pose.tolist()}
    writer.write(path, {**header, **camera, "seed": seed, "source": "static scenes in simulation"})
    return len(writer)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_nodes collect-static-scenes", description=__doc__)
    parser.add_argument("--env", choices=envs.NAMES, default=envs.DEFAULT, help="environment (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures; existing ones are kept")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=500_000, help="seed of the first scene (default %(default)s)")
    parser.add_argument(
        "--unusual",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="of scenes with objects nobody asks for, in looks without a name (default %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args(argv)
    seeds = range(args.seed, args.seed + args.scenes)
    jobs = [(args.env, seed, args.out / f"{seed:07d}.safetensors", args.unusual) for seed in seeds]
    jobs = [job for job in jobs if not job[2].exists()]
    started, pictures = time.monotonic(), 0
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for count in tqdm(pool.imap_unordered(collect_one, jobs), total=len(jobs), unit="scene"):
            pictures += count
    rate = pictures / max(time.monotonic() - started, 1e-9)
    print(f"{len(jobs)} scenes, {pictures} pictures, {rate:.1f} pictures a second, in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

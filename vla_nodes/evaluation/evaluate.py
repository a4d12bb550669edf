"""Closed-loop evaluation: the policy drives an environment's robot, and its simulator says what came of it.

An environment has suites and groups of suites; --suite list says which. --episodes counts for each suite. Ctrl-C prints
the table of what was done.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from vla_nodes.envs import base as envs
from vla_nodes.evaluation import closed_loop_episode, contact_sheet
from vla_nodes.evaluation.metrics import Result, line, table, write_json
from vla_nodes.share import share_path

SHIPPED = "resource/checkpoints/nano"
Outcome = tuple[Result, contact_sheet.Frames]


def jobs_of(env: envs.Environment, suite: str, episodes: int, seed: int, instruction: str | None = None
            ) -> list[tuple[str, int]]:  # fmt: skip
    """(suite, seed) of every episode, the suites of a group taking turns so that an early stop is about all of them.

    EnvError for a suite that is not there, or an instruction that cannot be done.
    """
    if instruction:
        return env.episodes_for(instruction, seed, episodes)
    names = env.suites.members(suite)
    return [(name, s) for s in range(seed, seed + episodes) for name in names]


def _job(name: str, checkpoint: str, engine: str, suite: str, seed: int, instruction: str | None, limit: float | None
         ) -> Outcome:  # fmt: skip
    """An episode that breaks is a failed one: hours of others do not go with it."""
    family = text = suite
    env = envs.make(name)
    try:
        start = env.reset(suite, seed, instruction)
        family, text = start.family, start.instruction
        return closed_loop_episode.run(closed_loop_episode.driver(checkpoint, engine), env, start, suite, seed, limit)
    except Exception as error:
        return Result(suite, seed, family, text, False, 0.0, "error", f"{type(error).__name__}: {error}"), []
    finally:
        env.close()


def _worker_starts() -> None:
    """A worker leaves Ctrl-C to its parent, and outlives it in no case."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def run(env: str, checkpoint: str, jobs: list[tuple[str, int]], instruction: str | None = None, workers: int = 1,
        limit: float | None = None, engine: str = "torch") -> list[Outcome]:  # fmt: skip
    """Every job by ``workers`` processes, with a progress bar; Ctrl-C ends it early with what there is."""
    outcomes: dict[Future, Outcome] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_worker_starts)
    futures = [pool.submit(_job, env, checkpoint, engine, suite, seed, instruction, limit) for suite, seed in jobs]
    try:
        with tqdm(total=len(jobs), unit="episode", smoothing=0.1) as bar:
            for future in as_completed(futures):
                result, _ = outcomes[future] = future.result()
                if not result.success:
                    tqdm.write(f"failed: {line(result)}", file=sys.stderr)
                won = sum(result.success for result, _ in outcomes.values())
                bar.set_postfix_str(f"{won}/{len(outcomes)} = {won / len(outcomes):.0%}", refresh=False)
                bar.update()
        pool.shutdown()
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
    return [outcomes[future] for future in futures if future in outcomes]


def save(folder: Path, outcomes: list[Outcome], suites: envs.Suites, **about: object) -> list[Path]:
    """eval.json and the contact sheet of failures; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "eval.json", [result for result, _ in outcomes], suites, **about)
    sheets = contact_sheet.write(folder, [outcome for outcome in outcomes if not outcome[0].success])
    return [folder / "eval.json", *sheets]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m vla_nodes eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--checkpoint", type=Path, help=f"checkpoint folder (default: {SHIPPED})")
    made.add_argument("--env", choices=envs.NAMES, default=envs.DEFAULT, help="environment (default %(default)s)")
    made.add_argument("--expert", action="store_true", help="the environment's expert in place of a policy")
    made.add_argument("--suite", help="a suite or a group; list shows what there is (default: the environment's)")
    made.add_argument("--instruction", help="the same sentence in every episode instead of a suite's own")
    made.add_argument("--episodes", type=int, default=50, help="per suite (default %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the first episode (training uses 100000 and up)")
    made.add_argument("--time-limit", type=float, help="simulated s for an episode (default: the environment's)")
    made.add_argument(
        "--engine",
        default="auto",
        help="torch, openvino, onnxruntime or auto, as policy_node chooses (default %(default)s)",
    )
    made.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    made.add_argument("--save", type=Path, help="folder for eval.json and the contact sheet of failures")
    made.add_argument("--ros", action="store_true", help="through the real ROS 2 nodes, as ./run --suite does")
    return made


def through_ros(args: argparse.Namespace) -> int:
    """Hand over to ./run's module, which needs a sourced ROS 2 environment; without ROS this package has no rclpy."""
    command = [sys.executable, "-m", "vla_nodes.demo.cli", "--episodes", str(args.episodes), "--seed", str(args.seed)]
    command += ["--no-video", *([args.instruction] if args.instruction else ["--suite", args.suite or "all"])]
    for option, value in (("--checkpoint", args.checkpoint), ("--time-limit", args.time_limit), ("--out", args.save)):
        command += [option, str(value)] if value is not None else []
    return subprocess.call(command)


def main(argv: list[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(argv)
    if args.episodes < 1 or args.workers < 1 or args.seed < 0:
        made.error("--episodes and --workers must be 1 or more, --seed 0 or more")
    if args.expert and (args.ros or args.checkpoint):
        made.error("--expert drives without a policy and without ROS")
    if args.ros and args.engine != made.get_default("engine"):
        made.error("--ros: policy_node chooses by its own parameter engine (config/panda/params.yaml)")
    if args.ros and args.env != envs.DEFAULT:
        made.error(f"--ros: the simulated robot of the ROS graph is the one of {envs.DEFAULT}")
    if args.ros:
        return through_ros(args)
    try:
        env = envs.make_demonstrator(args.env) if args.expert else envs.make(args.env)
        if args.suite == "list":
            print(f"{', '.join(env.suites.choices)}\n\n{env.suites.about}")
            return 0
        suite = args.suite or env.suites.default
        jobs = jobs_of(env, suite, args.episodes, args.seed, args.instruction)
    except envs.EnvError as error:
        made.error(str(error))
    idle = env.suites.idle
    if args.expert and any(name in idle for name, _ in jobs):
        jobs = [job for job in jobs if job[0] not in idle]
        if not jobs:
            made.error("the expert is told what to do: it has no answer where there is nothing to be done")
        print(f"without {' and '.join(idle)}: the expert is asked for what can be done", file=sys.stderr)
    checkpoint = "" if args.expert else str(args.checkpoint or share_path(SHIPPED))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        closed_loop_episode.driver(
            checkpoint, args.engine
        )  # what is wrong with it is said once; and the workers find its graphs
    except ValueError as error:
        made.error(str(error))
    started = time.monotonic()
    outcomes = run(args.env, checkpoint, jobs, args.instruction, args.workers, args.time_limit, args.engine)
    took = time.monotonic() - started
    written = []
    if args.save:  # before anything is printed: whoever reads that may have gone
        about = {"env": args.env, "checkpoint": checkpoint or "expert", "suite": suite, "seed": args.seed,
                 "through": "rollout", "engine": args.engine, "instruction": args.instruction,
                 "seconds": round(took, 1)}  # fmt: skip
        written = save(args.save, outcomes, env.suites, **about)
    if outcomes:
        print(table([result for result, _ in outcomes], env.suites))
    early = "" if len(outcomes) == len(jobs) else f" of {len(jobs)}, stopped early,"
    print(f"{len(outcomes)} episodes{early} in {took:.0f} s")
    for path in written:
        print(f"wrote {path}")
    return 0 if len(outcomes) == len(jobs) else 130


if __name__ == "__main__":
    raise SystemExit(main())

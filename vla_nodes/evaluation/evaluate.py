"""Closed-loop evaluation: the policy drives an environment's robot, and its simulator says what came of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import click

from vla_nodes import cli
from vla_nodes.envs import base as envs
from vla_nodes.evaluation import closed_loop_episode, contact_sheet
from vla_nodes.evaluation.metrics import Result, line, table, write_json
from vla_nodes.policy.inference import engine as engines
from vla_nodes.progress import progress, say
from vla_nodes.share import SHIPPED_CHECKPOINT, share_path

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
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
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
        with progress(total=len(jobs), unit="episodes") as bar:
            for future in as_completed(futures):
                result, _ = outcomes[future] = future.result()
                if not result.success:
                    say(f"failed: {line(result)}", sys.stderr)
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


def through_ros(args: cli.Options) -> int:
    """Hand over to ./run's module, which needs a sourced ROS 2 environment; without ROS this package has no rclpy."""
    command = [sys.executable, "-m", "vla_nodes.demo.cli", "--episodes", str(args.episodes), "--seed", str(args.seed)]
    command += ["--no-video", *([args.instruction] if args.instruction else ["--suite", args.suite or "all"])]
    for option, value in (("--checkpoint", args.checkpoint), ("--time-limit", args.time_limit), ("--out", args.out)):
        command += [option, str(value)] if value is not None else []
    return subprocess.call(command)


def evaluate(args: cli.Options) -> int:
    """The command."""
    if args.expert and (args.ros or args.checkpoint):
        raise click.UsageError("--expert drives without a policy and without ROS")
    if args.ros and args.given("engine"):
        raise click.UsageError("--ros: policy_node chooses by its own parameter engine (config/panda/params.yaml)")
    if args.ros and args.env != envs.DEFAULT:
        raise click.UsageError(f"--ros: the simulated robot of the ROS graph is the one of {envs.DEFAULT}")
    if args.ros:
        return through_ros(args)
    env = envs.make_demonstrator(args.env) if args.expert else envs.make(args.env)
    if args.suite == "list":
        print(f"{', '.join(env.suites.choices)}\n\n{env.suites.about}")
        return cli.ExitStatus.DONE
    suite = args.suite or env.suites.default
    jobs = jobs_of(env, suite, args.episodes, args.seed, args.instruction)
    idle = env.suites.idle
    if args.expert and any(name in idle for name, _ in jobs):
        jobs = [job for job in jobs if job[0] not in idle]
        if not jobs:
            raise click.UsageError("--expert has no answer where there is nothing to be done: choose another --suite")
        print(f"without {' and '.join(idle)}: the expert is asked for what can be done", file=sys.stderr)
    checkpoint = "" if args.expert else str(args.checkpoint or share_path(SHIPPED_CHECKPOINT))
    signal.signal(signal.SIGTERM, _interrupt)
    try:  # what is wrong with it is said once; and the workers find its graphs
        closed_loop_episode.driver(checkpoint, args.engine)
    except ValueError as error:
        raise cli.CommandError(str(error)) from None
    started = time.monotonic()
    outcomes = run(args.env, checkpoint, jobs, args.instruction, args.workers, args.time_limit, args.engine)
    took = time.monotonic() - started
    written = []
    if args.out:  # before anything is printed: whoever reads that may have gone
        about = {"env": args.env, "checkpoint": checkpoint or "expert", "suite": suite, "seed": args.seed,
                 "through": "rollout", "engine": args.engine, "instruction": args.instruction,
                 "seconds": round(took, 1)}  # fmt: skip
        written = save(args.out, outcomes, env.suites, **about)
    if outcomes:
        print(table([result for result, _ in outcomes], env.suites))
    early = "" if len(outcomes) == len(jobs) else f" of {len(jobs)}, stopped early,"
    print(f"{len(outcomes)} episodes{early} in {took:.0f} s")
    for path in written:
        print(f"wrote {path}")
    return cli.ExitStatus.DONE if len(outcomes) == len(jobs) else cli.ExitStatus.INTERRUPTED


command = cli.Command(
    "eval",
    """
    Closed-loop evaluation: the policy drives an environment's robot, and its simulator says what came of it.

    An environment has suites and groups of suites; --suite list says which.

    Ctrl-C prints the table of what was done, and ends with 130. A policy that fails is a result: the status is 0.
    """,
    evaluate,
    *cli.section(
        "What to measure",
        cli.checkpoint(),
        cli.option("--env", type=click.Choice(envs.NAMES), default=envs.DEFAULT, help="environment"),
        cli.flag("--expert", "the environment's expert in place of a policy"),
        cli.option("--suite", metavar="SUITE", help="what is asked, and where; without it the environment chooses"),
        cli.option("--instruction", metavar="TEXT", help="the same sentence in every episode, not a suite's own"),
        cli.count("--episodes", "episodes per suite", 50),
        cli.seed("seed of the first episode; training uses 100000 and up"),
        cli.number("--time-limit", "simulated time of an episode [s]; without it the environment's"),
    ),
    *cli.section(
        "How",
        cli.engine(engines.NAMES, "what computes the policy; auto chooses as policy_node does"),
        cli.workers(),
        cli.flag("--ros", "through the real ROS 2 nodes, as ./run --suite does"),
        cli.out("folder for eval.json and the contact sheets of failures"),
    ),
    examples="""
    python -m vla_nodes eval --episodes 100 --out out/eval
    python -m vla_nodes eval --suite rearrangement/pairs --checkpoint work/nano
    python -m vla_nodes eval --expert --suite drawer --episodes 10
    """,
    errors=(envs.EnvError,),
)


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

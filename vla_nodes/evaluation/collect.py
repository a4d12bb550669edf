"""Demonstrations: an environment's expert, disturbed on purpose, recorded with what the camera saw.

Every episode is made from its seed alone, so a folder can be filled by several processes, stopped and resumed.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import click
import msgspec
import numpy as np

from vla_nodes import cli
from vla_nodes.datasets.episode import EpisodeWriter
from vla_nodes.envs import base as envs
from vla_nodes.envs.base import Demonstrator
from vla_nodes.policy import contract as contracts
from vla_nodes.policy.contract import Contract
from vla_nodes.policy.processing import Observation
from vla_nodes.policy.runtime import PolicyRuntime
from vla_nodes.progress import progress, say

THROWN_AWAY = "thrown_away.jsonl"  # beside the episodes: seeds that failed, so that they are not tried again
LATENCIES = (0.02, 0.09)  # s, least and most, from an observation to the arrival of its chunk


def row_of(env: Demonstrator, observation: Observation, plan: envs.Plan) -> dict[str, np.ndarray]:
    """What is recorded of a tick beside its images; see datasets/episode.py."""
    return {
        "stamp": observation.stamp,
        "joint_positions": observation.joint_positions,
        "joint_velocities": observation.joint_velocities,
        "gripper": observation.grippers[0],
        "ee_pose": observation.tool_pose,
        "actions": plan.actions.astype(np.float32),
        "primitive": plan.primitive,
        "step": plan.step,
        "done": plan.finished,
        **env.labels(),
    }


def collect_one(env: Demonstrator, seed: int, path: Path, contract: Contract, runtime: PolicyRuntime | None = None,
                family: str | None = None) -> str:  # fmt: skip
    """Make episode ``seed``, of a task family if given, with the tick, period and horizon of the contract.

    Returns "" or why it was thrown away.

    With a ``runtime`` its policy drives for most of the episode while the expert only says what it would do (DAgger,
    Ross et al., arXiv 1011.0686): the data then hold the states that the policy's own mistakes lead to.
    """
    rng, moves = np.random.default_rng(seed), contract.actions
    start = env.reset_demonstration(seed, rng, family)
    disturb, writer = env.disturbance(rng), EpisodeWriter()
    if runtime is not None:
        runtime.set_instruction(start.instruction)
    # After so many seconds the expert takes over, so that every episode also shows the way out.
    help_after = rng.uniform(4.0, max(4.0, 0.7 * start.limit))
    ended = None
    while env.time < start.limit and (ended is None or env.time - ended < env.afterwards):
        now, observation, plan = env.time, env.observe(), env.plan(moves.horizon, moves.period)
        camera = observation.cameras[contract.cameras[0].name]
        writer.add(camera.color, camera.depth, **row_of(env, observation, plan))
        executed = disturb(plan.actions, now) if ended is None else plan.actions
        if runtime is not None:
            chosen = runtime.step(observation)
            if now < help_after and chosen.actions is not None:
                executed = chosen.actions
        latency = round(rng.uniform(*LATENCIES), 2) if env.latency else 0.0
        env.apply(executed, moves.period, contract.tick, latency)
        if env.succeeded and ended is None:
            ended = env.time
    if not env.succeeded:
        return f"seed {seed}: {start.instruction!r} failed ({env.outcome().detail})"
    writer.write(
        path,
        {
            "instruction": start.instruction,
            "primitives": list(env.primitives),
            "intrinsics": camera.intrinsics.tolist(),
            "camera_pose": camera.pose.tolist(),
            "period": moves.period,
            "tick": contract.tick,
            "contract": contracts.plain(contract),
            "success": True,
            "seed": seed,
            "source": "expert in simulation",
            **start.record,
        },
    )
    return ""


Job = tuple[int, Path]
_worker: dict = {}  # of a process: its environment, contract, policy and family


def _begin(name: str, policy: Path | None, horizon: int | None, family: str | None) -> None:
    env = envs.make_demonstrator(name)
    runtime = PolicyRuntime.load(policy, device="cpu") if policy is not None else None
    _worker.update(env=env, contract=contract_of(env, runtime, horizon), runtime=runtime, family=family)


def contract_of(env: Demonstrator, runtime: PolicyRuntime | None, horizon: int | None) -> Contract:
    """The environment's, with tick, period and horizon of the policy that drives; rows by ``horizon`` if given."""
    contract, actions = env.contract, env.contract.actions
    if runtime is not None:
        config = runtime.config
        actions = msgspec.structs.replace(
            actions, period=config.contract.actions.period, horizon=config.contract.actions.horizon
        )
        contract = msgspec.structs.replace(contract, tick=config.contract.tick)
    if horizon is not None:
        actions = msgspec.structs.replace(actions, horizon=horizon)
    return msgspec.structs.replace(contract, actions=actions)


def _job(job: Job) -> tuple[int, str]:
    try:
        return job[0], collect_one(_worker["env"], *job, _worker["contract"], _worker["runtime"], _worker["family"])
    finally:
        _worker["env"].close()


def open_jobs(out: Path, seeds: range, policy: Path | None) -> tuple[list[Job], int]:
    """What is still to do of these seeds, and how many of them are known to fail (with or without a policy, as now)."""
    failed = set()
    for text in (out / THROWN_AWAY).read_text().splitlines() if (out / THROWN_AWAY).exists() else []:
        try:
            row = json.loads(text)
            failed |= {row["seed"]} if row["policy"] == bool(policy) else set()
        except (ValueError, LookupError, TypeError):
            continue  # a line cut off by a kill: that seed is tried again
    left = [(seed, out / f"{seed:07d}.safetensors") for seed in seeds]
    left = [job for job in left if not job[1].exists()]
    return [job for job in left if job[0] not in failed], sum(job[0] in failed for job in left)


def collect(args: cli.Options) -> None:
    """The command."""
    families = envs.make_demonstrator(args.env).families
    if args.suite and args.suite not in families:
        raise click.UsageError(f"--suite {args.suite}: no such family of tasks; there are {', '.join(families)}")
    jobs, noted = open_jobs(args.out, range(args.seed, args.seed + args.episodes), args.checkpoint)
    if noted:
        print(f"{noted} seeds failed before and are left out; delete {args.out / THROWN_AWAY} to try them again")
    started, thrown = time.monotonic(), 0
    begin = (args.env, args.checkpoint, args.horizon, args.suite)
    args.out.mkdir(parents=True, exist_ok=True)
    with (
        multiprocessing.get_context("spawn").Pool(args.workers, _begin, begin) as pool,
        progress(total=len(jobs), unit="episodes") as bar,
        open(args.out / THROWN_AWAY, "a") as failures,
    ):
        for seed, reason in pool.imap_unordered(_job, jobs):
            bar.update()
            bar.set_postfix_str(f"{60 * bar.n / max(time.monotonic() - started, 1e-9):.1f} a minute", refresh=False)
            if reason:
                thrown += 1
                say(reason)
                failures.write(json.dumps({"seed": seed, "policy": bool(args.checkpoint), "reason": reason}) + "\n")
                failures.flush()
    rate = len(jobs) / max(time.monotonic() - started, 1e-9) * 60
    print(f"{len(jobs) - thrown} episodes written, {thrown} failed and thrown away, {rate:.1f} a minute, in {args.out}")


command = cli.Command(
    "collect",
    """
    Demonstrations: an environment's expert, disturbed on purpose, recorded with what the camera saw.

    With --checkpoint that policy drives while the expert only says what it would do: the data then holds the states
    that the policy's own mistakes lead to. Every episode is made from its seed alone, so a folder can be filled by
    several processes, stopped and resumed; episodes that are there are kept.
    """,
    collect,
    cli.out("folder for the episodes", required=True),
    cli.count("--episodes", "seeds to try", 800),
    cli.seed("seed of the first episode", 100_000),
    cli.option("--env", type=click.Choice(envs.NAMES), default=envs.DEFAULT, help="environment"),
    cli.option("--suite", metavar="SUITE", help="one family of tasks; without it the environment's mixture"),
    cli.count("--horizon", "rows of a chunk; without it as the policy that drives has, else the environment"),
    cli.checkpoint("checkpoint folder of a policy that drives", default=None),
    cli.workers(),
    examples="""
    python -m vla_nodes collect --out work/data
    python -m vla_nodes collect --out work/stacks --suite stacking --checkpoint work/action/checkpoint
    """,
    errors=(OSError, envs.EnvError),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

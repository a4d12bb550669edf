"""Demonstrations: an environment's expert, disturbed on purpose, recorded with what the camera saw.

Every episode is made from its seed alone, so a folder can be filled by several processes, stopped and resumed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import msgspec
import numpy as np
from tqdm import tqdm

from vla_nodes.datasets.episode import EpisodeWriter
from vla_nodes.envs import base as envs
from vla_nodes.envs.base import Demonstrator
from vla_nodes.policy import contract as contracts
from vla_nodes.policy.contract import Contract
from vla_nodes.policy.runtime import PolicyRuntime

THROWN_AWAY = "thrown_away.jsonl"  # beside the episodes: seeds that failed, so that they are not tried again
LATENCIES = (0.02, 0.09)  # s, least and most, from an observation to the arrival of its chunk


def row_of(env: Demonstrator, observation, plan: envs.Plan) -> dict[str, np.ndarray]:
    """What is recorded of a tick beside its images; see datasets/episode.py."""
    return {
        "stamp": observation.stamp,
        "joint_positions": observation.joint_positions,
        "joint_velocities": observation.joint_velocities,
        "gripper": observation.gripper,
        "ee_pose": observation.ee_pose,
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
        writer.add(observation.color, observation.depth, **row_of(env, observation, plan))
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
            "intrinsics": observation.intrinsics.tolist(),
            "camera_pose": observation.camera_pose.tolist(),
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
        actions = msgspec.structs.replace(actions, period=config.period, horizon=config.horizon)
        contract = msgspec.structs.replace(contract, tick=config.tick)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_nodes collect", description=__doc__)
    parser.add_argument("--env", choices=envs.NAMES, default=envs.DEFAULT, help="environment (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the episodes; existing ones are kept")
    parser.add_argument("--episodes", type=int, default=800)
    parser.add_argument("--seed", type=int, default=100_000, help="seed of the first episode (default %(default)s)")
    parser.add_argument("--policy", type=Path, help="checkpoint that drives while the expert only labels")
    parser.add_argument("--only", metavar="FAMILY", help="one task family; without it the environment's mixture")
    parser.add_argument("--horizon", type=int, help="rows of a chunk (default: the policy's, else the environment's)")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args(argv)
    try:
        families = envs.make_demonstrator(args.env).families
    except envs.EnvError as error:
        parser.error(str(error))
    if args.only and args.only not in families:
        parser.error(f"--only {args.only}: no such family; there are {', '.join(families)}")
    jobs, noted = open_jobs(args.out, range(args.seed, args.seed + args.episodes), args.policy)
    if noted:
        print(f"{noted} seeds failed before and are left out; delete {args.out / THROWN_AWAY} to try them again")
    started, thrown = time.monotonic(), 0
    args.out.mkdir(parents=True, exist_ok=True)
    pool = multiprocessing.get_context("spawn").Pool(
        args.workers, _begin, (args.env, args.policy, args.horizon, args.only)
    )
    with (pool, tqdm(total=len(jobs), unit="episode") as bar,
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

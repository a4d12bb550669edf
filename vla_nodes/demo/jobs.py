"""What ./run is to do, episode by episode, and what came of it, in the same terms as evaluation without ROS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vla_nodes.envs.tabletop import instructions, suites
from vla_nodes.evaluation.metrics import Result

SHORT, PATIENT = 25.0, 40.0
"""s of simulated time for each step of an instruction, with --short and without."""


@dataclass(frozen=True)
class Job:
    """One episode."""

    scene: str  # suite
    seed: int
    text: str
    limit: float  # simulated s
    idle: bool = False  # there is nothing to be done: success is that nothing is touched
    family: str = ""
    steps: int = 1


def jobs(instruction: str | None, suite: str | None, seed: int | None, episodes: int, limit: float | None,
         short: bool = False) -> list[Job]:  # fmt: skip
    """Every episode in turn. Without a seed an instruction gets scenes that allow it."""
    if suite:
        names = suites.LAYOUT.members(suite)
        pairs = [(name, s) for s in range(seed or 0, (seed or 0) + episodes) for name in names]
        return [_of_suite(name, s, limit) for name, s in pairs]
    text = instruction or ""
    chosen = [seed] if seed is not None and episodes == 1 else suites.feasible_seeds(text, seed or 0, episodes)
    task = instructions.parse(text) if text else None
    steps = len(list(task.steps)) if task else 1
    return [Job("demo", s, text, limit or (SHORT if short else PATIENT) * steps, family=task.family if task else "",
                steps=steps) for s in chosen]  # fmt: skip


def _of_suite(name: str, seed: int, limit: float | None) -> Job:
    scene, task, text = suites.episode(name, seed)
    idle = suites.idle(task, scene)
    limit = limit or (suites.IDLE_LIMIT if idle else suites.time_limit(task))
    return Job(name, seed, text, limit, idle, task.family, len(list(task.steps)))


def result(job: Job, truth: dict[str, Any], success: bool, seconds: float, held: str) -> Result:
    """``truth``: sim_node's last word on the task. ``held``: why the policy held at the end, "" if it did not."""
    reason, detail = truth.get("reason", ""), truth.get("progress", "the simulator said nothing")
    if job.idle:
        reason, detail = "touched something", ", ".join(truth.get("touched", []))
    elif held:
        moved = bool(truth.get("touched")) or truth.get("mean_jerk", 0.0) > 1.0
        reason, detail = ("gave up" if moved else "refused"), f"{held}; {detail}"
    return Result(
        job.scene, job.seed, job.family, job.text, success, round(seconds, 2), "" if success else reason or "timeout",
        detail, job.steps, truth.get("steps_done", 0), truth.get("wrong", []), truth.get("touched", []),
        truth.get("mean_jerk", 0.0), truth.get("p99_jerk", 0.0),
    )  # fmt: skip

"""What episodes add up to: success with its interval by suite and group of suites, reasons, and the table of it all."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from vla_nodes.envs.base import Suites

PLAIN = Suites()  # every suite a row of its own
LISTED = 40  # failures named under the table; all of them are in the JSON


@dataclass
class Result:
    """One episode."""

    suite: str
    seed: int
    family: str
    instruction: str
    success: bool
    seconds: float  # simulated
    reason: str = ""  # "" or why it failed: one of a few kinds
    detail: str = ""  # the simulator's truth about it, for a person
    steps: int = 1
    steps_done: int = 0
    wrong: list[str] = field(default_factory=list)  # what was lifted or displaced though nobody had named it
    touched: list[str] = field(default_factory=list)  # everything the robot touched
    mean_jerk: float = 0.0  # m/s^3 of the tool
    p99_jerk: float = 0.0


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927), fractions."""
    if count == 0:
        return 0.0, 1.0
    p = successes / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # Both ends are inside 0..1 but for rounding.
    return max(0.0, (middle - half) / (1 + z * z / count)), min(1.0, (middle + half) / (1 + z * z / count))


def groups(results: Iterable[Result], suites: Suites = PLAIN) -> dict[str, list[Result]]:
    """Results by row of the table: each suite, and behind the suites of a group their sum."""
    by_suite: dict[str, list[Result]] = {}
    for result in results:
        by_suite.setdefault(result.suite, []).append(result)
    rows: dict[str, list[Result]] = {}
    for group in suites.groups.values():
        if group.title:
            _add(rows, {name: by_suite.pop(name) for name in group.suites if name in by_suite}, group.title)
    for name, part in sorted(by_suite.items()):
        parts: dict[str, list[Result]] = {}
        for result in part:
            row = f"{name}: {result.family}" if name in suites.mixed else name
            parts.setdefault(row, []).append(result)
        _add(rows, parts, name)
    return rows


def _add(rows: dict[str, list[Result]], parts: dict[str, list[Result]], total: str) -> None:
    rows.update(parts)
    if len(parts) > 1:
        rows[total] = [result for part in parts.values() for result in part]


def summary(results: list[Result]) -> dict[str, float | int]:
    """The figures of one row; rates are fractions, nan where there is nothing to average."""
    won = [r for r in results if r.success]
    low, high = wilson(len(won), len(results))
    return {
        "episodes": len(results),
        "successes": len(won),
        "rate": len(won) / max(1, len(results)),
        "low": low,
        "high": high,
        "wrong_object_rate": sum(bool(r.wrong) for r in results) / max(1, len(results)),
        "mean_seconds": float(np.mean([r.seconds for r in won])) if won else math.nan,
        "mean_jerk": float(np.mean([r.mean_jerk for r in results])) if results else math.nan,
        "p99_jerk": float(np.mean([r.p99_jerk for r in results])) if results else math.nan,
    }


def table(results: list[Result], suites: Suites = PLAIN) -> str:
    """For a person: a row per suite and sum, why episodes failed, and which."""
    rows = groups(results, suites)
    width = max([len("suite"), *map(len, rows)])
    head = "success             95 % interval    wrong object  mean time  jerk mean / p99 (m/s^3)"
    lines = [f"{'suite':{width}}  {head}"]
    sums = {group.title for group in suites.groups.values()}
    for name, part in rows.items():
        s = summary(part)
        seconds = "-" if math.isnan(s["mean_seconds"]) else f"{s['mean_seconds']:.1f} s"
        lines.append(f"{name:{width}}  {s['successes']:3}/{s['episodes']:<3} = {s['rate']:6.1%}   "
                     f"{s['low']:6.1%} to {s['high']:6.1%}  {s['wrong_object_rate']:12.1%}  {seconds:>9}  "
                     f"{s['mean_jerk']:8.1f} / {s['p99_jerk']:.1f}")  # fmt: skip
        if name in sums:
            lines.append("")
    for group in suites.groups.values():
        if not group.baseline or not (held := by_family(rows.get(group.title, []))):
            continue
        trained = by_family(r for r in results if r.suite in suites.groups[group.baseline].suites)
        if set(held) <= set(trained):
            # Of the same families, each weighing alike, so that the mix does not make a difference.
            drop = np.mean([summary(held[f])["rate"] - summary(trained[f])["rate"] for f in sorted(held)])
            lines.append(f"{group.title}: {100 * drop:+.1f} points against the same families as trained")
    failed = [r for r in results if not r.success]
    if failed:
        reasons = Counter(r.reason for r in failed).most_common()
        lines.append("failures: " + ", ".join(f"{count} {reason}" for reason, count in reasons))
    lines += [f"  {line(r)}" for r in failed[:LISTED]]
    if len(failed) > LISTED:
        lines.append(f"  and {len(failed) - LISTED} more")
    return "\n".join(lines)


def by_family(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.family, []).append(result)
    return found


def line(result: Result) -> str:
    """One episode in one line."""
    r = result
    step = f", step {min(r.steps_done + 1, r.steps)} of {r.steps}" if r.steps > 1 and not r.success else ""
    said = "success" if r.success else r.reason
    return f'{r.suite}, seed {r.seed}{step}, "{r.instruction}": {said} after {r.seconds:.1f} s ({r.detail})'


def write_json(path: Path, results: list[Result], suites: Suites = PLAIN, **about: object) -> None:
    """Everything: ``about`` the run, the table's rows, and every episode."""
    rows = {name: {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in summary(part).items()}
            for name, part in groups(results, suites).items()}  # fmt: skip
    values = {**about, "rows": rows, "episodes": [asdict(r) for r in results]}
    path.write_text(json.dumps(values, indent=1) + "\n")

"""Two checkpoints on one recording, side by side: same observations, same executor, what each would have done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vla_nodes.replay import report
from vla_nodes.replay.bag_progress import Progress
from vla_nodes.replay.open_loop import Sink, Step
from vla_nodes.replay.session import Session
from vla_nodes.replay.write_results import measured_pass


class Steps(Sink):
    """What each step decided, by the stamp of its observation, and what was commanded, by bag time."""

    def __init__(self) -> None:
        self.decided: dict[int, tuple[str, str, np.ndarray | None]] = {}
        self.commands: dict[int, np.ndarray] = {}

    def step(self, step: Step, published: bool) -> None:
        if step.output is None:
            self.decided[step.stamp] = ("", f"failed: {step.error}", None)
        else:
            self.decided[step.stamp] = (step.output.primitive, step.output.hold_reason, step.output.actions)

    def commanded(self, now: int, q: np.ndarray | None, qd: np.ndarray | None, fingers: np.ndarray) -> None:
        if q is not None:
            self.commands[now] = q


def compare(first: Session, other: Path, out: Path, images: bool) -> int:
    """Replay with the session's checkpoint and with `other`; writes out/first, out/second and out/compare.json, prints
    a table. Returns 1 if the recording ended early."""
    second = replace(first, checkpoint=other)
    results = []
    for name, session in (("first", first), ("second", second)):
        steps = Steps()
        progress = Progress(first.bag.start, first.bag.end, name)
        results.append((session, *measured_pass(session, out / name, images, [steps], progress), steps))
    both = differences(results[0][3], results[1][3], first.runtime.config, second.runtime.config)
    values = {name: made["settings"]["checkpoint"] for name, (_, made, _, _) in zip("AB", results, strict=True)}
    report.write_json(out / "compare.json", {**values, "difference": both})
    print(table(values, [(made, clock) for _, made, clock, _ in results], both))
    print(f"{'written to':28}{out}")
    return 1 if any(made["ended"] for _, made, _, _ in results) else 0


def differences(a: Steps, b: Steps, config_a: Any, config_b: Any) -> dict[str, Any]:
    """How far apart the two policies are, over the observations on which both took a step."""
    common = sorted(a.decided.keys() & b.decided.keys())
    pairs = [(a.decided[stamp], b.decided[stamp]) for stamp in common]
    acting = [(x[2], y[2]) for x, y in pairs if x[2] is not None and y[2] is not None]
    of_a, of_b = config_a.contract.actions, config_b.contract.actions
    comparable = acting and (of_a.space, of_a.period, of_a.columns) == (of_b.space, of_b.period, of_b.columns)
    motion, grippers = list(of_a.motion_columns), list(of_a.gripper_columns)
    moved, gripper = [], []
    for x, y in acting if comparable else ():
        rows = min(len(x), len(y))
        gap = x[:rows] - y[:rows]
        if of_a.space == "ee_delta":
            moved.append(float(np.linalg.norm(gap[:, motion[:3]].sum(axis=0))))
        else:
            moved.append(float(np.abs(gap[:, motion]).max()))
        gripper.append(float(np.abs(gap[:, grippers]).max(initial=0.0)))
    at = sorted(a.commands.keys() & b.commands.keys())
    apart = [float(np.abs(a.commands[t] - b.commands[t]).max()) for t in at]
    return {
        "steps_on_the_same_observation": len(common),
        "both_acted": len(acting),
        "only_first_acted": sum(x[2] is not None and y[2] is None for x, y in pairs),
        "only_second_acted": sum(x[2] is None and y[2] is not None for x, y in pairs),
        "same_primitive": sum(x[0] == y[0] for x, y in pairs),
        "end_of_chunk_apart_unit": "m" if of_a.space == "ee_delta" else "largest of the columns",
        "end_of_chunk_apart": _spread(moved),
        "gripper_apart": _spread(gripper),
        "commanded_joints_apart_rad": _spread(apart),
    }


def table(names: dict[str, str], made: list[tuple[dict, dict]], both: dict[str, Any]) -> str:
    """A column for each policy, and below them how far they are apart."""
    rows: list[tuple[str, ...]] = [("", names["A"], names["B"])]

    def add(label: str, get: Any) -> None:
        rows.append((label, *(str(get(report_, clock)) for report_, clock in made)))

    def counts(values: dict[str, int]) -> str:
        return ", ".join(f"{n} {name[:32]}" for name, n in values.items()) or "none"

    def p50(spread: dict | None, digits: int = 4) -> str:
        return "none" if spread is None else f"{spread['p50']:.{digits}f}, most {spread['max']:.{digits}f}"

    add("steps, chunks", lambda r, _: f"{r['policy']['steps']}, {r['policy']['chunks']}")
    add("held", lambda r, _: counts(r["policy"]["holds"])[:48])
    add("primitives", lambda r, _: counts(r["policy"]["primitives"])[:48])
    add("chunks carried out", lambda r, _: r["chunks"]["carried_out"])
    add("refused", lambda r, _: counts(r["chunks"]["refused"])[:48])
    add("gap at the seam, rad", lambda r, _: p50(r["seams"]["gap"]))
    add("stops", lambda r, _: counts(r["limits"]["stops"])[:48])
    add("commanded - recorded, rad", lambda r, _: _most(r["commanded_minus_recorded_rad"]))
    add("policy, wall ms", lambda _, c: p50(c["stages_ms"].get("policy"), 1))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    width = widths[0]
    lines.append("")
    for name, value in both.items():
        if isinstance(value, dict):
            value = f"p50 {value['p50']:.4g}, p99 {value['p99']:.4g}, most {value['max']:.4g}"
        lines.append(f"{name.replace('_', ' ').ljust(width)}  {value}")
    return "\n".join(lines)


def _most(joints: dict[str, dict]) -> str:
    values = [entry["max"] for entry in joints.values() if entry["max"] is not None]
    return f"most {max(values):.4f}" if values else "none"


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p99 = (float(f"{v:.9g}") for v in np.percentile(values, [50, 99]))
    return {"p50": p50, "p99": p99, "max": float(f"{max(values):.9g}")}

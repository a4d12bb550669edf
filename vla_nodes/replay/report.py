"""The report of a replay: what a person reads on the terminal, and report.json with the same and more.

Everything in report.json follows from the recording, the checkpoint and the settings, so it is the same from run to
run; what the wall clock says is in timings.json.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from vla_nodes.replay.open_loop import Replay
from vla_nodes.replay.outputs import Numbers


def summary(replay: Replay, numbers: Numbers, settings: dict[str, Any], notes: list[str], ended: str) -> dict[str, Any]:
    """What goes into report.json. settings: what the replay was asked for; ended: "" or why it ended early."""
    sync, core = replay.policy.sync, replay.action.core
    span = 0.0 if numbers.origin is None else (numbers.end - numbers.origin) * 1e-9
    return {
        "settings": settings,
        "complete": not ended,
        "ended": ended,
        "nothing_done": _nothing_done(replay, numbers),
        "notes": notes,
        "duration_s": round(span, 9),
        "messages": dict(sorted(numbers.messages.items())),
        "frames": {
            "color": numbers.messages["color"],
            "paired": sync.taken,
            "paired_and_not_due": sync.taken - replay.counts["started"],
            "dropped": dict(sorted(sync.dropped.items())),
            "clock_set_back": replay.counts["clock set back"],
            "joint_states_unusable": replay.counts["joints: unusable"],
        },
        "policy": {
            "steps": numbers.steps,
            "steps_per_s": _round(numbers.steps / span) if span else 0.0,
            "chunks": numbers.published,
            "discarded": replay.core.discarded,
            "holds": dict(numbers.holds.most_common()),
            "primitives": dict(numbers.primitives.most_common()),
        },
        "chunks": {
            "carried_out": numbers.carried,
            "joined": dict(sorted(numbers.modes.items())),
            "refused": dict(sorted(numbers.refused.items())),
        },
        "seams": {name: _spread(values) for name, values in numbers.seam.items()},
        "limits": {
            "rows_clipped_at_joint_limits": numbers.clipped,
            "rows_already_past": numbers.dropped_rows,
            "gate": dict(sorted(core.gate.counts.items())),
            "stops": dict(sorted(core.stops.items())),
        },
        "commanded_minus_recorded_rad": {
            name: {
                "rms": _round(math.sqrt(numbers.error_sum[j] / numbers.error_count)) if numbers.error_count else None,
                "max": _round(numbers.error_max[j]) if numbers.error_count else None,
                "max_at_stamp": numbers.error_at[j],
            }
            for j, name in enumerate(numbers.joint_names)
        },
        "problems": numbers.problems,
    }


def _nothing_done(replay: Replay, numbers: Numbers) -> str:
    """Why not one policy step gave a chunk, or "" if one did."""
    if not numbers.steps:
        return f"no policy step was taken: {replay.lacking()}"
    if numbers.failed == numbers.steps:
        return f"every policy step failed: {numbers.failure}"
    return ""


def timings(numbers: Numbers, wall: float, whole: float, span: float) -> dict[str, Any]:
    """What goes into timings.json: ms per stage, and how replaying (wall, s) and all that a user waits for (whole, s:
    loading the policy and writing the report besides) compare with the recording's own time (span, s)."""
    return {
        "wall_s": round(wall, 3),
        "times_real_time": round(span / wall, 2) if wall > 0 else None,
        "whole_s": round(whole, 3),
        "whole_times_real_time": round(span / whole, 2) if whole > 0 else None,
        "stages_ms": {name: _spread(values) for name, values in numbers.wall.items()},
    }


def table(report: dict[str, Any], clock: dict[str, Any]) -> str:
    """What a person looks for, one line each."""
    frames, policy, chunks, limits = (report[name] for name in ("frames", "policy", "chunks", "limits"))
    seams, joints = report["seams"], report["commanded_minus_recorded_rad"]
    engine = report["settings"]["engine"]
    worst = max(joints, key=lambda name: joints[name]["max"] or 0.0, default=None)
    rows = [
        ("recording", f"{report['duration_s']:.1f} s, {frames['color']} colour frames"),
        ("replayed in", f"{clock['wall_s']:.1f} s ({clock['times_real_time']} times real time), engine {engine}"),
        ("with loading and report", f"{clock['whole_s']:.1f} s ({clock['whole_times_real_time']} times real time)"),
        ("observations paired", f"{frames['paired']}, {frames['paired_and_not_due']} of them between two steps"),
        ("frames not used", _counts(frames["dropped"])),
        ("policy steps", f"{policy['steps']} ({policy['steps_per_s']:.1f} a second), {policy['chunks']} chunks"),
        ("held", _counts(policy["holds"], 100)),
        ("chunks carried out", f"{chunks['carried_out']} ({_counts(chunks['joined'])})"),
        ("chunks refused", _counts(chunks["refused"])),
        ("gap bridged at the seam", _text(seams["gap"], "rad")),
        ("seam left", _text(seams["seam_position"], "rad")),
        ("exposure to splice", _text(seams["latency"], "s")),
        ("rows clipped at limits", str(limits["rows_clipped_at_joint_limits"])),
        ("gate", _counts(limits["gate"])),
        ("stops", _counts(limits["stops"])),
    ]
    if worst is not None and joints[worst]["max"] is not None:
        entry, at = joints[worst], _stamp(joints[worst]["max_at_stamp"])
        text = f"most {entry['max']:.4f} rad ({worst}, stamp {at}), RMS {entry['rms']:.4f}"
        rows.append(("commanded - recorded", text))
    for name in ("decode", "vision", "language", "core", "policy", "step", "executor"):
        if name in clock["stages_ms"]:
            rows.append((f"{name}, wall", _text(clock["stages_ms"][name], "ms")))
    said = Counter(text.partition(" s: ")[2] for text in report["problems"])
    first = {text.partition(" s: ")[2]: text for text in reversed(report["problems"])}
    for text, times in list(said.items())[:8]:
        rows.append(("problem", first[text][:200] + (f" ({times} times)" if times > 1 else "")))
    if len(said) > 8:
        rows.append(("problem", f"and {len(said) - 8} more, see report.json"))
    rows += [("note", text) for text in report["notes"]]
    if report["ended"]:
        rows.append(("ENDED EARLY", report["ended"]))
    if report["nothing_done"]:
        rows.append(("NOTHING DONE", report["nothing_done"]))
    return "\n".join(f"{name:26}{text}" for name, text in rows)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _spread(values: array) -> dict[str, float] | None:
    if not len(values):
        return None
    data = np.frombuffer(values)
    p50, p99 = np.percentile(data, [50, 99])
    return {"p50": _round(p50), "p99": _round(p99), "max": _round(data.max()), "mean": _round(data.mean())}


def _round(value: float) -> float:
    """Nine digits: enough for any reader, and below what one byte-identical run needs."""
    return float(f"{value:.9g}")


def _counts(counts: dict[str, int], width: int = 200) -> str:
    text = ", ".join(f"{n} {name}" for name, n in counts.items()) or "none"
    return text if len(text) <= width else text[: width - 3] + "..."


def _text(spread: dict[str, float] | None, unit: str) -> str:
    if spread is None:
        return "none"
    return f"p50 {spread['p50']:.3g}, p99 {spread['p99']:.3g}, most {spread['max']:.3g} {unit}"


def _stamp(ns: int) -> str:
    return f"{ns // 10**9}.{ns % 10**9:09d}"

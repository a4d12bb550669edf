"""One pass with all its files: report.json, timings.json, timeline.png and bag/ in a folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_nodes.replay import report, timeline_plot
from vla_nodes.replay.bag_progress import Progress
from vla_nodes.replay.open_loop import Sink
from vla_nodes.replay.outputs import BagSink, Numbers, made_here
from vla_nodes.replay.session import ReplayError, Session


def one_pass(session: Session, out: Path, images: bool, sinks: Sequence[Sink], progress: Progress) -> str:
    """Replay once, write the files, print the table; returns "" or why the result is incomplete."""
    made, clock = measured_pass(session, out, images, sinks, progress)
    print(report.table(made, clock))
    print(f"{'written to':26}{out}")
    return made["ended"] or made["nothing_done"]


def measured_pass(
    session: Session, out: Path, images: bool, sinks: Sequence[Sink], progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replay once and write the files: (report, timings)."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "bag").exists() and not made_here(out / "bag"):
        raise ReplayError(f"{out / 'bag'} is there and was not made by a replay: name another --out")
    names = session.joint_names()
    numbers = Numbers(names[0])
    base = session.description.robot.base_frame
    writer = BagSink(out / "bag", session.bag, base, images, names)
    try:
        run, ended, wall = session.replay([numbers, writer, *sinks], images, progress)
    finally:
        progress.close()
        writer.close()
    made = report.summary(run, numbers, session.settings(), session.bag.notes, ended)
    report.write_json(out / "report.json", made)
    timeline_plot.draw(numbers, out / "timeline.png")
    clock = report.timings(numbers, wall, time.perf_counter() - session.began, made["duration_s"])
    report.write_json(out / "timings.json", clock)
    return made, clock

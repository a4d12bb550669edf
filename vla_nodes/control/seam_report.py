"""The seam report of a run: how the chunks were joined, in numbers and as a picture.

A run is recorded as JSON lines, one per chunk (`SeamRecord.line`), and read back by

    python -m vla_nodes seams RUN.jsonl --out seams.png
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vla_nodes import cli
from vla_nodes.control.executor import ExecutorOutput
from vla_nodes.control.trajectory import Trajectory, sample

MAX_LINE = 1 << 20  # characters of a record; a chunk of 512 rows needs half of that
NUMBERS = ("begin", "gap", "gap_velocity", "seam_position", "seam_velocity", "latency", "stretched", "starved")


@dataclass(frozen=True)
class SeamRecord:
    """One chunk: `time` s when it came; the numbers of ExecutorOutput (same names, units); names, stamp, times (N,),
    positions, velocities, accelerations (N, J): the published arm trajectory, empty if there was none."""

    time: float
    cause: str
    mode: str
    begin: float
    gap: float
    gap_velocity: float
    seam_position: float
    seam_velocity: float
    latency: float
    dropped: int
    clipped: int
    stretched: float
    starved: float
    names: tuple[str, ...] = ()
    stamp: float = 0.0
    times: tuple = ()
    positions: tuple = ()
    velocities: tuple = ()
    accelerations: tuple = ()

    @classmethod
    def of(cls, output: ExecutorOutput, now: float) -> SeamRecord:
        """The record of what `ChunkExecutor.submit` returned at `now` s."""
        numbers = {name: getattr(output, name) for name in ("mode", "dropped", "clipped", *NUMBERS)}
        arm = output.arm
        if arm is None or arm.velocities is None or arm.accelerations is None:
            return cls(now, output.cause, **numbers)
        fields = (np.round(x, 9).tolist() for x in (arm.times, arm.positions, *arm.derivatives()))
        return cls(now, output.cause, **numbers, names=arm.joint_names, stamp=arm.stamp,
                   **dict(zip(("times", "positions", "velocities", "accelerations"), fields, strict=True)))  # fmt: skip

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, line: str) -> SeamRecord:
        """The record of one line. Raises ValueError if it is none."""
        if len(line) > MAX_LINE:
            raise ValueError(f"a record of {len(line)} characters is none of ours")
        try:
            record = cls(**json.loads(line))
            values = [float(getattr(record, name)) for name in ("time", "stamp", *NUMBERS)]
            arm = record.trajectory()
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a seam record: {error}") from None
        if not np.isfinite(values).all() or (arm is not None and not np.isfinite(arm.positions).all()):
            raise ValueError("not a seam record: a number is not finite")
        return record

    def trajectory(self) -> Trajectory | None:
        """The published arm trajectory, or None. Raises ValueError if its fields do not fit each other."""
        if not len(self.times):
            return None
        t = np.array(self.times, dtype=float)
        q, qd, qdd = (np.array(x, dtype=float) for x in (self.positions, self.velocities, self.accelerations))
        if t.ndim != 1 or any(x.shape != (len(t), len(self.names)) for x in (q, qd, qdd)) or (np.diff(t) <= 0.0).any():
            raise ValueError(f"a trajectory of {len(self.names)} joints and {t.size} points does not fit together")
        return Trajectory(tuple(self.names), t, q, qd, qdd, self.stamp)


class SeamLog:
    """Records appended to a file, one line each, up to `most` bytes in all."""

    def __init__(self, path: Path, most: int = 256_000_000) -> None:
        """Raises OSError if the file cannot be written."""
        self.problem = ""
        self._file = path.open("a")
        self._most = most

    def write(self, record: SeamRecord) -> None:
        """Append; what the disk refuses is kept in `problem`, because no log is worth a stop."""
        if self.problem:
            return
        try:
            if self._file.tell() > self._most:
                self.problem = f"full at {self._most} bytes"
                return
            self._file.write(record.line() + "\n")
        except OSError as error:
            self.problem = str(error)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.problem = str(error)

    def close(self) -> None:
        self.flush()
        self._file.close()


def read(path: Path) -> list[SeamRecord]:
    """The records of a file. Raises OSError, or ValueError naming the line."""
    records = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                records.append(SeamRecord.parse(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return records


def reference(records: Iterable[SeamRecord], rate: float = 100.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the controller followed: times (T,) s, positions and velocities (T, J); each trajectory until the next."""
    arms = [(r.time, arm) for r in records if (arm := r.trajectory()) is not None]
    t, q, qd = [], [], []
    for k, (come, arm) in enumerate(arms):
        until = arms[k + 1][0] if k + 1 < len(arms) else arm.end
        at = np.arange(math.ceil(come * rate), math.ceil(until * rate)) / rate
        position, velocity, _ = sample(arm, at - arm.stamp)
        t.append(at)
        q.append(position)
        qd.append(velocity)
    if not t:
        return np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0))
    return np.concatenate(t), np.concatenate(q), np.concatenate(qd)


def report(records: list[SeamRecord]) -> str:
    """The numbers a person looks for, one line each."""
    used = [r for r in records if r.mode]
    refused = Counter(r.cause for r in records if not r.mode)

    def spread(name: str, scale: float, unit: str) -> str:
        if not used:
            return "none"
        p50, p99 = np.percentile([getattr(r, name) * scale for r in used], [50, 99])
        return f"p50 {p50:.3g}, p99 {p99:.3g}, most {max(getattr(r, name) for r in used) * scale:.3g} {unit}"

    modes = Counter(r.mode for r in used)
    rows = [
        ("chunks", f"{len(used)} carried out ({', '.join(f'{n} {m}' for m, n in modes.most_common()) or 'none'})"),
        ("refused", ", ".join(f"{n} {cause}" for cause, n in refused.most_common()) or "none"),
        ("gap a naive executor jumps", f"{spread('gap', 1.0, 'rad')}; {spread('gap_velocity', 1.0, 'rad/s')}"),
        ("seam left by ours", f"{spread('seam_position', 1.0, 'rad')}; {spread('seam_velocity', 1.0, 'rad/s')}"),
        ("latency exposure to splice", spread("latency", 1e3, "ms")),
        ("rows already past", f"{sum(r.dropped for r in used)}"),
        ("rows clipped at joint limits", f"{sum(r.clipped for r in used)}"),
        ("time stretched per chunk", spread("stretched", 1.0, "s")),
        ("time starved", f"{sum(r.starved for r in used):.2f} s in {sum(r.starved > 0.0 for r in used)} chunks"),
    ]
    return "\n".join(f"{name:30}{text}" for name, text in rows)


def show(args: cli.Options) -> None:
    """The command."""
    records = read(args.run)
    print(report(records))
    if args.out:
        from vla_nodes.control.seam_plot import draw

        draw(records, args.out)


command = cli.Command(
    "seams",
    """
    The seam report of a run: how the chunks were joined, in numbers and as a picture.
    """,
    show,
    cli.argument("RUN", "JSON lines, written by action_node's seam_log or control-bench --seam-log", type=cli.PATH),
    cli.out("also draw the run, into this PNG file", metavar="FILE"),
    examples="""
    python -m vla_nodes seams run.jsonl --out seams.png
    """,
    errors=(OSError, ValueError),
)


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

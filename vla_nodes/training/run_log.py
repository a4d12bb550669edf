"""What a person sees of a training run: lines and a bar, log.jsonl, TensorBoard, and the curves as a PNG at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vla_nodes.progress import progress, say

LOG, CURVES, TENSORBOARD = "log.jsonl", "curves.png", "tensorboard"
HELD_OUT, CLOSED_LOOP = "held out/", "closed loop/"


def line(values: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in values.items())


def rows(path: Path) -> list[dict[str, Any]]:
    """The log of a run, without a last line cut off by a kill."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found


class Progress:
    """One run's voice. Everything but the first process is silent."""

    def __init__(self, settings, first: bool) -> None:
        self.settings, self.first = settings, first
        self.path = settings.out / LOG
        self._file = self._board = self._bar = None

    def begin(self, step: int) -> None:
        """Start, or go on at ``step``: what a killed run logged after the state it saved is logged again."""
        if not self.first:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in rows(self.path) if row["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)
        self._file = open(self.path, "a")  # noqa: SIM115
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path.parent / TENSORBOARD), purge_step=step + 1)
        except ImportError:
            self.say("no TensorBoard logs: pip install tensorboard would add them; log.jsonl has the same figures")
        self._bar = progress(total=1.0, bar="{percentage:3.0f}%|{bar}| {postfix}", line="{percentage:3.0f} %{postfix}")

    def say(self, text: str) -> None:
        if self.first:
            say(text)

    def _write(self, loop, figures: dict[str, float]) -> None:
        if self._file is None:
            return
        row = {"step": loop.step, "minutes": round(loop.seconds / 60, 4), **figures}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in figures.items():
                self._board.add_scalar(key if "/" in key else f"training/{key}", value, loop.step)

    def log(self, loop, figures: dict[str, float]) -> None:
        self.last = figures
        self._write(loop, figures)
        if self._bar is not None and not self._bar.disable:
            self._bar.n = loop.share()
            self._bar.set_postfix_str(f"step {loop.step}, loss {figures['loss']:.3f}")

    def show(self, loop, speed: float) -> None:
        """The line a minute: where it is, how fast, how long to go, and the loss with its terms."""
        figures = getattr(self, "last", None)
        if figures is None:
            return
        left = loop.seconds * (1 / loop.share() - 1) / 60
        terms = {key.removeprefix("terms/"): value for key, value in figures.items() if key.startswith("terms/")}
        rest = {k: v for k, v in figures.items() if "/" not in k and k not in ("loss", "gradient", "learning_rate")}
        self.say(f"{loop.seconds / 60:5.1f} min, {left:.1f} to go, step {loop.step}, {speed:.2f} steps/s, "
                 f"loss {figures['loss']:.3f} ({line(terms)}); {line(rest)}")  # fmt: skip

    def measured(self, loop, figures: dict[str, float]) -> None:
        self._write(loop, {HELD_OUT + key: value for key, value in figures.items()})
        self.say(f"          held out, step {loop.step}: {line(figures)}")

    def scored(self, loop, figures: dict[str, float], text: str) -> None:
        self._write(loop, {CLOSED_LOOP + key: value for key, value in figures.items()})
        self.say(f"          {text}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            self._file.close()
            try:
                picture = draw(rows(self.path), self.path.parent / CURVES, str(self.path.parent))
                self.say(f"{self.path}, {picture}" if picture else f"{self.path}")
            except ImportError:
                self.say(f"{self.path}; no picture of the curves: pip install matplotlib would add it")


def smooth(values: list[float], share: float = 0.04) -> list[float]:
    """Running mean over a share of the curve, centred, so that a noisy loss can be read."""
    half = int(len(values) * share / 2)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def draw(log: list[dict[str, Any]], path: Path, title: str) -> Path | None:
    """Loss terms, training and held-out accuracies, and closed-loop success over the minutes; None without a log."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in log:
        for key, value in row.items():
            if key not in ("step", "minutes", "gradient"):
                times, values = curves.setdefault(key, ([], []))
                times.append(row["minutes"])
                values.append(value)
    if not curves:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[str, str, bool]]] = {"loss": [], "right": [], "error": [], "closed loop": []}
    for key in curves:
        name, held = key.removeprefix(HELD_OUT), key.startswith(HELD_OUT)
        if key.startswith(CLOSED_LOOP):
            panels["closed loop"].append((key, key.removeprefix(CLOSED_LOOP), True))
        elif name == "loss" or key.startswith("terms/"):
            panels["loss"].append((key, name.removeprefix("terms/"), held))
        elif name.endswith((" mm", " cm")):
            panels["error"].append((key, name, held))
        elif name != "learning_rate":
            panels["right"].append((key, name, held))
    used = {name: entries for name, entries in panels.items() if entries}
    figure = Figure(figsize=(12, 3.4 * len(used)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (panel, entries) in zip(figure.subplots(len(used), 1, squeeze=False)[:, 0], used.items(), strict=True):
        colours: dict[str, str] = {}
        for key, name, held in sorted(entries, key=lambda entry: entry[1]):
            times, values = curves[key]
            colour = colours.setdefault(name, f"C{len(colours) % 10}")
            if held:
                axis.plot(times, values, "o-", markersize=3, color=colour, label=f"{name}, held out"
                          if panel != "closed loop" else name)  # fmt: skip
            else:
                axis.plot(times, smooth(values), color=colour, linewidth=2 if name == "loss" else 1, label=name,
                          alpha=0.6 if f"{HELD_OUT}{name}" in curves else 1.0)  # fmt: skip
        if panel == "loss" and min(min(curves[k][1]) for k, _, _ in entries) > 0:
            axis.set_yscale("log")
        axis.set(title=panel, xlabel="minutes")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    return path

"""The seam report as a PNG: reference positions and velocities, what each seam bridged, latency, and time lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from vla_nodes.control.seam_report import SeamRecord, reference

WIDTH, HEIGHT, LEFT, PAD = 1280, 230, 80, 26  # pixels of a panel, its left margin, and above and below its plot
INK, GRID, SEAM = (40, 40, 40), (225, 225, 225), (190, 190, 190)
# Okabe and Ito's palette, told apart by colour-blind readers too (BGR).
COLOURS = ((178, 114, 0), (0, 159, 230), (115, 158, 0), (0, 94, 213), (167, 121, 204), (233, 180, 86), (0, 0, 0))
FLOOR = 1e-12  # lower end of logarithmic panels
SUBPIXEL = 4  # bits


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, three to seven of them, from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2.5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6.0)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Panel:
    """One plot: a title, a scale, and lines over time."""

    def __init__(self, title: str, span: tuple[float, float], values: np.ndarray, log: bool = False) -> None:
        self.image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
        self.span, self.log = span, log
        shown = self._scaled(values) if values.size else np.array([0.0, 1.0])
        self.low, self.high = float(shown.min()), float(shown.max())
        if self.high - self.low < 1e-9:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        for value in ticks(self.low, self.high):
            y = int(round(float(self._y(value))))
            cv2.line(self.image, (LEFT, y), (WIDTH - 12, y), GRID, 1)
            self._text(f"{10.0**value:.0e}" if log else f"{value:.4g}", (6, y + 4))
        self._text(title, (LEFT, 16))
        for end, x in ((span[0], LEFT), (span[1], WIDTH - 70)):
            self._text(f"{end:.1f} s", (x, HEIGHT - 6))

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return np.log10(np.maximum(values, FLOOR)) if self.log else values

    def _y(self, value: np.ndarray | float) -> np.ndarray:
        return HEIGHT - PAD - (np.asarray(value) - self.low) / (self.high - self.low) * (HEIGHT - 2 * PAD)

    def _x(self, time: np.ndarray) -> np.ndarray:
        return LEFT + (time - self.span[0]) / max(self.span[1] - self.span[0], 1e-9) * (WIDTH - 12 - LEFT)

    def _text(self, text: str, at: tuple[int, int], colour: Sequence[int] = INK) -> None:
        cv2.putText(self.image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)

    def seams(self, times: np.ndarray) -> None:
        for x in self._x(times).astype(int):
            cv2.line(self.image, (int(x), PAD), (int(x), HEIGHT - PAD), SEAM, 1)

    def line(self, times: np.ndarray, values: np.ndarray, colour: Sequence[int], label: str, place: int) -> None:
        """A curve over times (T,), values (T,), and its label at the top, `place` from the right."""
        points = np.stack([self._x(times), self._y(self._scaled(values))], axis=1) * 2**SUBPIXEL
        cv2.polylines(self.image, [points.round().astype(np.int32)[:, None]], False, colour, 1, cv2.LINE_AA, SUBPIXEL)
        self._text(label, (WIDTH - 12 - 105 * (place + 1), 16), colour)


def draw(records: list[SeamRecord], path: Path) -> None:
    """Write the picture of a run. Raises ValueError for a run without motion, OSError if it cannot be written."""
    t, q, qd = reference(records)
    used = [r for r in records if r.mode]
    if not len(t) or not used:
        raise ValueError("nothing was carried out in this run: there is nothing to draw")
    names = next(r.names for r in records if r.names)
    origin = min(float(t[0]), used[0].time)
    t, come = t - origin, np.array([r.time for r in used]) - origin
    span = (0.0, float(max(t[-1], come[-1])))
    begins = np.array([r.begin for r in used]) - origin
    panels = []
    for title, values in (("reference, rad (grey: seams)", q), ("reference velocity, rad/s", qd)):
        panel = Panel(title, span, values)
        panel.seams(begins)
        for j, name in enumerate(names):
            panel.line(t, values[:, j], COLOURS[j % len(COLOURS)], name[-14:], len(names) - 1 - j)
        panels.append(panel)
    gap, left = (np.array([getattr(r, name) for r in used]) for name in ("gap", "seam_position"))
    title = f"at the seam, rad: gap bridged, and what is left ({FLOOR:.0e}: nothing)"
    panel = Panel(title, span, np.concatenate([gap, left]), log=True)
    panel.line(come, gap, COLOURS[3], "gap", 1)
    panel.line(come, left, COLOURS[0], "left", 0)
    panels.append(panel)
    latency = 1e3 * np.array([r.latency for r in used])
    panel = Panel("latency from exposure to splice, ms", span, np.append(latency, 0.0))
    panel.line(come, latency, COLOURS[0], f"p50 {np.percentile(latency, 50):.0f} ms", 1)
    p99 = np.full(2, np.percentile(latency, 99))
    panel.line(np.array(span), p99, COLOURS[3], f"p99 {p99[0]:.0f} ms", 0)
    panels.append(panel)
    stretched, starved = (np.array([getattr(r, name) for r in used]) for name in ("stretched", "starved"))
    clipped = sum(r.clipped for r in used)
    title = f"per chunk, s: stretched to keep limits, and at rest before it ({clipped} rows clipped)"
    panel = Panel(title, span, np.concatenate([stretched, starved, [0.0, 0.1]]))
    panel.line(come, stretched, COLOURS[0], "stretched", 1)
    panel.line(come, starved, COLOURS[3], "at rest", 0)
    panels.append(panel)
    if not cv2.imwrite(str(path), np.concatenate([p.image for p in panels])):
        raise OSError(f"could not write {path}")

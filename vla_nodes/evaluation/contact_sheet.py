"""Failures at a glance: a row of frames each, from start to end, under the sentence and the reason."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from vla_nodes.evaluation.metrics import Result

FRAMES = 8  # of a row
SIZE, CAPTION = 168, 40  # px: a frame's edge, the height of a row's caption
ROWS = 15  # on a page
FONT = cv2.FONT_HERSHEY_SIMPLEX

Frames = list[tuple[float, np.ndarray]]  # (s, (H, W, 3) uint8 RGB)


def pick(count: int) -> list[int]:
    """Which of ``count`` moments to show: first, last, and evenly between."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, FRAMES))})


def row(result: Result, frames: Frames) -> np.ndarray:
    """One failure as an RGB image."""
    image = np.full((SIZE + CAPTION, FRAMES * SIZE, 3), 24, np.uint8)
    said = "".join(c if c.isascii() and c.isprintable() else "?" for c in result.instruction)
    for line, text, color in (
        (15, f"{result.suite}, seed {result.seed}: {said}", (235, 235, 235)),
        (32, f"{result.reason}; {result.detail}", (255, 170, 90)),
    ):
        cv2.putText(image, text[: FRAMES * SIZE // 8], (6, line), FONT, 0.45, color, 1, cv2.LINE_AA)
    for column, (seconds, frame) in enumerate(frames[:FRAMES]):
        small = cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        cv2.putText(small, f"{seconds:.1f} s", (4, SIZE - 6), FONT, 0.4, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(small, f"{seconds:.1f} s", (4, SIZE - 6), FONT, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
        image[CAPTION:, column * SIZE : (column + 1) * SIZE] = small
    return image


def write(folder: Path, failures: list[tuple[Result, Frames]]) -> list[Path]:
    """failures.png, and failures-2.png and so on where one page does not hold them all. Returns what was written."""
    written = []
    for page, start in enumerate(range(0, len(failures), ROWS), 1):
        path = folder / ("failures.png" if page == 1 else f"failures-{page}.png")
        sheet = np.concatenate([row(*failure) for failure in failures[start : start + ROWS]])
        if not cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
            raise OSError(f"cannot write {path}")
        written.append(path)
    return written

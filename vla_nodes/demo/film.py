"""What ./run leaves in out/<time>/: a GIF of what the camera saw, and a line of JSON per policy step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np

FRAME_PERIOD = 0.1
"""s of simulated time between two frames of the GIF."""
MAX_FRAMES = 1200
SCALE = 2
CAPTION = 44
"""Height of the caption in pixels."""


def captioned(image: np.ndarray, lines: list[str]) -> np.ndarray:
    """An (H, W, 3) RGB image, enlarged, above up to two lines of text."""
    large = cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_LINEAR)
    strip = np.full((CAPTION, large.shape[1], 3), 24, np.uint8)
    for row, line in enumerate(lines[:2]):
        place = (8, 17 + 19 * row)
        cv2.putText(strip, line[:60], place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (235, 235, 235), 1, cv2.LINE_AA)
    return np.concatenate([large, strip])


class Film:
    """Frames at a steady simulated rate, written as an animated GIF."""

    def __init__(self) -> None:
        self.frames: list[np.ndarray] = []
        self._next = -math.inf

    def add(self, stamp: float, image: np.ndarray, lines: list[str]) -> None:
        """Keep an (H, W, 3) uint8 RGB frame of simulated time `stamp` [s] if it is due."""
        if stamp < self._next or len(self.frames) >= MAX_FRAMES:
            return
        late = stamp - self._next > FRAME_PERIOD
        self._next = stamp + FRAME_PERIOD if late else self._next + FRAME_PERIOD
        self.frames.append(captioned(image, lines))

    def write(self, path: Path) -> bool:
        """Write the GIF; False when there is no frame."""
        from PIL import Image

        if not self.frames:
            return False
        # one palette for all frames, from a few spread over the film: no flicker, and a smaller file; one that covers
        # rare colours too, since what the arm is after is small
        sample = np.concatenate(self.frames[:: max(1, len(self.frames) // 4)][:4])
        palette = Image.fromarray(sample).quantize(255, method=Image.Quantize.MAXCOVERAGE)
        images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames]
        milliseconds = round(1000 * FRAME_PERIOD)
        images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0, optimize=False)
        return True


class StepLog:
    """JSON lines, one per policy step, flushed as they come so that a killed run keeps its log."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        self.count = 0

    def write(self, **values: Any) -> None:
        """Append one step; NaN and infinity become null, for JSON has neither."""
        self._file.write(json.dumps(plain(values)) + "\n")
        self.count += 1

    def close(self) -> None:
        self._file.close()


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numpy to lists, floats to six decimals, non-finite to None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value

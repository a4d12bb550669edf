"""What both stages do to recorded episodes: which of them are held out, and how their images are varied."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np


def number(path: Path) -> int:
    """The number of an episode, which says whether it is held out: its name's, or one that follows from its name."""
    return int(path.stem) if path.stem.isdecimal() else zlib.crc32(path.stem.encode())


def augment(color: np.ndarray, depth: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Light, colour and sensor noise; depth with holes, sometimes with nothing at all. Returns float32 colour 0..1."""

    def noise(size: float, shape: tuple[int, ...]) -> np.ndarray:
        return np.float32(size) * rng.standard_normal(shape, np.float32)

    image = color.astype(np.float32) / 255
    gain = rng.uniform(0.75, 1.25) * rng.uniform(0.93, 1.07, 3)
    image = (image - 0.5) * np.float32(rng.uniform(0.85, 1.15)) + 0.5
    image = image * gain.astype(np.float32) + noise(rng.uniform(0, 0.025), image.shape)
    if rng.random() < 0.12:
        return np.clip(image, 0, 1), np.zeros_like(depth)
    depth = depth + (depth > 0) * noise(rng.uniform(0, 0.003), depth.shape)
    size = depth.shape[0]
    for _ in range(rng.integers(0, 5) if rng.random() < 0.4 else 0):
        y, x, h, w = rng.integers(0, size, 2).tolist() + rng.integers(2, 30, 2).tolist()
        depth[y : y + h, x : x + w] = 0
    if rng.random() < 0.4:
        depth[rng.random(depth.shape, np.float32) < rng.uniform(0, 0.1)] = 0
    return np.clip(image, 0, 1), np.maximum(depth, 0)

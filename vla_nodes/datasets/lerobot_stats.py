"""Statistics as a LeRobotDataset v3.0 keeps them: per feature min, max, mean, std, count and five quantiles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
SAMPLES = 100  # images of an episode that are looked at
STRIDE = 4  # and of each image every so many pixels in both directions


def describe(values: np.ndarray) -> dict[str, np.ndarray]:
    """Over the first axis of (T, ...); a column of scalars gives arrays of shape (1,)."""
    rows = np.asarray(values, np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    out = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    out["count"] = np.array([len(rows)])
    return out | {name: np.quantile(rows, q, axis=0) for name, q in QUANTILES.items()}


def describe_images(images: Iterable[np.ndarray], unit: float) -> dict[str, np.ndarray]:
    """Per channel of (H, W, C) images, values divided by `unit`; arrays of shape (C, 1, 1) as LeRobot has them."""
    seen = [image[::STRIDE, ::STRIDE].reshape(-1, image.shape[-1]) for image in images]
    out = describe(np.concatenate(seen) / unit)
    return {name: value.reshape(-1, 1, 1) for name, value in out.items() if name != "count"} | {
        "count": np.array([len(seen)])
    }


def aggregate(parts: list[dict[str, dict[str, np.ndarray]]]) -> dict[str, dict[str, np.ndarray]]:
    """Of all episodes from each: exact, but for the quantiles, which are averaged by count as LeRobot does."""
    total: dict[str, dict[str, np.ndarray]] = {}
    for key in parts[0]:
        rows = [part[key] for part in parts]
        counts = np.array([float(row["count"][0]) for row in rows])
        share = counts / counts.sum()

        def mean(name: str, rows: Any = rows, share: Any = share) -> np.ndarray:
            return sum(w * row[name] for w, row in zip(share, rows, strict=True))

        centre = mean("mean")
        spread = sum(w * (row["std"] ** 2 + (row["mean"] - centre) ** 2) for w, row in zip(share, rows, strict=True))
        total[key] = {
            "min": np.min([row["min"] for row in rows], axis=0), "max": np.max([row["max"] for row in rows], axis=0),
            "mean": centre, "std": np.sqrt(spread), "count": np.array([int(counts.sum())]),
            **{name: mean(name) for name in QUANTILES},
        }  # fmt: skip
    return total

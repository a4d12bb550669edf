"""Episodes on disk: one safetensors file each, images as lossless PNG streams, everything about it in the header.

Used by simulation, bags and training alike. No pickle; a damaged file is a DataError naming it, never a crash later.

Arrays (T ticks):
    color, depth           PNG bytes of (H, W, 3) uint8 RGB and (H, W) uint16 mm (0 = invalid), with offsets (T + 1,)
    stamp                  (T,) s
    joint_positions, joint_velocities  (T, 7) rad, rad/s
    gripper                (T,) opening 0..1
    ee_pose                (T, 4, 4) tool in base
    actions                (T, horizon, 7) the chunk to imitate, action space ee_delta
    primitive              (T,) index into the header's ``primitives``
    labels (simulation only, never an input): segmentation (T, h, w) uint8 index into the header's ``things`` + 1,
    thing_positions (T, n, 3) m in base
Header (JSON under "episode"): instruction, intrinsics, camera_pose, period, tick, things, primitives, success, ...
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

MAX_BYTES = 512 * 1024 * 1024  # a longer recording is cut into episodes
MAX_PIXELS = 4096 * 4096  # a PNG claiming more is refused before it is decoded


class DataError(ValueError):
    """An episode that cannot be used; one line naming the file and the reason."""


@dataclass
class Episode:
    header: dict[str, Any]
    arrays: dict[str, np.ndarray]
    path: Path | None = None
    _images: dict[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.arrays["stamp"])

    def color(self, tick: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return cv2.cvtColor(self._image("color", tick, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    def depth(self, tick: int) -> np.ndarray:
        """(H, W) float32 m, 0 = invalid."""
        return self._image("depth", tick, cv2.IMREAD_UNCHANGED).astype(np.float32) * 1e-3

    def _image(self, name: str, tick: int, flags: int) -> np.ndarray:
        start, end = self.arrays[f"{name}_offsets"][tick : tick + 2]
        data = self.arrays[f"{name}_png"][start:end]
        # A PNG starts with 8 bytes of signature and its IHDR, whose size fields stand at 16 and 20.
        width, height = (int.from_bytes(data[i : i + 4].tobytes(), "big") for i in (16, 20))
        image = cv2.imdecode(data, flags) if len(data) > 24 and 0 < width * height <= MAX_PIXELS else None
        wanted = (3, np.uint8) if name == "color" else (2, np.uint16)
        if image is None or (image.ndim, image.dtype) != wanted:
            raise DataError(f"{self.path}: {name} image {tick} does not decode")
        return image

    def require(self, *names: str) -> None:
        """DataError naming the first array or header entry that is not there."""
        for name in names:
            if name not in self.arrays and name not in self.header:
                raise DataError(f"{self.path}: has no {name}, which this use of it needs")


class EpisodeWriter:
    """Collects ticks and writes the file at once, under a temporary name first: a kill never leaves half a file."""

    def __init__(self) -> None:
        self._rows: dict[str, list[np.ndarray]] = {}
        self._streams: dict[str, list[np.ndarray]] = {"color": [], "depth": []}

    def __len__(self) -> int:
        return len(self._streams["color"])

    def add(self, color: np.ndarray, depth: np.ndarray, **row: Any) -> None:
        """One tick: colour (H, W, 3) uint8 RGB, depth (H, W) float32 m, and further arrays, the same keys each time."""
        millimetres = np.nan_to_num(depth, posinf=0.0, neginf=0.0) * 1000 + 0.5
        millimetres = np.where(millimetres < 65536, np.maximum(millimetres, 0), 0).astype(np.uint16)
        for name, image in (("color", cv2.cvtColor(color, cv2.COLOR_RGB2BGR)), ("depth", millimetres)):
            self._streams[name].append(cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])
        for key, value in row.items():
            self._rows.setdefault(key, []).append(np.asarray(value))

    def column(self, name: str, rows: np.ndarray) -> None:
        """An array (T, ...) that is known only at the end, one row for each tick added."""
        self._rows[name] = list(np.asarray(rows))

    def keep(self, ticks: np.ndarray) -> None:
        """Only these ticks (indices or a mask), of everything added so far."""
        chosen = np.arange(len(self))[ticks]
        for rows in (*self._rows.values(), *self._streams.values()):
            rows[:] = [rows[i] for i in chosen]

    def rows(self, name: str) -> np.ndarray:
        """(T, ...) what was added under a name."""
        return np.stack(self._rows[name])

    def write(self, path: Path, header: dict[str, Any]) -> None:
        short = [key for key, rows in self._rows.items() if len(rows) != len(self)]
        if short or not len(self):
            raise DataError(f"{path}: {len(self)} ticks, not all of them with {short or 'anything'}: nothing written")
        arrays = {key: np.ascontiguousarray(np.stack(rows)) for key, rows in self._rows.items()}
        for name, stream in self._streams.items():
            arrays[f"{name}_png"] = np.concatenate(stream)
            arrays[f"{name}_offsets"] = np.cumsum([0, *(len(s) for s in stream)]).astype(np.int64)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            save_file(arrays, partial, metadata={"episode": json.dumps(header)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # still there only when writing failed, on a full disk say


def _header(file: Any) -> dict[str, Any]:
    header = json.loads((file.metadata() or {})["episode"])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def read_header(path: Path) -> dict[str, Any]:
    """The header alone, without touching the arrays."""
    try:
        with safe_open(path, framework="numpy") as file:
            return _header(file)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a readable episode ({error})") from None


def read(path: Path) -> Episode:
    """A whole episode; DataError names the file when it is damaged, foreign or too large."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: not a readable episode ({error})") from None
    if size > MAX_BYTES:
        raise DataError(f"{path}: {size} bytes is more than the {MAX_BYTES} an episode may have")
    try:
        with safe_open(path, framework="numpy") as file:
            header = _header(file)
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:  # two: bfloat16
        raise DataError(f"{path}: not a readable episode ({error})") from None
    ticks = {key: value.shape[:1] for key, value in arrays.items() if not key.endswith(("_png", "_offsets"))}
    if "stamp" not in ticks or len(set(ticks.values())) != 1 or ticks["stamp"] in ((), (0,)):
        raise DataError(f"{path}: arrays of different lengths, or empty: {ticks}")
    for name in ("color", "depth"):
        stream, offsets = arrays.get(f"{name}_png"), arrays.get(f"{name}_offsets")
        if (
            stream is None
            or offsets is None
            or stream.dtype != np.uint8
            or stream.ndim != 1
            or offsets.dtype.kind != "i"
        ):
            raise DataError(f"{path}: no {name} images")
        if offsets.shape != (ticks["stamp"][0] + 1,) or offsets[0] != 0 or offsets[-1] != len(stream):
            raise DataError(f"{path}: {name} images do not match the {ticks['stamp'][0]} ticks")
    return Episode(header, arrays, path)


def files(folder: Path) -> list[Path]:
    """The episode files of a folder, in order of name. DataError when there are none."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise DataError(f"{folder}: no episodes (*.safetensors) there; make some with: python -m vla_nodes collect")
    return found

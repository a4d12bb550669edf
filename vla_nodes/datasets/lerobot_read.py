"""Reads a LeRobotDataset v3.0 folder: rows, tasks, colour and depth, whoever wrote it.

Nothing outside the folder is touched and every size is bounded: path templates other than the format's own are refused,
as are parquet files and images of absurd size. Whatever is wrong is a DataError of one line that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vla_nodes.datasets.episode import MAX_PIXELS, DataError
from vla_nodes.datasets.lerobot_write import DATA_PATH, VERSION, VIDEO_PATH, import_pyarrow
from vla_nodes.datasets.video_codec import DepthCoding, read_video

MAX_JSON = 64 << 20
MAX_PARQUET = 1 << 30  # bytes of one file, packed and unpacked; LeRobot's own are 100 MB
MAX_EPISODES = 1_000_000
PNG = b"\x89PNG\r\n\x1a\n"
NUMBERS = {"float32", "float64", "int64", "int32", "int16", "uint8", "bool"}


class LeRobotFolder:
    """An opened folder.

    fps; robot_type; features: {name: {"dtype", "shape", "names", "info"}}; tasks: {index: sentence}; episodes: one dict
    per episode, the columns of meta/episodes without the statistics.
    """

    def __init__(self, folder: Path) -> None:
        self._arrow = import_pyarrow()
        self.folder = folder
        info = self._info()
        try:
            self.fps = float(info["fps"])
            self.robot_type = str(info.get("robot_type") or "")
            self.features: dict[str, dict] = {str(key): dict(value) for key, value in info["features"].items()}
            for key, feature in self.features.items():
                feature["shape"] = tuple(int(n) for n in feature["shape"])
                if "/" in key or ".." in key or not isinstance(feature["dtype"], str):
                    raise ValueError(f"feature {key!r} is not one")
            if not 0 < self.fps <= 10_000:
                raise ValueError(f"fps is {self.fps}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"no entry {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{folder}/meta/info.json: {problem}") from None
        for name, wanted in (("data_path", DATA_PATH), ("video_path", VIDEO_PATH)):
            if info.get(name, wanted) not in (wanted, None):
                raise DataError(f"{folder}/meta/info.json: {name} is {info[name]!r}; v3.0's own is read: {wanted}")
        self.tasks = self._tasks()
        self.episodes = self._episodes()
        self._cached: tuple[Path | None, tuple[str, ...], Any] = (None, (), None)

    def __len__(self) -> int:
        return len(self.episodes)

    # -- what an import asks for -------------------------------------------------------------------------------------
    def cameras(self, depth: bool = False) -> list[str]:
        """Names of the image features that are colour, or depth."""
        return [key for key, feature in self.features.items()
                if feature["dtype"] in ("video", "image") and _is_depth(feature) == depth]  # fmt: skip

    def names(self, key: str) -> list[str]:
        """Names of a vector's components; "0", "1", ... where the folder gives none."""
        names = self.features[key].get("names")
        if isinstance(names, dict):  # {"motors": [...]} in older recordings
            names = [name for part in names.values() for name in (part if isinstance(part, list) else [part])]
        count = int(np.prod(self.features[key]["shape"]))
        return [str(name) for name in names] if names and len(names) == count else [str(i) for i in range(count)]

    def columns(self, index: int, keys: list[str]) -> dict[str, np.ndarray]:
        """Rows of episode `index`: {key: (T, ...)}, in the shape and type that info.json declares."""
        row = self.episodes[index]
        path = self._data_file(row)
        length = int(row["length"])
        table = self._table(path, tuple(sorted({*keys, "episode_index"})))
        try:
            chosen = np.asarray(table["episode_index"].to_numpy()) == int(row["episode_index"])
            table = table.filter(self._arrow.array(chosen))
            out = {key: self._array(table[key], key) for key in keys}
        except (KeyError, TypeError, ValueError, self._arrow.ArrowException) as error:
            raise DataError(f"{path}: episode {index}: {_line(error)}") from None
        for key, values in out.items():
            if len(values) != length:
                raise DataError(f"{path}: episode {index} has {len(values)} rows of {key}, its metadata says {length}")
        return out

    def images(self, index: int, key: str) -> Iterator[np.ndarray]:
        """Episode `index`, frame by frame: colour (H, W, 3) uint8 RGB, or depth (H, W) float32 m, by the feature."""
        feature, row = self.features[key], self.episodes[index]
        height, width = _size(feature)
        depth = _is_depth(feature)
        if feature["dtype"] == "image":
            frames = self._stored_images(index, key, depth)
        else:
            path, start = self._video(row, key)
            frames = read_video(path, start, int(row["length"]), "depth" if depth else "color", self.fps)
        coding = depth_coding(feature, self.folder) if depth and feature["dtype"] == "video" else None
        for t, frame in enumerate(frames):
            if frame.shape[:2] != (height, width):
                raise DataError(
                    f"{self.folder}: {key}, episode {index}, frame {t} is {frame.shape}, not {height, width}"
                )
            yield frame if coding is None else coding.decode(frame)

    # -- files -------------------------------------------------------------------------------------------------------
    def _info(self) -> dict[str, Any]:
        path = self.folder / "meta" / "info.json"
        try:
            if path.stat().st_size > MAX_JSON:
                raise ValueError(f"larger than {MAX_JSON} bytes")
            info = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(info, dict):
                raise ValueError("no JSON object")
        except FileNotFoundError:
            raise DataError(f"{self.folder}: no LeRobot folder: it has no meta/info.json") from None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: not readable ({_line(error)})") from None
        if info.get("codebase_version") != VERSION:
            raise DataError(
                f"{self.folder}: LeRobot format {info.get('codebase_version')!r}, {VERSION} is read: convert it with "
                "python -m lerobot.datasets.v30.convert_dataset_v21_to_v30"
            )
        return info

    def _parquet(self, path: Path) -> Any:
        """A parquet file, opened if the size that its header claims is within the bounds."""
        try:
            if path.stat().st_size > MAX_PARQUET:
                raise ValueError(f"larger than {MAX_PARQUET} bytes")
            file = self._arrow.parquet.ParquetFile(path)
            groups = range(file.metadata.num_row_groups)
            if sum(file.metadata.row_group(i).total_byte_size for i in groups) > MAX_PARQUET:
                raise ValueError(f"unpacks to more than {MAX_PARQUET} bytes")
            return file
        except (OSError, ValueError, self._arrow.ArrowException) as error:
            raise DataError(f"{path}: not a readable parquet file ({_line(error)})") from None

    def _read(self, path: Path, columns: list[str] | None = None) -> Any:
        file = self._parquet(path)
        try:
            missing = [name for name in columns or [] if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path}: has no column {missing[0]}")
            return file.read(columns)
        except (OSError, ValueError, self._arrow.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: damaged ({_line(error)})") from None

    def _table(self, path: Path, keys: tuple[str, ...]) -> Any:
        """Columns of a data file; the last one stays in memory, since episodes stand one after the other."""
        if self._cached[:2] != (path, keys):
            self._cached = (path, keys, self._read(path, list(keys)))
        return self._cached[2]

    def _tasks(self) -> dict[int, str]:
        path = self.folder / "meta" / "tasks.parquet"
        table = self._read(path)
        names = [name for name in table.column_names if name != "task_index"]
        if "task_index" not in table.column_names or not names:
            raise DataError(f"{path}: has no task_index beside the sentence")
        # pandas wrote the sentences as the index: "task" since 0.5, "__index_level_0__" before.
        key = next((name for name in ("task", "__index_level_0__") if name in names), names[0])
        return dict(zip(table["task_index"].to_pylist(), map(str, table[key].to_pylist()), strict=True))

    def _episodes(self) -> list[dict[str, Any]]:
        files = sorted((self.folder / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
        rows: list[dict[str, Any]] = []
        for path in files:
            file = self._parquet(path)
            if len(rows) + file.metadata.num_rows > MAX_EPISODES:
                raise DataError(f"{path}: more than {MAX_EPISODES} episodes")
            wanted = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
            rows += self._read(path, wanted).to_pylist()
        for i, row in enumerate(rows):
            for name in ("episode_index", "length", "data/chunk_index", "data/file_index"):
                if not isinstance(row.get(name), int) or row[name] < 0:
                    raise DataError(f"{self.folder}/meta/episodes: episode {i} has no usable {name}")
        if not rows:
            raise DataError(f"{self.folder}: no episodes in meta/episodes")
        return sorted(rows, key=lambda row: row["episode_index"])

    def _data_file(self, row: dict[str, Any]) -> Path:
        names = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        return self.folder / DATA_PATH.format(**names)

    def _video(self, row: dict[str, Any], key: str) -> tuple[Path, float]:
        """The file that an episode's images are in, and the second they start at."""
        try:
            place = {name: int(row[f"videos/{key}/{name}"]) for name in ("chunk_index", "file_index")}
            start = float(row[f"videos/{key}/from_timestamp"])
            if min(place.values()) < 0 or not 0 <= start < 1e7:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{self.folder}/meta/episodes: no usable place of the video {key}") from None
        path = self.folder / VIDEO_PATH.format(video_key=key, **place)
        if not path.is_file():
            raise DataError(f"{path}: is missing")
        return path, start

    def _array(self, column: Any, key: str) -> np.ndarray:
        feature = self.features.get(key)
        if feature is None or feature["dtype"] not in NUMBERS:
            raise ValueError(f"{key} is {feature and feature['dtype']}, no numbers")
        values = np.array(column.to_pylist(), feature["dtype"])
        shape = () if feature["shape"] == (1,) else feature["shape"]
        if values.shape[1:] != shape and values.shape[1:] != feature["shape"]:
            raise ValueError(f"{key} has rows of shape {values.shape[1:]}, info.json says {shape}")
        return values.reshape(len(values), *shape)

    def _stored_images(self, index: int, key: str, depth: bool) -> Iterator[np.ndarray]:
        if depth:
            raise DataError(f"{self.folder}: {key} keeps depth as single images; depth video is read")
        row = self.episodes[index]
        path = self._data_file(row)
        table = self._table(path, tuple(sorted({key, "episode_index"})))
        chosen = np.asarray(table["episode_index"].to_numpy()) == int(row["episode_index"])
        for t, cell in enumerate(table.filter(self._arrow.array(chosen))[key].to_pylist()):
            data = (cell or {}).get("bytes") if isinstance(cell, dict) else None
            if not data or not data.startswith(PNG) or len(data) < 33:
                raise DataError(f"{path}: {key}, episode {index}, frame {t} is no PNG image")
            width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
            image = cv2.imdecode(np.frombuffer(data, np.uint8), 1) if 0 < width * height <= MAX_PIXELS else None
            if image is None:
                raise DataError(f"{path}: {key}, episode {index}, frame {t} does not decode")
            yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def depth_coding(feature: dict, folder: Path) -> DepthCoding:
    """How a depth feature's codes mean metres: its info block, or LeRobot's defaults for what that leaves out."""
    info = feature.get("info") or {}
    try:
        return DepthCoding(float(info.get("video.depth_min", 0.01)), float(info.get("video.depth_max", 10.0)),
                           float(info.get("video.shift", 3.5)), bool(info.get("video.use_log", True)))  # fmt: skip
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder}/meta/info.json: {_line(error)}") from None


def _is_depth(feature: dict) -> bool:
    info = feature.get("info") or feature.get("video_info") or {}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def _size(feature: dict) -> tuple[int, int]:
    """Height and width, whether channels come first or last (`names` says, else the smaller end is the channels)."""
    shape, names = feature["shape"], feature.get("names")
    if len(shape) != 3:
        raise DataError(f"an image feature has shape {shape}, not three numbers")
    first = str(names[0]).startswith("c") if isinstance(names, list) and names else shape[0] in (1, 3)
    return (shape[1], shape[2]) if first else (shape[0], shape[1])


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Episodes as a LeRobotDataset v3.0 folder: parquet rows, mp4 images, JSON and parquet metadata.

Layout (huggingface.co/docs/lerobot/lerobot-dataset-v3), many episodes to a file:

    meta/info.json, meta/stats.json, meta/tasks.parquet, meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/file-000.parquet
    videos/<feature>/chunk-000/file-000.mp4

Features written (T frames, float32 unless said):

    observation.images.<camera>        H.264 video; observation.images.<camera>_depth: 12-bit depth video (video_codec)
    observation.state                  (8,) the arm's joints, rad, and the gripper's opening 0..1
    observation.velocity               (7,) rad/s
    observation.ee_pose                (7,) tool in base, x y z (m) qx qy qz qw
    action                             (7,) tool motion until the next frame: dx dy dz (m), rotation vector (rad), base
                                       axes; and the gripper opening wanted
    vla.action_chunk                   (H, 7) the chunk to imitate, rows `period` apart
    vla.stamp                          float64, s, exposure time; `timestamp` is frame / fps, as the format demands
    vla.primitive                      int64, -1 = unknown

What else an episode's header says stands as JSON in the column `vla_nodes/header` of meta/episodes. Labels that only a
simulator has (segmentation, thing_positions) are not carried over. pyarrow is imported where it is used.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vla_nodes.datasets.episode import DataError, Episode
from vla_nodes.datasets.lerobot_stats import SAMPLES, aggregate, describe, describe_images
from vla_nodes.datasets.video_codec import KEYFRAMES, DepthCoding, VideoWriter
from vla_nodes.poses import pose_rows

VERSION = "v3.0"
CHUNK_FILES, DATA_MB, VIDEO_MB = 1000, 100, 200  # files per chunk folder, largest files: LeRobot's defaults
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
HEADER = "vla_nodes/header"
ACTION_NAMES = ["dx", "dy", "dz", "rx", "ry", "rz", "gripper"]
COUNTERS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64",
            "task_index": "int64"}  # fmt: skip


def import_pyarrow() -> Any:
    """pyarrow with its parquet module, or a DataError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("a LeRobot folder needs pyarrow: pip install 'vla_nodes[lerobot]'") from None
    return pyarrow


def frame_actions(chunks: np.ndarray, rows: int) -> np.ndarray:
    """The first `rows` rows of each chunk (T, H, 7) as one motion (T, 7): increments composed, the last gripper."""
    out = np.empty((len(chunks), 7))
    for t, chunk in enumerate(np.asarray(chunks, np.float64)[:, :rows]):
        turn = np.eye(3)
        for row in chunk:  # increments in base axes apply on the left
            turn = cv2.Rodrigues(row[3:6])[0] @ turn
        out[t] = [*chunk[:, :3].sum(axis=0), *cv2.Rodrigues(turn)[0][:, 0], chunk[-1, 6]]
    return out


class LeRobotWriter:
    """Writes episodes of one robot and one image size, one after the other; `close` makes the folder whole.

    Everything is written under <folder>.partial and renamed at the end: a kill never leaves half a data set that looks
    whole. Frames are `tick` s apart (1 / tick must be a whole number, LeRobot's fps).
    """

    def __init__(
        self, folder: Path, tick: float, period: float, joint_names: tuple[str, ...], camera: str = "camera",
        robot_type: str = "panda", coding: DepthCoding | None = None, crf: int = 18,
    ) -> None:  # fmt: skip
        self._arrow = import_pyarrow()
        self.fps = round(1 / tick)
        if abs(self.fps * tick - 1) > 1e-6 or self.fps < 1:
            raise DataError(f"tick {tick} s is no whole number of frames per second, which LeRobot's fps has to be")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder}: exists and is not empty: choose another folder")
        self.rows = max(1, round(tick / period))
        self.folder, self._partial = folder, folder.with_name(folder.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self.robot_type, self.joint_names, self.crf = robot_type, joint_names, crf
        self.coding = coding or DepthCoding()
        self.color_key = f"observation.images.{camera}"
        self.depth_key = self.color_key + "_depth"
        self.features: dict[str, dict] = {}
        self.out_of_range = 0  # depth readings beyond the coding's reach, written as "no reading"
        self.frames = 0
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict] = []
        self._stats: list[dict] = []
        self._videos: dict[str, VideoWriter] = {}
        self._video_file = {self.color_key: [0, 0], self.depth_key: [0, 0]}
        self._data: Any = None
        self._data_file, self._data_bytes = [0, 0], 0

    # -- one episode -------------------------------------------------------------------------------------------------
    def add(self, episode: Episode) -> None:
        """Append an episode. DataError when it lacks something or does not fit the ones before."""
        episode.require("instruction", "joint_positions", "joint_velocities", "gripper", "ee_pose", "actions")
        arrays, count, index = episode.arrays, len(episode), len(self._episodes)
        if arrays["joint_positions"].shape[1:] != (len(self.joint_names),):
            raise DataError(f"{episode.path}: joints {arrays['joint_positions'].shape[1:]}, not {self.joint_names}")
        self._declare(episode)
        columns = {
            "observation.state": np.hstack([arrays["joint_positions"], arrays["gripper"][:, None]]),
            "observation.velocity": arrays["joint_velocities"],
            "observation.ee_pose": pose_rows(arrays["ee_pose"]),
            "action": frame_actions(arrays["actions"], self.rows),
            "vla.action_chunk": arrays["actions"],
            "vla.stamp": arrays["stamp"],
            "vla.primitive": arrays.get("primitive", np.full(count, -1)),
            "timestamp": np.arange(count) / self.fps,
            "frame_index": np.arange(count),
            "episode_index": np.full(count, index),
            "index": np.arange(self.frames, self.frames + count),
            "task_index": np.full(count, self._tasks.setdefault(episode.header["instruction"], len(self._tasks))),
        }
        columns = {key: np.asarray(value, self.features[key]["dtype"]) for key, value in columns.items()}
        row: dict[str, Any] = {
            "episode_index": index, "tasks": [episode.header["instruction"]], "length": count,
            "dataset_from_index": self.frames, "dataset_to_index": self.frames + count,
        }  # fmt: skip
        row["data/chunk_index"], row["data/file_index"] = self._write_rows(columns)
        row |= self._write_images(episode)
        row["meta/episodes/chunk_index"] = row["meta/episodes/file_index"] = 0
        row[HEADER] = json.dumps(episode.header)
        stats = {key: describe(value) for key, value in columns.items()}
        picked = np.unique(np.linspace(0, count - 1, min(count, SAMPLES)).round().astype(int))
        stats[self.color_key] = describe_images((episode.color(t) for t in picked), 255.0)
        stats[self.depth_key] = describe_images((episode.depth(t)[..., None] for t in picked), 1e-3)
        row |= {f"stats/{key}/{name}": v.tolist() for key, values in stats.items() for name, v in values.items()}
        self._stats.append(stats)
        self._episodes.append(row)
        self.frames += count

    def _declare(self, episode: Episode) -> None:
        """Features from the first episode; a later one must agree."""
        height, width = episode.color(0).shape[:2]
        horizon = episode.arrays["actions"].shape[1]
        names = list(self.joint_names)
        image = {"video.height": height, "video.width": width, "video.fps": self.fps, "video.g": KEYFRAMES,
                 "video.video_backend": "pyav", "has_audio": False}  # fmt: skip
        coding = {"video.depth_min": self.coding.near, "video.depth_max": self.coding.far,
                  "video.shift": self.coding.shift, "video.use_log": self.coding.log,
                  "video.extra_options": {"x265-params": "lossless=1"}, "depth_unit": "mm"}  # fmt: skip
        axes = ["height", "width", "channels"]
        features: dict[str, dict] = {
            self.color_key: {"dtype": "video", "shape": [height, width, 3], "names": axes, "info": {
                **image, "video.codec": "h264", "video.pix_fmt": "yuv420p", "video.channels": 3, "video.crf": self.crf,
                "is_depth_map": False}},
            self.depth_key: {"dtype": "video", "shape": [height, width, 1], "names": axes, "info": {
                **image, "video.codec": "hevc", "video.pix_fmt": "gray12le", "video.channels": 1, **coding,
                "is_depth_map": True}},
            "observation.state": {"dtype": "float32", "shape": [len(names) + 1], "names": [*names, "gripper"]},
            "observation.velocity": {"dtype": "float32", "shape": [len(names)], "names": names},
            "observation.ee_pose": {"dtype": "float32", "shape": [7], "names": ["x", "y", "z", "qx", "qy", "qz", "qw"]},
            "action": {"dtype": "float32", "shape": [7], "names": ACTION_NAMES},
            "vla.action_chunk": {"dtype": "float32", "shape": [horizon, 7], "names": ["row", "column"]},
            "vla.stamp": {"dtype": "float64", "shape": [1], "names": None},
            "vla.primitive": {"dtype": "int64", "shape": [1], "names": None},
            **{key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in COUNTERS.items()},
        }  # fmt: skip
        if self.features and features != self.features:
            key = next(k for k in features if features[k] != self.features[k])
            now, before = features[key]["shape"], self.features[key]["shape"]
            raise DataError(
                f"{episode.path}: {key} is {now}, in the episodes before it was {before}: one size a folder"
            )
        self.features = features

    def _write_rows(self, columns: dict[str, np.ndarray]) -> tuple[int, int]:
        pa = self._arrow
        size = sum(value.nbytes for value in columns.values())
        if self._data is not None and self._data_bytes + size > DATA_MB << 20:
            self._data.close()
            self._data, self._data_bytes = None, 0
            _advance(self._data_file)
        table = pa.table({key: _column(pa, value) for key, value in columns.items()})
        if self._data is None:
            path = self._partial / DATA_PATH.format(chunk_index=self._data_file[0], file_index=self._data_file[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pa.parquet.ParquetWriter(path, table.schema, compression="snappy")
        self._data.write_table(table)
        self._data_bytes += size
        return self._data_file[0], self._data_file[1]

    def _write_images(self, episode: Episode) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for key in (self.color_key, self.depth_key):
            height, width, _ = self.features[key]["shape"]
            where, writer = self._video_file[key], self._videos.get(key)
            if writer is not None and writer.bytes >= VIDEO_MB << 20:
                writer.close()
                writer = None
                _advance(where)
            if writer is None:
                path = self._partial / VIDEO_PATH.format(video_key=key, chunk_index=where[0], file_index=where[1])
                kind = "depth" if key == self.depth_key else "color"
                writer = self._videos[key] = VideoWriter(path, self.fps, height, width, kind, self.crf)
            first = writer.frames
            for t in range(len(episode)):
                if key == self.color_key:
                    writer.add(episode.color(t))
                else:
                    codes, lost = self.coding.encode(episode.depth(t))
                    self.out_of_range += lost
                    writer.add(codes)
            span = (first / self.fps, writer.frames / self.fps)
            row |= {f"videos/{key}/chunk_index": where[0], f"videos/{key}/file_index": where[1],
                    f"videos/{key}/from_timestamp": span[0], f"videos/{key}/to_timestamp": span[1]}  # fmt: skip
        return row

    # -- the whole ---------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Metadata, and the rename. DataError when no episode was added."""
        if not self._episodes:
            self.abort()
            raise DataError(f"{self.folder}: no episodes, nothing written")
        pa = self._arrow
        self._data.close()
        for writer in self._videos.values():
            writer.close()
        meta = self._partial / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True, exist_ok=True)
        pa.parquet.write_table(
            pa.Table.from_pylist(self._episodes), self._partial / EPISODES_PATH.format(chunk_index=0, file_index=0)
        )
        pa.parquet.write_table(_tasks_table(pa, list(self._tasks)), meta / "tasks.parquet")
        stats = {key: {n: v.tolist() for n, v in values.items()} for key, values in aggregate(self._stats).items()}
        (meta / "stats.json").write_text(json.dumps(stats, indent=1) + "\n")
        info = {
            "codebase_version": VERSION, "robot_type": self.robot_type, "total_episodes": len(self._episodes),
            "total_frames": self.frames, "total_tasks": len(self._tasks), "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_MB, "video_files_size_in_mb": VIDEO_MB, "fps": self.fps,
            "splits": {"train": f"0:{len(self._episodes)}"}, "data_path": DATA_PATH, "video_path": VIDEO_PATH,
            "features": self.features,
        }  # fmt: skip
        (meta / "info.json").write_text(json.dumps(info, indent=1) + "\n")
        if self.folder.is_dir():
            self.folder.rmdir()  # the folder is empty: the constructor refuses any other
        os.replace(self._partial, self.folder)

    def abort(self) -> None:
        """Delete what was written so far."""
        for writer in self._videos.values():
            writer.close()
        if self._data is not None:
            self._data.close()
        shutil.rmtree(self._partial, ignore_errors=True)


def _advance(where: list[int]) -> None:
    where[1] += 1
    if where[1] == CHUNK_FILES:
        where[:] = where[0] + 1, 0


def _column(pa: Any, values: np.ndarray) -> Any:
    """(T,), (T, n) or (T, m, n) as an Arrow column: scalars, lists of fixed length, lists of lists."""
    flat = pa.array(values.reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        flat = pa.FixedSizeListArray.from_arrays(flat, values.shape[axis])
    if values.ndim == 3:  # LeRobot's reader casts matrices from plain lists only
        flat = flat.cast(pa.list_(pa.list_(pa.from_numpy_dtype(values.dtype))))
    return flat


def _tasks_table(pa: Any, tasks: list[str]) -> Any:
    """task_index by task, with the note by which pandas makes `task` the index again, where LeRobot looks it up."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    types = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": stored, "metadata": None}
        for name, (kind, stored) in types.items()
    ]
    note = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0",
            "creator": {"library": "pyarrow", "version": pa.__version__}}  # fmt: skip
    return table.replace_schema_metadata({b"pandas": json.dumps(note).encode()})

"""Finds the storage files of a recording: by its metadata.yaml, or by looking, where there is none that can be read.

All that is needed to read a recording is in its storage files. metadata.yaml adds their order, how they are
compressed, and what the recorder noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from vla_nodes.rosbag import metadata

STORAGES = {".mcap": "mcap", ".db3": "sqlite3"}
PACKED = ".zstd"
"""Suffix after the storage's own of a file that is compressed as a whole."""
ROS1_MAGIC = b"#ROSBAG V"


class BagError(ValueError):
    """One line: which bag, file or topic, what is wrong, and the remedy."""


@dataclass
class Layout:
    """files: in order; packed: how they are compressed beside their own chunks, "file", "message", "" or None where
    nothing says so; custom: what the recorder noted; notes: one line for each thing that was missing; problem: why the
    files are not those of metadata.yaml, in its order, or ""."""

    files: list[Path]
    packed: str | None = None
    custom: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problem: str = ""


def find(path: Path) -> Layout:
    """The storage files of a bag folder, or of one storage file by itself. BagError for what is no recording."""
    if not path.exists():
        raise BagError(f"{path}: there is no such bag")
    if path.is_file():
        return _alone(path)
    problem = "the folder has no metadata.yaml"
    if (path / metadata.FILE).is_file():
        try:
            information = metadata.read(path)
            return _listed(path, information)
        except BagError:
            raise
        except ValueError as error:
            problem = str(error)
    files = sorted((file for file in path.iterdir() if _is_storage(file)), key=lambda file: (len(file.name), file.name))
    if not files:
        if old := sorted(file for file in path.iterdir() if file.suffix == ".bag"):
            raise BagError(_ros1(old[0]))
        what = problem.removeprefix("the folder ")
        raise BagError(f"{path}: not a rosbag2 recording: {what}, and the folder has no .mcap or .db3 file")
    files = [file for file in files if file.suffix != PACKED or file.with_suffix("") not in files]
    return Layout(files, notes=[f"{problem}: read without it, from {_some(files)}"], problem=problem)


def _alone(path: Path) -> Layout:
    with path.open("rb") as file:
        if path.suffix == ".bag" or file.read(len(ROS1_MAGIC)) == ROS1_MAGIC:
            raise BagError(_ros1(path))
    if not _is_storage(path):
        raise BagError(f"{path}: not a rosbag2 recording: give its folder, or a .mcap or .db3 file")
    try:
        whole = _listed(path.parent, metadata.read(path.parent))
    except ValueError:
        return Layout([path], problem="a file by itself")
    if path.name not in (file.name for file in whole.files):
        return Layout([path], problem="a file by itself")
    return Layout([path], whole.packed, whole.custom)


def _listed(folder: Path, information: Mapping[str, Any]) -> Layout:
    """As metadata.yaml says. ValueError with one line where a value is missing or of a wrong type."""
    file = folder / metadata.FILE
    version = _value(file, information, "version", int)
    if version > 9:
        raise BagError(f"{file}: version {version}, up to 9 is known: update vla_nodes")
    storage = _value(file, information, "storage_identifier", str)
    if storage and storage not in STORAGES.values():
        raise BagError(f"{folder}: storage '{storage}' cannot be read, only {' and '.join(STORAGES.values())}")
    names = [PurePath(str(name)).name for name in _value(file, information, "relative_file_paths", list)]
    packed = _value(file, information, "compression_mode", str, "").lower().replace("none", "")
    compression = _value(file, information, "compression_format", str, "")
    if packed not in ("", "file", "message"):
        raise BagError(f"{folder}: compression mode '{packed[:20]}' is unknown")
    if packed and compression != "zstd":
        raise BagError(f"{folder}: compression '{compression[:20]}' cannot be read, only zstd: `ros2 bag convert` it")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise BagError(f"{folder}: metadata.yaml names {missing[0]}, which is not there ({len(missing)} missing)")
    if not names:
        raise BagError(f"{folder}: the bag holds no messages (metadata.yaml names no file)")
    if alien := [name for name in names if not _is_storage(folder / name)]:
        raise BagError(f"{folder}: metadata.yaml names {alien[0]}, which is no .mcap or .db3 file")
    notes = [] if storage else ["metadata.yaml does not name its storage: found out from the files"]
    return Layout([folder / name for name in names], packed, information["custom_data"], notes)


_MISSING = object()


def _value(file: Path, information: Mapping[str, Any], key: str, kind: type, default: Any = _MISSING) -> Any:
    value = information.get(key)
    if value is None:
        value = default
    if value is _MISSING:
        raise ValueError(f"{file}: no key '{key}'")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{file}: {key} is {str(value)[:20]!r}, which is no {kind.__name__}")
    return value


def _is_storage(path: Path) -> bool:
    suffixes = path.suffixes[-2:]
    return path.is_file() and (path.suffix in STORAGES or (path.suffix == PACKED and suffixes[0] in STORAGES))


def _ros1(path: Path) -> str:
    command = f"rosbags-convert --src {path} --dst {path.with_suffix('')}"
    return f"{path}: a recording of ROS 1: convert it with `{command}` (pip install rosbags)"


def _some(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")

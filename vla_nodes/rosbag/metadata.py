"""metadata.yaml of a rosbag2 folder, version 9 (Jazzy), and the topics that it lists.

Layout: rosbag2_storage/src/rosbag2_storage/yaml.cpp of ROS 2 Jazzy. Read by `ros2 bag`, the rosbags library and ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vla_nodes import bounded_yaml

FILE = "metadata.yaml"
KEY = "rosbag2_bagfile_information"
"""Under which everything stands."""
MAX_BYTES = 4 << 20
"""Of metadata.yaml; 1,000 topics take 1 MB. A bag of more than 3,000 is read without."""
MAX_VALUES = 150_000
"""In metadata.yaml; 1,000 topics take 45,000."""
_FOREVER = {"sec": 9223372036, "nsec": 854775807}


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    """Writes equal values out in full: not every YAML reader of bags knows aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass(frozen=True)
class Qos:
    """The part of a publisher's offered QoS that is needed to play its messages back."""

    reliable: bool = True
    latched: bool = False
    depth: int = 10

    def profile(self) -> dict[str, Any]:
        return {
            "history": "keep_last",
            "depth": self.depth,
            "reliability": "reliable" if self.reliable else "best_effort",
            "durability": "transient_local" if self.latched else "volatile",
            "deadline": dict(_FOREVER),
            "lifespan": dict(_FOREVER),
            "liveliness": "automatic",
            "liveliness_lease_duration": dict(_FOREVER),
            "avoid_ros_namespace_conventions": False,
        }


@dataclass(frozen=True)
class Topic:
    """name: as resolved in the graph ("/joint_states"); type: "sensor_msgs/msg/JointState"; definition: its text with
    those it refers to (ros2msg), "" where none is known; hash: RIHS01 type hash or ""; profiles: YAML of the offered
    QoS where a bag being repaired brings its own."""

    name: str
    type: str
    definition: str = ""
    hash: str = ""
    qos: Qos = field(default_factory=Qos)
    profiles: str | None = None
    encoding: str = "ros2msg"

    def offered(self) -> str:
        """Offered QoS profiles as the YAML text that an MCAP channel carries."""
        return self.profiles if self.profiles is not None else dump([self.qos.profile()])


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)


def _profiles(topic: Topic) -> list[Any]:
    """Offered QoS as values; none where a recording that is repaired brings text that is not understood."""
    try:
        return bounded_yaml.parse(topic.offered(), MAX_VALUES) or []
    except bounded_yaml.YamlError:
        return []


def bag_information(
    file: str,
    topics: Sequence[Topic],
    counts: Mapping[str, int],
    start: int,
    end: int,
    custom: Mapping[str, str],
) -> dict[str, Any]:
    """The content of metadata.yaml. start, end: ns of the first and last message, 0 where there is none."""
    times = {"duration": {"nanoseconds": end - start}, "starting_time": {"nanoseconds_since_epoch": start}}
    total = sum(counts.values())
    return {
        "version": 9,
        "storage_identifier": "mcap",
        **times,
        "message_count": total,
        "topics_with_message_count": [
            {
                "topic_metadata": {
                    "name": topic.name,
                    "type": topic.type,
                    "serialization_format": "cdr",
                    "offered_qos_profiles": _profiles(topic),
                    "type_description_hash": topic.hash,
                },
                "message_count": counts.get(topic.name, 0),
            }
            for topic in topics
        ],
        "compression_format": "",
        "compression_mode": "",
        "relative_file_paths": [file],
        "files": [{"path": file, **times, "message_count": total}],
        "custom_data": dict(custom),
        "ros_distro": os.environ.get("ROS_DISTRO", ""),
    }


def write(folder: Path, information: Mapping[str, Any]) -> None:
    """Replace metadata.yaml in one step, so that it is never half written."""
    partial = folder / f"{FILE}.partial"
    partial.write_text(dump({KEY: dict(information)}), encoding="utf-8")
    os.replace(partial, folder / FILE)


def read(folder: Path) -> dict[str, Any]:
    """What stands in metadata.yaml. ValueError with one line where it is missing or cannot be read."""
    file = folder / FILE
    if not file.is_file():  # a pipe would be waited for
        raise ValueError(f"{file}: no such file")
    try:
        return information(bounded_yaml.read(file, MAX_BYTES, MAX_VALUES))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except bounded_yaml.YamlError:
        raise
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def information(document: Any) -> dict[str, Any]:
    """The part of metadata.yaml that says something, with its custom_data as strings. ValueError: one line."""
    if not isinstance(document, dict) or not isinstance(document.get(KEY), dict):
        raise ValueError(f"no key {KEY} with the facts of a bag under it")
    found = dict(document[KEY])
    custom = found.get("custom_data") or {}
    if not isinstance(custom, dict):
        raise ValueError(f"custom_data is {type(custom).__name__}, not a mapping")
    found["custom_data"] = {str(key): str(value) for key, value in custom.items()}
    return found

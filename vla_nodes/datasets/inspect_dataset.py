"""What is in a folder of episodes, a LeRobot folder or a recording: tables, and a contact sheet of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vla_nodes.datasets import episode as episodes
from vla_nodes.datasets.episode import DataError
from vla_nodes.datasets.lerobot_read import LeRobotFolder
from vla_nodes.messages.convert import seconds
from vla_nodes.pipeline.observe import color_pixels
from vla_nodes.progress import progress
from vla_nodes.rosbag.read import Bag, BagError, open_bag
from vla_nodes.rosbag.topics import resolve

ROWS, COLUMNS, THUMB, CAPTION = 24, 6, 160, 22  # of the contact sheet: episodes, frames of each, pixels
Say = Callable[[str], None]


@dataclass(frozen=True)
class Strip:
    """A row of the contact sheet."""

    caption: str
    images: list[np.ndarray]  # (H, W, 3) uint8 RGB


def inspect(path: Path, say: Say, remaps: Sequence[str] = ()) -> list[Strip]:
    """Describe the folder or recording at `path`, and give the strips of its contact sheet. DataError, BagError."""
    if (path / "meta" / "info.json").is_file():
        return _lerobot(path, say)
    if path.is_dir() and any(path.glob("*.safetensors")):
        return _episodes(path, say)
    if path.is_file() or (path / "metadata.yaml").is_file() or any(path.glob("*.mcap")) or any(path.glob("*.db3")):
        return _bag(path, say, remaps)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    raise DataError(f"{path}: neither episodes (*.safetensors), nor a LeRobot folder (meta/info.json), nor a recording")


def contact_sheet(strips: Sequence[Strip], path: Path) -> None:
    """A PNG with one strip under the other."""
    rows = []
    for strip in strips:
        band = np.full((CAPTION + THUMB, COLUMNS * THUMB, 3), 255, np.uint8)
        text = strip.caption.encode("ascii", "replace").decode()[:110]
        cv2.putText(band, text, (4, CAPTION - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        for i, image in enumerate(strip.images[:COLUMNS]):
            scale = THUMB / max(image.shape[:2])
            size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
            small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            band[CAPTION : CAPTION + size[1], i * THUMB : i * THUMB + size[0]] = small
        rows.append(band)
    if not rows:
        raise DataError(f"{path}: no images to show")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR)):
        raise DataError(f"{path}: cannot be written")


def table(rows: Sequence[Sequence[str]], say: Say) -> None:
    """Columns flush left; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _picked(count: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(COLUMNS, count)).round().astype(int)).tolist()


def _shown(values: np.ndarray) -> str:
    return "  ".join(f"{v:8.3f}" for v in values)


def _statistics(say: Say, columns: dict[str, list[np.ndarray]]) -> None:
    say("\nstatistics: lowest, mean, highest")
    for name, parts in columns.items():
        rows = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(np.float64)
        for label, values in (("min", rows.min(0)), ("mean", rows.mean(0)), ("max", rows.max(0))):
            say(f"  {name:16} {label:4} {_shown(values)}")


def _instructions(say: Say, spoken: Sequence[tuple[str, float]]) -> None:
    counts: Counter[str] = Counter(text for text, _ in spoken)
    say("")
    rows = [("instruction", "episodes", "seconds")]
    for text, count in counts.most_common(50):
        rows.append((text[:80], str(count), f"{sum(s for t, s in spoken if t == text):.1f}"))
    table(rows, say)
    if len(counts) > 50:
        say(f"... and {len(counts) - 50} more")


def _episodes(folder: Path, say: Say) -> list[Strip]:
    rows = [("episode", "ticks", "seconds", "rate Hz", "gap s", "outcome", "instruction")]
    spoken: list[tuple[str, float]] = []
    columns: dict[str, list[np.ndarray]] = {}
    strips: list[Strip] = []
    damaged, ticks, blind = [], 0, 0
    paths = episodes.files(folder)
    for path in progress(paths, unit="episodes", label="reading"):
        try:
            episode = episodes.read(path)
            episode.require("joint_positions", "gripper", "ee_pose", "actions")
            text = str(episode.header.get("instruction", ""))
            picked = [episode.color(t) for t in _picked(len(episode))]
            blind += not episode.depth(0).any()
        except DataError as error:
            damaged.append(str(error))
            continue
        stamps, arrays = episode.arrays["stamp"].astype(np.float64), episode.arrays
        span, gaps = float(stamps[-1] - stamps[0]), np.diff(stamps)
        marks: dict[Any, str] = {True: "success", False: "failure"}
        outcome = marks.get(episode.header.get("success"), "unmarked")
        rate = (len(episode) - 1) / span if span > 0 else 0.0
        widest = float(gaps.max()) if len(gaps) else 0.0
        rows.append((path.stem, str(len(episode)), f"{span:.1f}", f"{rate:.2f}", f"{widest:.2f}", outcome, text[:60]))
        spoken.append((text, span))
        ticks += len(episode)
        for name, values in (
            ("joints rad", arrays["joint_positions"]), ("tool m", arrays["ee_pose"][:, :3, 3]),
            ("gripper", arrays["gripper"].reshape(-1, 1)), ("action row", arrays["actions"]),
        ):  # fmt: skip
            columns.setdefault(name, []).append(values)
        if len(strips) < ROWS:
            strips.append(Strip(f"{path.stem}  {outcome}  {text}", picked))
    say(f"{folder}: {len(rows) - 1} episodes, {ticks} observations, {sum(s for _, s in spoken):.1f} s")
    for line in damaged:
        say(f"damaged: {line}")
    if len(rows) == 1:
        raise DataError(f"{folder}: none of its {len(paths)} episodes can be used")
    table(rows[:201], say)
    if len(rows) > 201:
        say(f"... and {len(rows) - 201} more")
    if blind:
        say(f"{blind} episodes begin without depth")
    _instructions(say, spoken)
    _statistics(say, columns)
    return strips


def _lerobot(path: Path, say: Say) -> list[Strip]:
    folder = LeRobotFolder(path)
    frames = sum(int(row["length"]) for row in folder.episodes)
    say(f"{path}: LeRobot v3.0, {len(folder)} episodes, {frames} frames, {folder.fps:g} fps, robot {folder.robot_type}")
    rows = [("feature", "kind", "shape", "names")]
    for key, feature in folder.features.items():
        names = ", ".join(folder.names(key))[:60] if len(feature["shape"]) == 1 < feature["shape"][0] else ""
        rows.append((key, feature["dtype"], " x ".join(map(str, feature["shape"])), names))
    table(rows, say)
    tasks = [(str((row.get("tasks") or ["?"])[0]), int(row["length"]) / folder.fps) for row in folder.episodes]
    _instructions(say, tasks)
    vectors: list[str] = [key for key in ("observation.state", "action") if key in folder.features]
    parts = [folder.columns(i, vectors) for i in range(min(len(folder), 1000))] if vectors else []
    _statistics(say, {key: [part[key] for part in parts] for key in vectors})
    camera = next(iter(folder.cameras()), None)
    strips = []
    for index in range(min(ROWS, len(folder))):
        if camera is None:
            break
        wanted = set(_picked(int(folder.episodes[index]["length"])))
        images = [image for t, image in enumerate(folder.images(index, camera)) if t in wanted]
        strips.append(Strip(f"episode {index}  {tasks[index][0]}", images))
    return strips


def _bag(path: Path, say: Say, remaps: Sequence[str]) -> list[Strip]:
    with open_bag(path) as bag:
        topics = resolve(bag, remaps)
        say(f"{path}: recording, {sum(bag.counts.values())} messages, {bag.duration:.1f} s")
        for key in ("outcome", "instruction", "checkpoint", "ended"):
            if bag.custom.get(key):
                say(f"{key}: {bag.custom[key][:200]}")
        count = bag.counts.get(topics["color"] or "", 0)
        wanted = set(np.linspace(0, count - 1, min(2 * COLUMNS, count)).round().astype(int).tolist())
        stamps: dict[str, list[float]] = {topic: [] for topic in topics.inputs()}
        texts: list[tuple[str, float]] = []
        pictures: list[np.ndarray] = []
        try:
            for topic, stamp, message in _messages(bag, list(stamps)):
                header = getattr(message, "header", None)
                seen = stamps[topic]
                seen.append(stamp * 1e-9 if header is None else seconds(header.stamp))
                if topic in (topics["instruction"], topics["active_instruction"]):
                    texts.append((f"{topic}: {message.data}"[:90], (stamp - bag.start) * 1e-9))
                if topic == topics["color"] and len(seen) - 1 in wanted:
                    pictures.append(color_pixels(message))
        except BagError as error:
            say(f"damaged: {error}")
        except ValueError as error:  # an image that cannot be decoded
            say(f"damaged: {topics['color']}: {error}")
        rows = [("topic", "type", "messages", "rate Hz", "gap s", "used as")]
        inputs = topics.inputs()
        for topic in sorted(bag.topics)[:200]:
            times = np.array(stamps.get(topic, ()))
            gaps = np.diff(times)
            span = float(times[-1] - times[0]) if len(times) > 1 else 0.0
            rate = f"{(len(times) - 1) / span:.1f}" if span > 0 else ""
            gap = f"{gaps.max():.3f}" if len(gaps) else ""
            rows.append((topic, bag.topics[topic], str(bag.counts[topic]), rate, gap, inputs.get(topic, "")))
        table(rows, say)
        if len(bag.topics) > 200:
            say(f"... and {len(bag.topics) - 200} more topics")
        for line in bag.notes:
            say(f"note: {line}")
        say("")
        for text, when in texts[:50]:
            say(f"{when:8.2f} s  {text}")
        halves = [pictures[:COLUMNS], pictures[COLUMNS:]]
        return [Strip(path.name if i == 0 else "", part) for i, part in enumerate(halves) if part]


def _messages(bag: Bag, topics: list[str]) -> Iterator:
    yield from bag.messages(topics) if topics else ()

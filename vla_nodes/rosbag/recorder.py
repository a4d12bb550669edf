"""A recording without ROS: one bag per episode, started, ended, and marked by the operator.

An episode is a rosbag2 folder `<out>/<date>-<time>_<number>`; what became of it stands in its metadata.yaml under
custom_data: `outcome` (unmarked, success, failure, discarded), `instruction` (the last one in force), `checkpoint`, and
`ended` (why: stop, clock set back, disk full; absent in a recording that was killed). A discarded episode is moved to
`<out>/discarded/`, never deleted. Each bag begins with the latest message of every latched topic, so that it can be
replayed by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from vla_nodes.rosbag import metadata
from vla_nodes.rosbag.metadata import Topic
from vla_nodes.rosbag.write import BagWriter

OUTCOMES = ("success", "failure", "discarded")
MAX_TEXT = 1000


class RecordingError(RuntimeError):
    """A request that cannot be met now; the text is one line for the operator."""


class Recording:
    """Takes messages at any time and writes them while an episode is being recorded. Thread-safe."""

    def __init__(self, out: Path, say: Callable[[str], None], **writer: Any) -> None:
        """
        Args:
            out: folder of the episodes; made if it is not there.
            say: where one-line reports go.
            writer: settings of `BagWriter`.

        Raises:
            OSError: `out` cannot be made or written to.
        """
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".write_test"
        probe.touch()
        probe.unlink()
        self.out, self._say, self._settings = out, say, writer
        self.error = ""
        """why the last episode ended by itself, or "" """
        self.episodes = 0
        self._lock = threading.RLock()
        self._bag: BagWriter | None = None
        self._last: Path | None = None
        self._topics: dict[str, Topic] = {}
        self._latched: dict[str, bytes] = {}
        self._begun = False
        self._facts: dict[str, str] = {}
        self._metadata: dict[str, dict[str, str]] = {}

    @property
    def running(self) -> bool:
        return self._bag is not None

    @property
    def bag(self) -> BagWriter | None:
        return self._bag

    # -- what comes in -----------------------------------------------------------------------------
    def declare(self, topic: Topic) -> None:
        """A topic to record. ValueError where it was declared with another type."""
        with self._lock:
            known = self._topics.get(topic.name)
            if known is not None and known.type != topic.type:
                raise ValueError(f"{topic.name} is {known.type}, and now {topic.type}: the new one is not recorded")
            self._topics[topic.name] = topic
            if self._bag is not None:
                self._bag.add_topic(topic)

    def take(self, name: str, log_time: int, data: bytes) -> None:
        """A serialised message of a declared topic; log_time: ns, above 0 (0: the clock is not running yet)."""
        with self._lock:
            if self._topics[name].qos.latched:
                self._latched[name] = data
            bag = self._bag
            if bag is None or log_time <= 0:
                return
            if not self._begun:
                self._begun = True
                for latched, message in self._latched.items():
                    if latched != name:
                        bag.write(latched, log_time, message)
            bag.write(name, log_time, data)
            if bag.error:
                self._end(bag.error)

    def note(self, **facts: str) -> None:
        """Facts for custom_data (instruction, checkpoint); they hold for this episode and those after it."""
        with self._lock:
            self._facts.update({key: value[:MAX_TEXT] for key, value in facts.items()})
            if self._bag is not None:
                self._bag.set_custom(**self._facts)

    def describe(self, name: str, values: Mapping[str, str]) -> None:
        """A metadata record for this episode and those after it: robot description, parameters, configuration."""
        with self._lock:
            if self._metadata.get(name) == dict(values):
                return
            self._metadata[name] = dict(values)
            if self._bag is not None:
                self._bag.add_metadata(name, values)

    # -- what the operator asks for ----------------------------------------------------------------
    def start(self) -> str:
        """Begin an episode; the answer names its folder."""
        with self._lock:
            if self._bag is not None:
                raise RecordingError(f"{self._bag.folder.name} is being recorded: stop or mark it first")
            folder = self._folder()
            custom = {"outcome": "unmarked", **self._facts, "recorder": "vla_nodes"}
            try:
                self._bag = BagWriter(folder, custom=custom, **self._settings)
            except OSError as error:
                raise RecordingError(f"cannot record to {folder}: {error.strerror or error}") from None
            self.error, self._begun = "", False
            self.episodes += 1
            for topic in self._topics.values():
                self._bag.add_topic(topic)
            for name, values in self._metadata.items():
                self._bag.add_metadata(name, values)
            return self._tell(f"recording {folder}")

    def stop(self, why: str = "stop") -> str:
        """End the episode."""
        with self._lock:
            if self._bag is None:
                raise RecordingError("nothing is being recorded")
            return self._end("", why)

    def mark(self, outcome: str) -> str:
        """Mark the episode success, failure or discarded: the one being recorded, which ends it, or the last one."""
        if outcome not in OUTCOMES:
            raise RecordingError(f"'{outcome}' is no outcome: {', '.join(OUTCOMES)}")
        with self._lock:
            if self._bag is not None:
                self._bag.set_custom(outcome=outcome)
                self._end("", outcome)
            elif self._last is None or not self._last.exists():
                raise RecordingError("there is no episode to mark")
            else:
                try:
                    information = metadata.read(self._last)
                    information["custom_data"]["outcome"] = outcome
                    metadata.write(self._last, information)
                except (OSError, ValueError) as error:
                    raise RecordingError(f"cannot mark {self._last}: {error}") from None
            if outcome == "discarded":
                place = self.out / "discarded" / self._last.name
                place.parent.mkdir(exist_ok=True)
                self._last.rename(place)
                self._last = place
            return self._tell(f"{self._last.name} is marked {outcome}")

    def restart(self, why: str) -> None:
        """End the episode and begin another, if one is being recorded (the clock was set back)."""
        with self._lock:
            if self._bag is not None:
                self._end("", why)
                self.start()

    def close(self) -> None:
        with self._lock:
            if self._bag is not None:
                self._end("", "the recorder has ended")

    # -- private -----------------------------------------------------------------------------------
    def _end(self, error: str, why: str = "") -> str:
        bag, self._bag = self._bag, None
        bag.set_custom(ended=error or why)
        bag.close()
        self._last = bag.folder
        self.error = bag.error
        if bag.error:
            return self._tell(bag.error)
        dropped = f", {bag.dropped} messages dropped because the disk did not keep up" if bag.dropped else ""
        megabytes = bag.path.stat().st_size / 1e6
        return self._tell(f"{bag.folder}: {bag.messages} messages, {bag.seconds:.1f} s, {megabytes:.1f} MB{dropped}")

    def _folder(self) -> Path:
        name = datetime.now().strftime("%Y%m%d-%H%M%S")
        number = self.episodes
        while (folder := self.out / f"{name}_{number:03d}").exists():
            number += 1
        return folder

    def _tell(self, text: str) -> str:
        self._say(text)
        return text

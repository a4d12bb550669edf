"""One line on the terminal that says how far a replay is and how long it still takes."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from vla_nodes.rosbag.timeline import Event

PERIOD = 0.2
"""s between two writes."""
WIDTH = 24


class Progress:
    """Silent where the stream is no terminal: logs get no bars."""

    def __init__(self, start: int, end: int, label: str = "", stream: TextIO | None = None) -> None:
        """start, end: ns, first and last receipt in the bag."""
        self._start, self._span, self._label = start, max(end - start, 1), label
        self._stream = sys.stderr if stream is None else stream
        self._on = self._stream.isatty()
        self._began = self._shown = time.monotonic()

    def __call__(self, event: Event) -> None:
        if not self._on:
            return
        now = time.monotonic()
        if now - self._shown < PERIOD:
            return
        self._shown = now
        share = min(max((event.received - self._start) / self._span, 0.0), 1.0)
        spent = now - self._began
        left = f"{spent * (1 - share) / share:.0f} s left" if share > 0.02 else "..."
        done = round(WIDTH * share)
        speed = share * self._span * 1e-9 / spent if spent > 0 else 0.0
        bar = "█" * done + "░" * (WIDTH - done)
        self._stream.write(f"\r{self._label}{bar} {100 * share:3.0f} %  {speed:.1f}x real time, {left}   ")
        self._stream.flush()

    def close(self) -> None:
        if self._on:
            self._stream.write("\r" + " " * (WIDTH + 60 + len(self._label)) + "\r")
            self._stream.flush()

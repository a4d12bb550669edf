"""How far a replay is, in seconds of the recording."""

from __future__ import annotations

from vla_nodes.progress import progress
from vla_nodes.rosbag.timeline import Event


class Progress:
    """The one bar of the suite, moved by the events of a bag."""

    def __init__(self, start: int, end: int, label: str = "") -> None:
        """start, end: ns, first and last receipt in the bag."""
        self._start, self._total = start, max(end - start, 1) * 1e-9
        self._bar = progress(
            total=self._total,
            unit="s",
            label=label,
            bar="{l_bar}{bar}| {n:.1f}/{total:.1f} s [{elapsed}<{remaining}, {rate_noinv_fmt}]",
            line="{desc}{n:.1f} of {total:.1f} s replayed, {elapsed} gone, {remaining} to go",
        )

    def __call__(self, event: Event) -> None:
        at = min(max((event.received - self._start) * 1e-9, 0.0), self._total)
        if at > self._bar.n:
            self._bar.update(at - self._bar.n)

    def close(self) -> None:
        self._bar.close()

"""Notices silence: which inputs and which nodes were there and are no longer. No ROS in here.

A DDS participant that is killed says nothing, and its writers stay matched for the lease of discovery (20 s with
Fast DDS), so silence itself is the sign. Times are of a steady clock: they run on when /clock stands still.
"""

from __future__ import annotations

from dataclasses import dataclass

PATIENCE = 3.0
"""Usual intervals of a slow source that may pass before it counts as lost."""
MOST = 5.0
"""Most that this lengthens a timeout by, as a factor."""


@dataclass(frozen=True)
class Change:
    """A source that has just fallen silent (`lost`) or has just come back."""

    name: str
    lost: bool
    silence: float
    """s since it was last heard; for one that came back, how long it was away"""


@dataclass
class _Source:
    timeout: float
    heard: float | None = None
    lost: bool = False
    away: float = 0.0
    interval: float = 0.0
    returned: bool = False

    @property
    def patience(self) -> float:
        return max(self.timeout, min(PATIENCE * self.interval, MOST * self.timeout))


class Watch:
    """Keeps the time each source was last heard. A source never heard is awaited, not lost.

    A source that normally comes at long intervals, on a machine too slow for it, is given `PATIENCE` of them.
    """

    def __init__(self, timeout: float = 0.7, late: float = 0.35) -> None:
        """timeout: s of silence that count as lost; late: s between two checks beyond which this process itself was
        held up, so that messages may be waiting unread and nothing is declared lost at that check."""
        self.timeout = timeout
        self.late = late
        self._sources: dict[str, _Source] = {}
        self._checked: float | None = None

    def expect(self, name: str, timeout: float | None = None) -> None:
        """Name a source before it is heard (it then shows as awaited)."""
        self._sources.setdefault(name, _Source(self.timeout if timeout is None else timeout))

    def forget(self, name: str) -> None:
        self._sources.pop(name, None)

    def heard(self, name: str, now: float) -> None:
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = _Source(self.timeout)
        if source.heard is not None and not source.lost:
            source.interval += 0.2 * (now - source.heard - source.interval)
        if source.lost:
            source.lost, source.returned, source.away = False, True, now - (source.heard or now)
        source.heard = now

    def check(self, now: float) -> list[Change]:
        """What changed since the last check; call it several times within `timeout`."""
        held_up = self._checked is not None and now - self._checked > self.late
        self._checked = now
        changes = []
        for name, source in self._sources.items():
            if source.returned:
                source.returned = False
                changes.append(Change(name, False, source.away))
            elif not held_up and not source.lost and source.heard is not None and now - source.heard > source.patience:
                source.lost = True
                changes.append(Change(name, True, now - source.heard))
        return changes

    def lost(self) -> list[str]:
        return [name for name, source in self._sources.items() if source.lost]

    def awaited(self) -> list[str]:
        """Sources expected and not heard yet."""
        return [name for name, source in self._sources.items() if source.heard is None]

    def is_lost(self, name: str) -> bool:
        source = self._sources.get(name)
        return source is not None and source.lost

    def ages(self, now: float) -> dict[str, float | None]:
        """{source: s since it was last heard, None if never}."""
        return {name: None if s.heard is None else now - s.heard for name, s in self._sources.items()}


class Rate:
    """Rate of events and the largest gap between two, over a sliding window."""

    def __init__(self, window: int = 50) -> None:
        self._times: list[float] = []
        self._window = window
        self.count = 0

    def tick(self, now: float) -> None:
        self.count += 1
        self._times.append(now)
        if len(self._times) > self._window:
            del self._times[0]

    def hz(self, now: float) -> float:
        """Events per second up to now, so that it falls when they stop."""
        if len(self._times) < 2:
            return 0.0
        last_gap = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        since = now - self._times[-1]
        return len(self._times) / (since + self._times[-1] - self._times[0]) if since > 3 * last_gap else 1 / last_gap

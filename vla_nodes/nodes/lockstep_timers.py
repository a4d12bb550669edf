"""How far a node is, and work that is due at the pace of a player instead of the machine's.

A node in normal service is not paced: its timers run on the steady clock, for watchdogs must notice that nothing comes.
In lock step (player_node) the machine's time means nothing: what a node does every 20 ms it does every 20 ms of the
recording, at exactly those times and in the order of the offline replay, one thing each time the player asks for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

FINISH, GATE, WATCH, OTHER = range(4)
"""Ranks: what comes first of what is due at one time (as in replay/open_loop.py)."""


@dataclass
class _Work:
    """Due every `period` ns from the first clock on, or once, `period` after it was asked for."""

    period: int
    rank: int
    callback: Callable[[], None]
    due: int | None = None
    once: bool = False


class Pacing:
    """The message counts and the due work of one node. Clock times in ns."""

    def __init__(self) -> None:
        self.paced = False
        self.taken: Counter[str] = Counter()
        """messages handled, by full topic name"""
        self._work: list[_Work] = []
        self._set_back = 0

    def counted(self, topic: str, callback: Callable[[object], None]) -> Callable[[object], None]:
        """`callback`, with each message counted once it is handled."""
        self.taken[topic] += 0

        def count(message: object) -> None:
            callback(message)
            self.taken[topic] += 1

        return count

    def every(self, period: float, callback: Callable[[], None], rank: int = OTHER) -> None:
        """Periodic work, period in s."""
        self._work.append(_Work(round(period * 1e9), rank, callback))

    def once(self, begun: int, delay: float, callback: Callable[[], None]) -> None:
        """Work to do once, `delay` s after the clock `begun`, before all else that is due then."""
        wait = round(delay * 1e9)
        self._work.append(_Work(wait, FINISH, callback, begun + wait, once=True))

    def clear(self) -> None:
        self._work.clear()

    def steady(self, now: int) -> float:
        """s on a clock that never goes back: the machine's, or that of the player."""
        return (now + self._set_back) * 1e-9 if self.paced else time.monotonic()

    def jumped(self, now: int, delta: int) -> None:
        """The clock was set back by -delta to `now`: periods count from there."""
        self._set_back -= delta
        for work in self._work:
            later = now + work.period
            work.due = min(work.due, later) if work.once and work.due is not None else None

    def next(self, now: int) -> tuple[int, int] | None:
        """(when, rank) of what is due next."""
        return min(((due, work.rank) for due, work in self._begun(now)), default=None)

    def ends(self) -> int | None:
        """When the policy step under way will be over; None where there is none."""
        return max((work.due for work in self._work if work.once and work.due is not None), default=None)

    def do(self, now: int) -> None:
        """The first thing that is due by `now`."""
        ready = [(due, work) for due, work in self._begun(now) if due <= now]
        if not ready:
            return
        due, work = min(ready, key=lambda found: (found[0], found[1].rank))
        if work.once:
            self._work.remove(work)
        else:
            work.due = due + work.period
        work.callback()

    def _begun(self, now: int) -> list[tuple[int, _Work]]:
        """All work, each with when it is due; the first clock is when periods begin."""
        for work in self._work if now > 0 else ():
            if work.due is None:
                work.due = now + work.period
        return [(work.due, work) for work in self._work if work.due is not None]

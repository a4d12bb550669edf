"""How far a long command is: a bar on a terminal, and in a log a line now and then. Both go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

LOG_PERIOD = 30.0
"""s between two lines where stderr is no terminal; what ends sooner writes none."""
LOG_FORMAT = "{desc}{n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} to go {postfix}"


class _Lines:
    """What tqdm draws over and over, as lines of their own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if shown := text.replace("\r", "").strip():
            self._stream.write(shown + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(of: Iterable[Any] | None = None, total: float | None = None, unit: str = "", label: str = "",
             show: bool = True, bar: str | None = None, line: str = LOG_FORMAT) -> tqdm:  # fmt: skip
    """A bar over the items of ``of``, or one to be told: update(n), set_postfix_str(text), close().

    ``unit`` is the noun, in the plural, of what is counted; ``bar`` and ``line`` are tqdm's bar_format, on a terminal
    and elsewhere.
    """
    common = dict(total=total, desc=f"{label}: " if label else None, disable=not show, smoothing=0.1)
    if sys.stderr.isatty():
        return tqdm(of, unit=f" {unit}", dynamic_ncols=True, mininterval=0.2, bar_format=bar, **common)
    return tqdm(of, unit=unit, bar_format=line, file=_Lines(sys.stderr), delay=LOG_PERIOD, mininterval=LOG_PERIOD,
                maxinterval=2 * LOG_PERIOD, **common)  # fmt: skip


def say(text: str, file: TextIO | None = None) -> None:
    """A line beside the bars, which are drawn anew below; on stdout unless another stream is given."""
    tqdm.write(text, file=file)

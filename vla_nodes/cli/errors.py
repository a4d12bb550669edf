"""How a command ends: its exit status, and the one line that says what is wrong."""

from __future__ import annotations

import sys
from enum import IntEnum

import click


class ExitStatus(IntEnum):
    """What the exit status of every command means. A signal that ends a command gives 128 + its number."""

    DONE = 0
    """All that was asked for is done."""
    FAILED = 1
    """It ran, and the answer is no: a golden file differs, a task was not achieved, an input was damaged. (Python ends
    with 1, and a traceback, on an error that nobody foresaw as well: that is a bug.)"""
    USAGE = 2
    """Wrong usage, bad input, or something that is not installed: one line says which, and nothing was done."""
    INTERRUPTED = 130
    """Ctrl-C. What is done is kept."""
    TERMINATED = 143
    """SIGTERM, likewise."""
    BROKEN_PIPE = 141
    """Whoever read the output went away."""


class CommandError(click.ClickException):
    """Ends a command with one line, ``what is wrong: remedy``, and a status."""

    ctx: click.Context | None = None

    def __init__(self, message: str, status: int = ExitStatus.USAGE) -> None:
        super().__init__(message)
        self.exit_code = status  # type: ignore[misc]  # click's own way, its type says otherwise


def complain(text: str, where: click.Context | click.Command | str) -> None:
    """One line on stderr: ``vla_nodes COMMAND: text``."""
    if isinstance(where, click.Context):
        name = where.command_path
    elif isinstance(where, click.Command):
        name = str(getattr(where, "program", where.name))
    else:
        name = where
    name = name.removeprefix("python -m ").removeprefix("python ")
    print(f"{name}: {' '.join(text.split())}", file=sys.stderr, flush=True)

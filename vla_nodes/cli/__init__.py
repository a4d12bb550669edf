"""What every command shares: the form of its options, its ``--help``, its errors and its exit status. Built on click.

A module of a command has ``command``, a `Command` or `Group`, and ``main(argv) -> int``. Nothing else of vla_nodes is
imported here but its version, so that every room may use it.
"""

from vla_nodes.cli.command import COMPLETE, PROGRAM, SHELLS, Command, Group, LazyGroup, Options, main, version
from vla_nodes.cli.errors import CommandError, ExitStatus, complain
from vla_nodes.cli.options import (
    CHECKPOINT,
    PATH,
    POSE,
    Argument,
    Existing,
    Option,
    Several,
    argument,
    checkpoint,
    count,
    engine,
    flag,
    number,
    option,
    out,
    remap,
    section,
    seed,
    workers,
)

__all__ = [
    "CHECKPOINT",
    "COMPLETE",
    "PATH",
    "POSE",
    "PROGRAM",
    "SHELLS",
    "Argument",
    "Command",
    "CommandError",
    "Existing",
    "ExitStatus",
    "Group",
    "LazyGroup",
    "Option",
    "Options",
    "Several",
    "argument",
    "checkpoint",
    "complain",
    "count",
    "engine",
    "flag",
    "main",
    "number",
    "option",
    "out",
    "remap",
    "section",
    "seed",
    "version",
    "workers",
]

"""Commands and their options, from the objects that parse the command line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import click
from tables import table


def every() -> Iterator[tuple[str, click.Command]]:
    """(how it is called, the command) for every command, those of a group after the group."""
    from vla_nodes.__main__ import command
    from vla_nodes.demo.cli import command as run

    yield "./run", run
    yield from _below("python -m vla_nodes", command)


def _below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        with click.Context(command, info_name=name) as ctx:
            for word in command.list_commands(ctx):
                yield from _below(f"{name} {word}", command.get_command(ctx, word))


def commands() -> str:
    """The page."""
    parts = ["# Commands\n"]
    for name, command in every():
        with click.Context(command, info_name=name, **command.context_settings) as ctx:
            usage = command.collect_usage_pieces(ctx)
            parts += [f"## {name}\n", f"```text\n{' '.join([name, *usage])}\n```\n", _text(command)]
            rows: dict[str, list[list[str]]] = {}
            for parameter in command.get_params(ctx):
                if "--help" not in parameter.opts and (record := parameter.get_help_record(ctx)):
                    positional = isinstance(parameter, click.Argument)
                    heading = "argument" if positional else getattr(parameter, "section", "Options")
                    rows.setdefault(heading, []).append([f"`{record[0]}`", _sentence(record[1])])
            for heading in sorted(rows, key=lambda heading: heading != "argument"):
                parts.append(table(["option" if heading == "Options" else heading.lower(), "what"], rows[heading]))
    return "\n".join(parts)


def _text(command: Any) -> str:
    """What it does, as --help says it: paragraphs, and tables as they stand; then its examples."""
    parts = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        lines = paragraph.splitlines()
        as_it_stands = any(line.startswith("    ") for line in lines)
        parts.append("\n".join(f"    {line}" for line in lines) if as_it_stands else " ".join(paragraph.split()))
    examples = inspect.cleandoc(getattr(command, "examples", "") or "")
    if examples:
        parts += ["Examples:", "\n".join(f"    {line}" for line in examples.splitlines())]
    return "\n\n".join(parts) + "\n"


def _sentence(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")

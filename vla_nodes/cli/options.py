"""What a command takes: its options and arguments, with one word for one meaning."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


class Option(click.Option):
    """An option that is listed under a heading of its own, if it has one."""

    section = "Options"


class Argument(click.Argument):
    """A positional argument that has a line of help."""

    def __init__(self, *args: Any, text: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = text

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return str(self.metavar), str(self.help)


class Existing(click.Path):
    """A path that must be there, so that a wrong one is said before anything starts."""

    def __init__(self, what: str, holds: str = "") -> None:
        super().__init__(path_type=Path)
        self.what, self.holds = what, holds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if not (path / self.holds).exists():
            lacks = f"no such {self.what}" if not path.exists() else f"no {self.what}: it has no {self.holds}"
            self.fail(f"{path}: {lacks}", param, ctx)
        return path


class Several(click.ParamType):
    """Values separated by commas, as a list: of ``kind``, or each one of ``choices``."""

    name = "list"

    def __init__(self, kind: type = str, choices: Sequence[str] = (), least: float | None = None) -> None:
        self.kind, self.choices, self.least = kind, tuple(choices), least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return list(value)
        found = []
        for word in value.split(","):
            try:
                found.append(self.kind(word.strip()))
            except ValueError:
                self.fail(f"{word!r} is no {'whole ' * (self.kind is int)}number (values are separated by commas)",
                          param, ctx)  # fmt: skip
            if self.choices and found[-1] not in self.choices:
                self.fail(f"{word!r} is none of {', '.join(self.choices)}", param, ctx)
            if self.least is not None and not found[-1] >= self.least:
                self.fail(f"{word} must be at least {self.least:g}", param, ctx)
        return found


PATH = click.Path(path_type=Path)
CHECKPOINT = Existing("checkpoint folder", "config.json")
POSE = dict(type=float, nargs=7, metavar="X Y Z QX QY QZ QW")
"""A pose: position [m] and quaternion."""


def option(*names: str, help: str, **settings: Any) -> Option:
    """An option; ``type``, ``default``, ``is_flag``, ``multiple``, ``metavar`` and so on as click.Option has them."""
    if settings.get("default") == "":
        settings["show_default"] = False
    if settings.get("default") is None:  # to click, even None is a value that is given
        settings.pop("default", None)
    return Option(names, help=help, **settings)


def flag(name: str, help: str) -> Option:
    """An option without a value."""
    return Option([name], is_flag=True, help=help)


def argument(metavar: str, help: str, **settings: Any) -> Argument:
    """A positional argument; its name in `Options` is the metavar's, in lower case."""
    return Argument([metavar.strip("[.]").lower()], metavar=metavar, text=help, **settings)


def section(title: str, *options: Option) -> list[Option]:
    """Options listed together under a heading."""
    for each in options:
        each.section = title
    return list(options)


def checkpoint(help: str = "checkpoint folder", default: str | None = "the shipped one") -> Option:
    return option("--checkpoint", type=CHECKPOINT, metavar="DIR", help=help, show_default=default or False)


def out(help: str, default: str | None = None, required: bool = False, metavar: str = "DIR") -> Option:
    return option("--out", type=PATH, metavar=metavar, help=help, default=default, required=required)


def seed(help: str, default: int | None = 0) -> Option:
    return option("--seed", type=click.IntRange(0), metavar="N", default=default, help=help)


def count(name: str, help: str, default: int | None = None, least: int = 1, most: int | None = None) -> Option:
    """An option that is a whole number of things."""
    return option(name, type=click.IntRange(least, most), metavar="N", default=default, help=help)


def number(name: str, help: str, default: float | None = None, least: float | None = 0.0,
           most: float | None = None) -> Option:  # fmt: skip
    """An option that is a real number."""
    kind = click.FLOAT if least is None and most is None else _Real(least, most)
    return option(name, type=kind, metavar="X", default=default, help=help)


class _Real(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = click.FLOAT.convert(value, param, ctx)
        if found != found:  # no range refuses it
            self.fail("nan is no number", param, ctx)
        return super().convert(found, param, ctx)


def workers(help: str = "processes that work at the same time") -> Option:
    return option("--workers", type=click.IntRange(1), metavar="N", default=os.cpu_count() or 1, help=help,
                  show_default="one per core")  # fmt: skip


def engine(names: Sequence[str], help: str, default: str | None = "auto") -> Option:
    return option("--engine", type=click.Choice(list(names)), default=default, help=help)


def remap() -> Option:
    return option("--remap", multiple=True, metavar="TOPIC:=BAG_TOPIC", help="the bag's name for a topic (repeatable)")

"""What every command shares: the form of its options, its ``--help``, its errors and its exit status. Built on click.

A module of a command has ``command``, a `Command` or `Group`, and ``main(argv) -> int``. Nothing else of vla_nodes is
imported here, so that every room may use it.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem, get_completion_class

import vla_nodes

PROGRAM = "python -m vla_nodes"
COMPLETE = "_VLA_NODES_COMPLETE"
"""The environment variable in which a shell asks for completions."""
WORDS = "vla_nodes.words"
"""Where a context keeps the words of the command line."""
SHELLS = ("bash", "zsh", "fish")
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


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
        self.exit_code = status


class Options(SimpleNamespace):
    """The values of a command's options, under their names: --time-limit as ``time_limit``."""

    @staticmethod
    def words() -> list[str]:
        """The command line behind the name of the command, as it was typed."""
        return click.get_current_context().meta[WORDS]

    @staticmethod
    def given(name: str) -> bool:
        """Whether it was on the command line."""
        return click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE


# -- parameters ------------------------------------------------------------------------------------------------------
class Option(click.Option):
    """An option that is listed under a heading of its own, if it has one."""

    section = "Options"


class Argument(click.Argument):
    """A positional argument that has a line of help."""

    def __init__(self, *args: Any, text: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = text

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return str(self.metavar), str(self.help)


class Existing(click.Path):
    """A path that must be there, so that a wrong one is said before anything starts."""

    def __init__(self, what: str, holds: str = "") -> None:
        super().__init__(path_type=Path)
        self.what, self.holds = what, holds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if not (path / self.holds).exists():
            lacks = f"{path}: no such {self.what}" if not path.exists() else f"{path}: no {self.what}, no {self.holds}"
            self.fail(f"{lacks}: is the path right?", param, ctx)
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


# -- commands --------------------------------------------------------------------------------------------------------
class _Styled(click.Command):
    """One style of --help: usage, what it does, arguments, options under headings, commands, examples."""

    examples: str = ""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        found = super().get_help_option(ctx)
        if found is not None:
            found.help = "show this and exit"
        return found

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Newer releases of click list arguments here; below they are listed with any release."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            formatter.write_paragraph()
            with formatter.indentation():
                if any(line.startswith("    ") for line in paragraph.splitlines()):  # a table: as it stands
                    for line in paragraph.splitlines():
                        formatter.write(f"{'':{formatter.current_indent}}{line.rstrip()}\n")
                else:
                    formatter.write_text(" ".join(paragraph.split()))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                positional = isinstance(parameter, click.Argument)
                title = "Arguments" if positional else getattr(parameter, "section", "Options")
                sections.setdefault(title, []).append(record)
        for title in sorted(sections, key=lambda title: title != "Arguments"):  # and else as they come
            with formatter.section(title):
                formatter.write_dl(sections[title])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for line in inspect.cleandoc(self.examples).splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Command(_Styled):
    """A command: what it does, its parameters, and ``run``, from their values to an exit status.

    ``errors`` are the exceptions that say what is wrong with the input: they end it with one line and status 2.
    """

    def __init__(self, name: str, text: str, run: Callable[[Options], int | None], *parameters: click.Parameter,
                 examples: str, errors: tuple[type[Exception], ...] = (), program: str = "") -> None:  # fmt: skip
        super().__init__(name, params=list(parameters), help=text, context_settings=CONTEXT)
        self.run, self.examples, self.errors = run, examples, errors
        self.program = program or f"{PROGRAM} {name}"

    def invoke(self, ctx: click.Context) -> int:
        return carry_out(self.run, ctx, self.errors)


def carry_out(run: Callable[[Options], int | None], ctx: click.Context, errors: tuple[type[Exception], ...]) -> int:
    """The exit status of ``run``, its foreseen errors as `CommandError`."""
    try:
        return int(run(Options(**ctx.params)) or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end
        return int(ExitStatus.BROKEN_PIPE)
    except click.ClickException as error:
        error.ctx = getattr(error, "ctx", None) or ctx  # type: ignore[attr-defined]
        raise
    except errors as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        wrong = CommandError(text or type(error).__name__)
        wrong.ctx = ctx
        raise wrong from error


class Group(_Styled, click.Group):
    """Commands under one name. With ``run`` the name by itself is a command too."""

    def __init__(self, name: str, text: str, commands: Sequence[click.Command], *parameters: click.Parameter,
                 examples: str, run: Callable[[Options], int | None] | None = None,
                 errors: tuple[type[Exception], ...] = (), program: str = "") -> None:  # fmt: skip
        super().__init__(
            name,
            commands=list(commands),
            params=list(parameters),
            help=text,
            context_settings=CONTEXT,
            no_args_is_help=False,
            callback=self._alone,
        )
        self.invoke_without_command = run is not None
        self.run, self.examples, self.errors = run, examples, errors
        self.program = program or f"{PROGRAM} {name}".strip()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and self.run is None and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(ExitStatus.USAGE)
        return super().parse_args(ctx, args)

    def _alone(self, **values: Any) -> int | None:
        ctx = click.get_current_context()
        return carry_out(self.run, ctx, self.errors) if self.run and ctx.invoked_subcommand is None else None

    def table(self) -> dict[str, dict[str, str]]:
        """Heading -> name -> what it does, of all commands."""
        return {
            "Commands": {name: " ".join((c.help or "").split("\n\n")[0].split()) for name, c in self.commands.items()}
        }

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        names = [name for named in self.table().values() for name in named]
        if args and args[0] not in names and not ctx.resilient_parsing:
            raise click.UsageError(f"no command {args[0]!r}; there are {', '.join(names)}", ctx)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, named in self.table().items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, text in named.items()])
        _Styled.format_options(self, ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name, help=text) for named in self.table().values() for name, text in named.items()
                 if name.startswith(incomplete)]  # fmt: skip
        return found + click.Command.shell_complete(self, ctx, incomplete)


class LazyGroup(Group):
    """Commands whose modules are imported when they are called: heading -> name -> (module, what it does)."""

    def __init__(self, name: str, text: str, modules: Mapping[str, Mapping[str, tuple[str, str]]], **settings: Any):
        super().__init__(name, text, [], *_version_and_completion(), **settings)
        self.modules = modules

    def table(self) -> dict[str, dict[str, str]]:
        return {title: {name: text for name, (_, text) in named.items()} for title, named in self.modules.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for named in self.modules.values() for name in named]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for named in self.modules.values():
            if cmd_name in named:
                return importlib.import_module(named[cmd_name][0]).command
        return None


def version() -> click.Option:
    """--version."""

    def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(f"vla_nodes {vla_nodes.__version__}")
            ctx.exit()

    return Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show,
                  help="print the version and exit")  # fmt: skip


def _version_and_completion() -> list[click.Option]:
    def show(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
        if value and not ctx.resilient_parsing:
            found = get_completion_class(value)
            assert found is not None
            click.echo(found(ctx.command, {}, "vla_nodes", COMPLETE).source())
            ctx.exit()

    completion = Option(["--show-completion"], type=click.Choice(SHELLS), is_eager=True, expose_value=False,
                        callback=show, help="print the completion script of a shell and exit")  # fmt: skip
    return [version(), completion]


def main(command: Command | Group, argv: Sequence[str] | None = None) -> int:
    """Carry a command line out; the exit status, one of `ExitStatus` or 128 + a signal. No exception but for bugs."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(
            command.main(arguments, prog_name=command.program, standalone_mode=False, complete_var=COMPLETE) or 0
        )
    except click.ClickException as error:
        where, text = getattr(error, "ctx", None) or command, error.format_message()
        if isinstance(error, click.UsageError):
            path = where.command_path if isinstance(where, click.Context) else command.program
            text = f"{text.rstrip('.')}: see {path} --help"
        complain(text, where)
        return error.exit_code
    except click.Abort:  # Ctrl-C, or the end of what is typed in
        complain("interrupted", command)
        return int(ExitStatus.INTERRUPTED)


def complain(text: str, where: click.Context | click.Command | str) -> None:
    """One line on stderr: ``vla_nodes COMMAND: text``."""
    if isinstance(where, click.Context):
        where = where.command_path
    elif isinstance(where, click.Command):
        where = getattr(where, "program", where.name)
    name = where.removeprefix("python -m ").removeprefix("python ")
    print(f"{name}: {' '.join(text.split())}", file=sys.stderr, flush=True)

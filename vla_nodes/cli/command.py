"""Commands and groups of them: one style of ``--help``, and from a command line to an exit status."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem, get_completion_class

import vla_nodes
from vla_nodes.cli.errors import CommandError, ExitStatus, complain
from vla_nodes.cli.options import Option

PROGRAM = "python -m vla_nodes"
COMPLETE = "_VLA_NODES_COMPLETE"
"""The environment variable in which a shell asks for completions."""
WORDS = "vla_nodes.words"
"""Where a context keeps the words of the command line."""
SHELLS = ("bash", "zsh", "fish")
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


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

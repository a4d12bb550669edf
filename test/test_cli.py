"""The commands as one: their --help, words, examples, errors, exit statuses, completion and progress."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from vla_nodes import __main__ as program
from vla_nodes import cli, progress
from vla_nodes.demo import cli as demo

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "mujoco", "rclpy", "numpy", "pinocchio", "cv2"}


def commands() -> dict[str, click.Command]:
    """Every command by its words, those of groups too."""
    found: dict[str, click.Command] = {"./run": demo.command}

    def walk(words: str, command: click.Command) -> None:
        found[words] = command
        if isinstance(command, click.Group):
            with click.Context(command) as ctx:
                for name in command.list_commands(ctx):
                    walk(f"{words} {name}".strip(), command.get_command(ctx, name))

    walk("", program.command)
    return found


COMMANDS = commands()
LEAVES = [name for name, command in COMMANDS.items() if not isinstance(command, click.Group) or name == "record"]


def call(words: str, *more: str) -> int:
    """The exit status, in this process."""
    return demo.main(list(more)) if words == "./run" else program.main([*words.split(), *more])


def one_line(error: str, words: str) -> str:
    label = words if words == "./run" else f"vla_nodes {words}".strip()
    assert error.startswith(f"{label}: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return error


def options(name: str) -> dict[str, click.Option]:
    return {word: p for p in COMMANDS[name].params if isinstance(p, click.Option) for word in p.opts}


# -- help, words, examples ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_the_same_parts(name, capsys):
    assert call(name, "--help") == 0
    text, error = capsys.readouterr()
    command, lines = COMMANDS[name], text.splitlines()
    assert not error and lines[0].startswith("Usage: ") and lines[2].startswith("  ")
    titles = [line[:-1] for line in lines if re.fullmatch(r"\S.*:", line)]
    assert titles[-1] == "Examples" and "Options" in titles and len(set(titles)) == len(titles)
    assert ("Arguments" in titles) == any(isinstance(p, click.Argument) for p in command.params)
    assert all(p.help for p in command.params if isinstance(p, click.Option)), "an option without a line of help"
    assert max(map(len, lines)) <= 120
    if isinstance(command, click.Group):
        with click.Context(command) as ctx:
            assert all(re.search(rf"^  {each} ", text, re.M) for each in command.list_commands(ctx))


def test_one_meaning_has_one_word():
    kinds: dict[str, set] = {}
    for name in COMMANDS:
        for word, option in options(name).items():
            kinds.setdefault(word, set()).add((option.is_flag, option.multiple, type(option.type).__name__))
    assert {"--save", "--policy", "--png", "--sheet", "--lr", "--seconds", "--engines", "--joint"}.isdisjoint(kinds)
    several = {word for word, found in kinds.items() if len(found) > 1}
    # bench takes several engines and precisions, replay and collect one sort of each
    assert several <= {"--engine", "--precision", "--latency", "--suite", "--language", "--grounded", "--out"}, several
    for word in ("--checkpoint", "--seed", "--workers", "--minutes", "--data", "--episodes", "--steps"):
        assert len(kinds[word]) == 1, word


def parse(words: list[str], monkeypatch) -> None:
    """As the command line would be read, without looking whether files are there."""
    monkeypatch.setattr(cli.Existing, "convert", lambda self, value, param, ctx: Path(value))
    command, name = (demo.command, "./run") if words[0] == "./run" else (program.command, "vla_nodes")
    words = words[1:]
    ctx = command.make_context(name, list(words))
    while isinstance(command, click.Group):
        rest = [*(ctx._protected_args if hasattr(ctx, "_protected_args") else ctx.protected_args), *ctx.args]
        if not rest:
            break
        name, command, words = command.resolve_command(ctx, rest)
        ctx = command.make_context(name, list(words), parent=ctx)


def command_lines(text: str) -> list[str]:
    """What a text tells a reader to type: indented lines, and what stands in backticks."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"^ {4,}((?:python -m vla_nodes|\./run) .*?)(?:\s{2,}#.*|\s+# .*)?$", text, re.M)
    found += re.findall(r"`((?:python -m vla_nodes|\./run) [^`]+)`", text)
    return [line for line in found if "..." not in line and not re.search(r"\b(COMMAND|X)\b", line)]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_help_are_right(name, monkeypatch):
    lines = [line.strip() for line in COMMANDS[name].examples.splitlines() if line.strip()]
    assert lines
    for line in lines:
        if line.startswith((cli.PROGRAM, "./run")):
            with pytest.MonkeyPatch.context() as patch:
                try:
                    parse(shlex.split(line.removeprefix("python -m ")), patch)
                except click.exceptions.Exit:
                    assert "--help" in line


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", *sorted(str(f.relative_to(ROOT)) for f in (ROOT / "docs").rglob("*.md"))]
)
def test_what_the_docs_tell_to_type_is_right(file, monkeypatch):
    for line in command_lines((ROOT / file).read_text()):
        try:
            parse(shlex.split(line.removeprefix("python -m ")), monkeypatch)
        except click.exceptions.Exit:
            assert "--help" in line
        except click.BadOptionUsage:
            assert line.split()[-1].startswith("--"), line  # only mentioned: `./run --suite`
        except click.UsageError as error:
            pytest.fail(f"{file}: {line}: {error.format_message()}")


def test_the_steps_of_the_recipe_are_right(monkeypatch):
    from vla_nodes.training import recipe

    path = ROOT / "config/train/recipe.yaml"
    _, steps = recipe.steps_of(yaml.safe_load(path.read_text()), str(path))
    for step in steps:
        parse(["vla_nodes", *shlex.split(step)], monkeypatch)


# -- errors and exit statuses ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_one_line_and_status_2(name, capsys):
    assert call(name, "--nothing-of-the-kind") == 2
    error = one_line(capsys.readouterr().err, name)
    assert "--nothing-of-the-kind" in error and "--help" in error


@pytest.mark.parametrize("name", [name for name in LEAVES if "--checkpoint" in options(name)])
def test_a_checkpoint_that_is_not_there_is_said_before_anything_starts(name, tmp_path, capsys):
    assert call(name, "--checkpoint", str(tmp_path / "none")) == 2
    assert "none: no such checkpoint folder" in one_line(capsys.readouterr().err, name)
    assert call(name, "--checkpoint", str(tmp_path)) == 2
    assert "it has no config.json" in one_line(capsys.readouterr().err, name)


@pytest.mark.parametrize("name", [name for name in LEAVES if any(p.required for p in COMMANDS[name].params)])
def test_what_is_required_is_named(name, capsys):
    assert call(name) == 2
    one_line(capsys.readouterr().err, name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay", "nowhere"],
        ["seams", "nowhere"],
        ["dataset", "inspect", "nowhere"],
        ["dataset", "build", "nowhere", "--out", "made"],
        ["dataset", "export", "nowhere", "--out", "made"],
        ["dataset", "import", "nowhere", "--out", "made"],
        ["record", "--repair", "nowhere"],
        ["train", "nowhere"],
        ["export", "--weights", "nowhere", "--language", "nowhere", "--out", "made"],
        ["ablations", "--data", "nowhere", "--out", "made", "--only", "nowhere"],
    ],
    ids=" ".join,
)
def test_input_that_is_not_there_is_one_line_and_status_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program.main(arguments) == 2
    words = " ".join(arguments[:2] if arguments[0] == "dataset" else arguments[:1])
    assert "nowhere" in one_line(capsys.readouterr().err, words)


def test_no_command_and_a_wrong_one(capsys):
    assert program.main([]) == 2 and "eval" in capsys.readouterr().err
    assert program.main(["dance"]) == 2
    assert "there are record, replay" in one_line(capsys.readouterr().err, "")


def ending(run) -> int:
    return cli.main(cli.Command("test", "For a test.", run, examples="", errors=(ValueError, OSError)), [])


def raising(error: BaseException):
    def run(options: cli.Options) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "status", "said"),
    [
        (lambda options: None, 0, ""),
        (lambda options: cli.ExitStatus.FAILED, 1, ""),
        (raising(cli.CommandError("it differs: look", cli.ExitStatus.FAILED)), 1, "it differs: look\n"),
        (raising(click.UsageError("not both")), 2, "not both: see python -m vla_nodes test --help\n"),
        (raising(ValueError("two\nlines")), 2, "two lines\n"),
        (raising(FileNotFoundError(2, "No such file", "a.txt")), 2, "a.txt: No such file\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
        (lambda options: 143, 143, ""),
    ],
)
def test_exit_statuses(run, status, said, capsys):
    assert ending(run) == status
    assert capsys.readouterr().err.lstrip("\n") == (f"vla_nodes test: {said}" if said else "")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        ending(lambda options: 1 // 0)


def test_a_reader_that_goes_away_is_no_error():
    show = """
import sys
from vla_nodes import cli
talk = lambda options: [print("x" * 99) for _ in range(9999)] and 0
sys.exit(cli.main(cli.Command("talk", "Talk.", talk, examples="", errors=(OSError,)), []))
"""
    with subprocess.Popen([sys.executable, "-c", show], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == cli.ExitStatus.BROKEN_PIPE and not error


def test_the_exit_statuses_are_documented():
    text = (ROOT / "docs/how_to/command_line.md").read_text()
    for status in cli.ExitStatus:
        assert f"| {status.value} |" in text, status


# -- start, version, completion ----------------------------------------------------------------------------------------
def started(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the program, which says at its end what of HEAVY it has imported."""
    code = f"""
import sys
from vla_nodes.__main__ import main
try:
    status = main()
except SystemExit as ended:
    status = ended.code
print("heavy:", sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""
    return subprocess.run([sys.executable, "-c", code, *arguments], env={**os.environ, **environment}, text=True,
                          capture_output=True)  # fmt: skip


def test_help_imports_nothing_heavy():
    run = started("--help")
    assert run.returncode == 0 and run.stderr == "heavy: []\n"


def test_version_is_that_of_the_manifest():
    said = re.search(r"<version>(.*)</version>", (ROOT / "package.xml").read_text())[1]
    assert started("--version").stdout == f"vla_nodes {said}\n"


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_a_completion_script_is_printed(shell):
    run = started("--show-completion", shell)
    assert run.returncode == 0 and f"{cli.COMPLETE}={shell}_complete" in run.stdout and "vla_nodes" in run.stdout


@pytest.mark.parametrize(
    ("typed", "found"),
    [("vla_nodes e", {"export", "eval", "engine"}), ("vla_nodes --ver", {"--version"}),
     ("vla_nodes record m", {"mark"}), ("vla_nodes record mark s", {"start", "stop", "success"}),
     ("vla_nodes seams --o", {"--out"})],
)  # fmt: skip
def test_completion_knows_commands_options_and_choices(typed, found):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), cli.COMPLETE: "bash_complete"}
    run = started(**words)
    assert {line.split(",")[1] for line in run.stdout.splitlines()} == found
    assert "torch" not in run.stderr


def test_the_tools_are_commands_too():
    for tool in ("sample_bag.py", "kernels_on_cpu.py", "reference"):
        run = subprocess.run([sys.executable, f"tools/{tool}", "--help"], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0 and "Examples:" in run.stdout, run.stderr


def test_there_is_one_library_of_each():
    for file in [*ROOT.glob("vla_nodes/**/*.py"), *ROOT.glob("tools/**/*.py")]:
        text = file.read_text()
        # these run before anything is installed
        assert "import argparse" not in text or file.name in ("bootstrap.py", "ros_overlay.py"), file
        assert not re.search(r"^\s*(from|import) tqdm", text, re.M) or file == ROOT / "vla_nodes/progress.py", file


# -- progress ----------------------------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_log_progress_is_a_line_now_and_then(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress.progress(range(5), unit="episodes")) == list(range(5))
    assert stream.getvalue() == "", "what is quick says nothing"
    monkeypatch.setattr(progress, "LOG_PERIOD", 0.0)
    with progress.progress(total=3, unit="episodes", label="trying") as bar:
        for _ in range(3):
            bar.set_postfix_str("1/1", refresh=False)
            bar.update()
    lines = stream.getvalue().splitlines()
    assert any("trying: 3 of 3 episodes" in line for line in lines) and not any("\r" in line for line in lines)


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress.progress(range(3), unit="episodes", label="trying"):
        pass
    assert "\r" in stream.getvalue() and "trying: 100%" in stream.getvalue()

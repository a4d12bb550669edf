"""The documentation is true where a machine can tell: reference pages, links, and commands that are shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page for pattern in ("*.md", "docs/**/*.md", "resource/**/*.md", "plugins/**/*.md") for page in ROOT.glob(pattern)
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TESTS = " ".join(
    name
    for file in (ROOT / "test").glob("test_*.py")
    for name in (file.stem, *re.findall(r"def (test_\w+)", file.read_text()))
)


def test_reference_pages_are_what_the_code_says():
    pytest.importorskip("rclpy", reason="ROS 2 is not in this environment: run ./check, or source a ROS 2 installation")
    command = [sys.executable, "tools/reference", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_parameter_and_key_is_described():
    """The last column of the tables that are written from the code."""
    for name in ("parameters", "topics", "services", "messages", "config", "launch", "commands"):
        for line in (ROOT / f"docs/reference/{name}.md").read_text().splitlines():
            assert not re.search(r"\|  \|$", line), f"{name}.md: {line}"


# -- links ----------------------------------------------------------------------------------------------------
def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target}: there is no {linked}"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading, there are {anchors(linked)}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs")
        assert str(name) == "README.md" or f"({name})" in index, f"docs/README.md does not name {name}"


# -- commands (those of vla_nodes and ./run: test_cli.py) ------------------------------------------------------------
def shown(page: Path) -> list[str]:
    """Every command line in a page: of code blocks, whose lines may go on after a backslash, and of inline code."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^ {4,}(.+)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    return [line.strip() for line in lines]


def wrong(line: str) -> str:
    """What a command line shows that does not exist, or ""."""
    words = line.split(" #")[0].split()
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words.pop(0)
    start = " ".join(words)
    if match := re.match(r"(?:python )?((?:tools|test|resource)/[\w./-]+)", start):
        return "" if (ROOT / match[1]).exists() else f"there is no {match[1]}"
    if match := re.match(r"\./check .*-k (\w+)", start):
        return "" if match[1] in TESTS else f"no test is called {match[1]}"
    if match := re.match(r"ros2 run vla_nodes (\w+)", start):
        return "" if (ROOT / "resource/executables" / match[1]).exists() else f"there is no {match[1]}"
    if match := re.match(r"ros2 launch vla_nodes ([\w.]+\.py)", start):
        file = ROOT / "launch" / match[1]
        if not file.exists():
            return f"there is no launch/{match[1]}"
        described = (ROOT / "docs/reference/launch.md").read_text().split(f"## {match[1]}")[1].split("\n## ")[0]
        missing = [name for name in re.findall(r"(?<!\S)(\w+):=", start) if f"| `{name}` |" not in described]
        return f"{match[1]} has no argument {missing[0]}" if missing else ""
    return ""


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page):
    found = [f"{line}: {problem}" for line in shown(page) if (problem := wrong(line))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    ["./check -k nosuch" + "test", "python tools/nothing.py",
     "ros2 launch vla_nodes robot.launch.py robott:=ur5e", "ros2 run vla_nodes no_node"],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(line):
    assert wrong(line)

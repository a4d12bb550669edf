"""Write docs/reference/ from the code, or with --check say which pages are no longer what the code says.

    python tools/reference            # writes the pages
    python tools/reference --check    # exits 1 where one differs

Needs ROS 2 (the wheels of tools/setup will do): topics, services and their QoS are taken from nodes that are configured
here, so that the pages say what a node does and not what somebody meant it to do.
"""

from __future__ import annotations

import sys
from pathlib import Path

from from_classes import configuration
from from_commands import commands
from from_files import launch, messages
from from_nodes import parameters, topics_and_services

from vla_nodes import cli

PAGES = Path(__file__).resolve().parents[2] / "docs" / "reference"
NOTE = "<!-- Written by `python tools/reference`: change the code and run it again. -->"


def pages() -> dict[str, str]:
    """{file name: text}"""
    topic_page, service_page = topics_and_services()
    made = {
        "commands.md": commands(),
        "parameters.md": parameters(),
        "topics.md": topic_page,
        "services.md": service_page,
        "messages.md": messages(),
        "config.md": configuration(),
        "launch.md": launch(),
    }
    return {name: f"{NOTE}\n{text.rstrip()}\n" for name, text in made.items()}


def write(options: cli.Options) -> int:
    """The command."""
    stale = []
    for name, text in pages().items():
        file = PAGES / name
        if file.is_file() and file.read_text() == text:
            continue
        stale.append(name)
        if not options.check:
            PAGES.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    if stale:
        verb = "out of date, run python tools/reference:" if options.check else "written:"
        print(f"docs/reference: {verb} {', '.join(stale)}", file=sys.stderr if options.check else sys.stdout)
    return cli.ExitStatus.FAILED if options.check and stale else cli.ExitStatus.DONE


command = cli.Command(
    "reference",
    """
    Write docs/reference/ from the code, or with --check say which pages are no longer what the code says.

    Needs ROS 2: topics, services and their QoS are taken from nodes that are configured here.
    """,
    write,
    cli.flag("--check", "write nothing; the status is 1 if a page is out of date"),
    examples="""
    python tools/reference --check
    """,
    program="python tools/reference",
)


if __name__ == "__main__":
    sys.exit(cli.main(command))

"""What the package's executables run: a node, by the name of its module."""

from __future__ import annotations

import importlib
import os
import signal


def start(name: str) -> int:
    """Import and run the node; returns its exit status.

    Ctrl-C or SIGTERM while its libraries are imported, which takes seconds, ends the process like one later does,
    without a traceback. Neither kills a node that has ended in peace while its interpreter is taken down: a terminal's
    Ctrl-C comes twice under `ros2 launch`, and interpreters put back the default handlers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))  # nothing is running yet that would have to be ended
    status = importlib.import_module(f"vla_nodes.nodes.{name}").main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # which stays in force to the end
    return status

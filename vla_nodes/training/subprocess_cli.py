"""``python -m vla_nodes.training.subprocess_cli COMMAND ...``: a command of vla_nodes beside or within a training run.

VLA_NODES_NICE in the environment says how gladly it leaves the processor to others. It ends when its parent does,
however that ends (on Linux; elsewhere it runs to its own end).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from typing import Any

from vla_nodes.__main__ import main

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def start(arguments: list[str], nice: int = 0, launcher: tuple[str, ...] = (), **options: Any) -> subprocess.Popen:
    """A child that runs a command; ``launcher`` are arguments of Python that start several of it."""
    environment = {**os.environ, "VLA_NODES_NICE": str(nice)}
    return subprocess.Popen([sys.executable, *(launcher or ("-m",)), "vla_nodes.training.subprocess_cli", *arguments],
                            env=environment, **options)  # fmt: skip


if __name__ == "__main__":
    os.nice(int(os.environ.get("VLA_NODES_NICE", 0)))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)
    sys.exit(main())

"""The node processes behind ./run: in sessions of their own, and ended when ./run ends, however that happens.

Each node is a child in a session of its own, so that Ctrl-C reaches only the parent, which then ends the nodes in
order. The kernel kills a child whose parent dies (PR_SET_PDEATHSIG on Linux), so not even SIGKILL leaves one behind.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_PDEATHSIG = 1
DOMAINS = range(1, 102)
"""Domain ids whose ports lie below Linux's ephemeral range (docs.ros.org, The ROS_DOMAIN_ID)."""
NOTABLE = re.compile(r"\[(WARN|ERROR|FATAL)\] \[[\d.]+\] \[[^\]]*\]: (.*)")
REPEATS = 2
"""Times that a warning of a node is shown, whatever numbers stand in it; all of them are in its log."""


def free_domain() -> int:
    """A ROS domain id that no participant on this machine uses.

    Fast DDS takes UDP port 7410 + 250 * domain for a domain's first participant (DDSI-RTPS 9.6.1.1); a domain whose
    port can be bound has none. Raises RuntimeError when every domain is taken.
    """
    for domain in random.sample(DOMAINS, len(DOMAINS)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", 7410 + 250 * domain))
            except OSError:
                continue
        return domain
    raise RuntimeError(f"ROS domain ids {DOMAINS[0]} to {DOMAINS[-1]} are all in use on this machine")


def ros_environment() -> dict[str, str]:
    """Variables for the nodes and for this process: this machine only, a domain of its own, and one thread per node."""
    environment = os.environ.copy()
    environment.setdefault("ROS_DOMAIN_ID", str(free_domain()))
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    environment.setdefault("MUJOCO_GL", "egl")
    # idle BLAS threads spin, and four nodes share the cores; the policy's own threads are its parameter
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment.setdefault(name, "1")
    environment["PYTHONUNBUFFERED"] = "1"
    environment["RCUTILS_COLORIZED_OUTPUT"] = "0"
    return environment


def node_command(name: str, arguments: list[str]) -> list[str]:
    """The command of a node of this package, with ROS arguments."""
    return [sys.executable, "-m", f"vla_nodes.nodes.{name}", "--ros-args", *arguments]


def die_with_parent(parent: int) -> None:
    """Run in the child before exec: SIGINT works, and SIGKILL comes when the parent's thread ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background job, and that is inherited
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        os._exit(1)


@dataclass
class Child:
    """One node process and the log that its output goes to."""

    name: str
    process: subprocess.Popen
    log: Path
    read: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def new_notes(self) -> list[str]:
        """Warnings and errors written since the last call, as 'LEVEL text'; each at most REPEATS times in all."""
        with self.log.open("rb") as file:
            file.seek(self.read)
            data = file.read(1 << 20)
        complete = data[: data.rfind(b"\n") + 1]
        self.read += len(complete)
        shown = []
        for match in filter(None, map(NOTABLE.search, complete.decode(errors="replace").splitlines())):
            kind = re.sub(r"[\d.]+", "#", match[2])[:200]
            self.notes[kind] += 1
            if self.notes[kind] <= REPEATS:
                shown.append(f"{match[1]} {match[2]}")
        return shown

    def tail(self, lines: int = 15) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Processes:
    """The children; `stop` ends them all and may be called from any exit path, more than once."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.children: dict[str, Child] = {}

    def start(self, name: str, command: list[str]) -> Child:
        """Start a command; its output goes to <folder>/<name>.log."""
        log = self.folder / f"{name}.log"
        parent = os.getpid()
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )
        child = self.children[name] = Child(name, process, log)
        return child

    def ended(self) -> list[Child]:
        """Children that are no longer running."""
        return [child for child in self.children.values() if child.process.poll() is not None]

    def stop(self, patience: float = 4.0) -> None:
        """End every child: SIGINT, so that it stops the arm and says goodbye, then SIGKILL after `patience` s."""
        deadline = time.monotonic() + patience
        self._signal(signal.SIGINT)
        while time.monotonic() < deadline and any(c.process.poll() is None for c in self.children.values()):
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        for child in self.children.values():
            child.process.wait()

    def _signal(self, number: int) -> None:
        for child in self.children.values():
            if child.process.poll() is None:
                os.killpg(child.process.pid, number)

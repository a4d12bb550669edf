"""Where the package's shared files (URDF, parameter files, checkpoints) are, with or without a ROS installation."""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

PACKAGE = "vla_nodes"
SHIPPED_CHECKPOINT = "resource/checkpoints/nano"
"""Below the package's share folder: what is used where no checkpoint is named."""


def share_roots() -> list[Path]:
    """Folders that may hold the shared files: the source checkout, each ament prefix, then this Python's own prefix."""
    checkout = Path(__file__).resolve().parent.parent
    prefixes = [Path(p) for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    return [checkout, *(p / "share" / PACKAGE for p in [*prefixes, Path(sys.prefix)])]


def share_path(relative: str) -> Path:
    """The absolute path of a shared file or folder such as ``config/panda/panda.urdf``.

    Raises FileNotFoundError naming every place that was looked in.
    """
    for root in share_roots():
        candidate = root / relative
        if candidate.exists():
            return candidate
    looked = ", ".join(str(root) for root in share_roots())
    raise FileNotFoundError(
        f"{relative} not found; looked in {looked}: is {PACKAGE} installed or its workspace sourced?"
    )


def version() -> str:
    """The version of vla_nodes: package.xml has it, and nothing else."""
    return ElementTree.parse(share_path("package.xml")).getroot().findtext("version", "unknown")

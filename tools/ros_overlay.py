#!/usr/bin/env python3
"""Make the Python environment of vla_nodes over apt's ROS 2 Jazzy: a venv that sees the system's packages.

    python3 tools/ros_overlay.py ~/vla_overlay
    . ~/vla_overlay/bin/activate

rosdep installs what Ubuntu and ROS have packages for (package.xml). The rest of requirements/runtime.txt comes from pip
and lies in the venv alone: the system is not touched, and numpy, OpenCV and Pinocchio stay those of apt and ROS, which
are built for each other. The nodes' executables run the Python that is first on the PATH, so the venv's once it is
activated. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from importlib import import_module
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
FROM_APT = {
    "click": "python3-click",
    "numpy": "python3-numpy",
    "opencv-python-headless": "python3-opencv",
    "pillow": "python3-pil",
    "pin": "pinocchio",
    "pyyaml": "python3-yaml",
    "tqdm": "python3-tqdm",
}
"""Requirement: the rosdep key in package.xml that brings it."""
IMPORTS = ("click", "numpy", "cv2", "PIL", "pinocchio", "yaml", "tqdm")
"""The modules of FROM_APT."""


def requirements() -> list[str]:
    """The lines of runtime.txt that pip has to bring; torch's first."""
    lines = (raw.split("#")[0].strip() for raw in (REQUIREMENTS / "runtime.txt").read_text().splitlines())
    return [line for line in lines if line and name_of(line) not in FROM_APT]


def name_of(line: str) -> str:
    """The package in a requirement or a constraint."""
    return re.split(r"[\s\[<>=!;]", line, maxsplit=1)[0].lower()


def constraints(numpy: str) -> list[str]:
    """constraints.txt with the system's numpy, for which the compiled packages of apt are built."""
    lines = (REQUIREMENTS / "constraints.txt").read_text().splitlines()
    return [*(line for line in lines if name_of(line) != "numpy"), f"numpy=={numpy}"]


def system_numpy() -> str:
    """The version of the system's numpy. Raises SystemExit, with the remedy, where what rosdep brings is missing."""
    for module in IMPORTS:
        try:
            import_module(module)
        except ImportError as error:
            sys.exit(
                f"ros_overlay: {error}: source /opt/ros/jazzy/setup.bash, run `rosdep install --from-paths src` first"
            )
    return import_module("numpy").__version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to make the venv, e.g. ~/vla_overlay")
    folder = parser.parse_args().folder.expanduser()
    if sys.prefix != sys.base_prefix:
        sys.exit("ros_overlay: run it with the system's python3, not from a venv: `deactivate` first")
    numpy = system_numpy()
    venv.create(folder, system_site_packages=True, with_pip=True)
    (folder / "COLCON_IGNORE").touch()  # colcon would search it for packages where it lies in the workspace
    python = folder / "bin/python"
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch) / "constraints.txt"
        pinned.write_text("\n".join(constraints(numpy)) + "\n")
        # torch first and by itself, so that no other requirement decides which build of it is taken
        torch, *others = requirements()
        for lines in ([torch], others):
            subprocess.run([python, "-m", "pip", "install", "-c", pinned, *lines], check=True)
    check = f"import {', '.join(IMPORTS)}, torch, mujoco; assert numpy.__version__ == '{numpy}'"
    subprocess.run([python, "-c", check], check=True)
    print(f"made; in every terminal, after ROS 2 and the workspace are sourced: . {folder}/bin/activate")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"ros_overlay: {' '.join(map(str, error.cmd[:4]))} ... ended with {error.returncode}; see above")

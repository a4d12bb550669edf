"""The ROS-free part of vla_nodes for pip: policy, control, simulation, data, training.

`pip install .` gives what runs without ROS 2. The nodes need the generated messages and rclpy: build the package with
colcon (package.xml, CMakeLists.txt), or use ./run, which does.
"""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """The requirement lines of requirements/<name>.txt."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line for line in (raw.split("#")[0].strip() for raw in lines) if line]


def version() -> str:
    """The version in package.xml, the one place where it is written for both builds."""
    return ElementTree.parse(ROOT / "package.xml").getroot().findtext("version")


def share_files() -> list[tuple[str, list[str]]]:
    """package.xml, config/, launch/, msg/ and the checkpoints under share/vla_nodes, where vla_nodes.share looks."""
    folders: dict[str, list[str]] = {}
    for top in ("config", "launch", "msg", "resource/checkpoints"):
        for file in sorted((ROOT / top).rglob("*")):
            if file.is_file() and not {"__pycache__", "engines"} & set(file.parts):  # engines: graphs made here
                relative = file.relative_to(ROOT)
                folders.setdefault(f"share/vla_nodes/{relative.parent}", []).append(str(relative))
    return [("share/vla_nodes", ["package.xml"]), *sorted(folders.items())]


EXTRAS = {"sim": ("mujoco", "pillow"), "train": ("mujoco",)}
"""Requirements that only these rooms need: pip install 'vla_nodes[sim]'."""

runtime = {re.split("[<>=!]", line)[0]: line for line in requirements("runtime")}
optional = {name for names in EXTRAS.values() for name in names}

setup(
    name="vla_nodes",
    version=version(),
    description="A robot arm obeys a sentence: RGB-D and an instruction in, trajectories out, with a state space model",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["vla_nodes", "vla_nodes.*"]),
    data_files=share_files(),
    entry_points={"console_scripts": ["vla_nodes = vla_nodes.__main__:main"]},
    install_requires=[line for name, line in runtime.items() if name not in optional],
    extras_require={
        **{extra: [runtime[name] for name in names] for extra, names in EXTRAS.items() if extra != "train"},
        "train": [*(runtime[name] for name in EXTRAS["train"]), *requirements("train")],
        "onnxruntime": ["onnxruntime", "onnx", "onnxscript"],  # another engine for policy_node
        "lerobot": ["av>=15", "pyarrow>=21"],  # python -m vla_nodes dataset: LeRobot folders
        "dev": requirements("dev") + requirements("train"),
    },
)

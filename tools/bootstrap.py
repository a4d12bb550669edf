"""Make this checkout runnable on a Debian or Ubuntu machine without ROS: what ./run and ./check do first.

It makes .venv with the pinned wheels (ROS 2 Jazzy among them, from PyPI), generates the messages with colcon into
.build, and writes .build/env.sh, which a shell sources to have ROS and vla_nodes at hand. Each step leaves a stamp
with a hash of what it was made from, so a second start does nothing and an interrupted one goes on where it was.

Only the standard library is used: this file runs before anything is installed.
"""

from __future__ import annotations

import argparse
import ctypes.util
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BUILD = ROOT / ".build"
STAMPS = BUILD / "stamps"
ENV_FILE = BUILD / "env.sh"
REQUIREMENTS = ROOT / "requirements"
PYTHONS = [(3, 10), (3, 11), (3, 12), (3, 13)]

# The build machines of the ROS wheels had Python here; their CMake files still say so.
WHEEL_PYTHON_ROOT = "/opt/python/cp"

PACKAGE_PARTS = ["CMakeLists.txt", "package.xml", "LICENSE", "config", "launch", "msg", "resource", "vla_nodes"]

APT_FOR_COMMAND = {"cmake": "cmake", "g++": "g++", "make": "make"}
APT_FOR_LIBRARY = {"EGL": "libegl1", "EGL_mesa": "libegl-mesa0"}


class SetupError(Exception):
    """Set-up cannot go on; the message names what is missing and the remedy."""


_start = time.monotonic()


def say(text: str) -> None:
    """Print one progress line with the time since the start."""
    print(f"[setup {time.monotonic() - _start:6.1f} s] {text}", flush=True)


def digest(parts: Iterable[str | bytes | Path]) -> str:
    """A hash over strings and file contents, in order."""
    h = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def step(name: str, key: str, what: str, action: Callable[[], None]) -> None:
    """Run ``action`` unless the stamp of ``name`` says that it was done for ``key``."""
    stamp = STAMPS / name
    if stamp.exists() and stamp.read_text() == key:
        return
    stamp.unlink(missing_ok=True)
    say(what)
    action()
    STAMPS.mkdir(parents=True, exist_ok=True)
    partial = stamp.with_suffix(".partial")
    partial.write_text(key)
    partial.replace(stamp)


def run(command: list[str], log: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
    """Run a command with its output in .build/logs; on failure show the end of it.

    While it runs, a line every 20 s says that it is still at work.
    """
    log_file = BUILD / "logs" / f"{log}.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=cwd, stdin=subprocess.DEVNULL
        )
        try:
            while True:
                try:
                    code = child.wait(timeout=20)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  ... {log}: still at work")
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if code:
        tail = log_file.read_text(errors="replace").splitlines()[-25:]
        raise SetupError(
            f"{shlex.join(command[:4])} ... failed ({code}); the end of {log_file}:\n  " + "\n  ".join(tail)
        )


def clean_environment(**extra: str) -> dict[str, str]:
    """This environment without what another ROS, venv or Python set."""
    foreign = (
        "AMENT_",
        "COLCON_",
        "CMAKE_PREFIX_PATH",
        "ROS_",
        "PYTHONPATH",
        "PYTHONHOME",
        "LD_LIBRARY_PATH",
        "VIRTUAL_ENV",
        "_ROS_WHEELS",
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return env | extra


# ---- the machine -----------------------------------------------------------------------------------------------


def check_python() -> None:
    """Refuse a Python or a machine that the ROS wheels are not made for."""
    version = sys.version_info[:2]
    if version not in PYTHONS:
        names = ", ".join(f"{a}.{b}" for a, b in PYTHONS)
        raise SetupError(
            f"Python {version[0]}.{version[1]} is not supported: the pinned wheels exist for {names}. "
            f"Install one of them and run again with PYTHON=python3.12 before the command."
        )
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SetupError(
            f"{sys.platform} on {platform.machine()}: PyPI's ROS 2 wheels exist for Linux on x86_64. "
            "Install ROS 2 Jazzy "
            "and use colcon build and ros2 launch instead (README, 'With ROS 2')."
        )


def missing_packages() -> list[str]:
    """Debian packages that this machine lacks."""
    missing = [package for command, package in APT_FOR_COMMAND.items() if shutil.which(command) is None]
    missing += [package for library, package in APT_FOR_LIBRARY.items() if ctypes.util.find_library(library) is None]
    if not mesa_software_renderer():
        missing.append("libgl1-mesa-dri")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    distribution_python = Path(sys.executable).resolve().parent == Path("/usr/bin")
    if not python_can_make_venv():
        missing.append(f"python{version}-venv" if distribution_python else "python3-venv")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append(f"python{version}-dev" if distribution_python else "python3-dev")
    return missing


def mesa_software_renderer() -> bool:
    """Whether Mesa's drivers, the software ones included, are installed."""
    found = ctypes.util.find_library("gallium") is not None
    folders = [Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/lib/x86_64-linux-gnu")]
    return found or any(any(f.glob("dri/*swrast*")) or any(f.glob("libgallium*")) for f in folders)


def python_can_make_venv() -> bool:
    """Debian splits ensurepip off into python3-venv."""
    try:
        import ensurepip
        import venv
    except ImportError:
        return False
    return bool(ensurepip and venv)


def install_system_packages() -> None:
    """Install what the machine lacks when root, else say what to install."""
    missing = missing_packages()
    if not missing:
        return
    line = f"apt-get install -y {' '.join(missing)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SetupError(f"this machine lacks system packages; install them with: sudo {line}")
    say(f"installing system packages: {' '.join(missing)}")
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update"], "apt-update", env)
    run(["apt-get", "install", "-y", "--no-install-recommends", *missing], "apt-install", env)
    if still := missing_packages():
        raise SetupError(f"system packages are still missing after apt-get: {' '.join(still)}")


# ---- the virtual environment -----------------------------------------------------------------------------------


def make_venv() -> None:
    """A fresh .venv of the Python that runs this."""
    if VENV.exists():
        shutil.rmtree(VENV)
    run([sys.executable, "-m", "venv", str(VENV)], "venv", clean_environment())


def pip(log: str, *arguments: str) -> None:
    """Run the venv's pip under the constraints."""
    command = [str(VENV / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    run(
        [*command, "-c", str(REQUIREMENTS / "constraints.txt"), *arguments],
        log,
        clean_environment(_ROS_WHEELS_BOOTSTRAP_COMPLETE="1"),
    )


def requirement_line(name: str) -> str:
    """The line of requirements/runtime.txt for ``name``."""
    for line in (REQUIREMENTS / "runtime.txt").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line
    raise SetupError(f"requirements/runtime.txt has no {name}==VERSION line")


def install_wheels(*names: str) -> None:
    """The pinned wheels of requirements/<name>.txt."""
    pip(f"pip-{names[0]}", *(a for name in names for a in ("-r", str(REQUIREMENTS / f"{name}.txt"))))


def patch_cmake_files() -> None:
    """Replace the paths of the wheels' build machine in their CMake files by those of this venv's Python.

    Without it CMake refuses every message package: its imported target names an include directory that does not exist.
    """
    code = "import numpy, sysconfig; print(numpy.get_include()); print(sysconfig.get_paths()['include'])"
    env = clean_environment(_ROS_WHEELS_BOOTSTRAP_COMPLETE="1")
    numpy_include, python_include = subprocess.run(
        [str(VENV / "bin/python"), "-c", code], check=True, capture_output=True, text=True, env=env
    ).stdout.split("\n")[:2]
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    root = f"{WHEEL_PYTHON_ROOT}{tag[2:]}-{tag}"
    patched = 0
    for file in [*VENV.glob("share/*/cmake/*.cmake"), *VENV.glob("lib/cmake/*/*.cmake")]:
        text = file.read_text()
        if WHEEL_PYTHON_ROOT not in text:
            continue
        for core in ("_core", "core"):
            text = text.replace(f"{root}/lib/{version}/site-packages/numpy/{core}/include", numpy_include)
        text = text.replace(f"{root}/include/{version}", python_include).replace(root, str(VENV))
        file.write_text(text)
        patched += 1
    if left := [f for f in VENV.glob("share/*/cmake/*.cmake") if WHEEL_PYTHON_ROOT in f.read_text()]:
        raise SetupError(
            f"the ROS wheels changed: {left[0]} still names {WHEEL_PYTHON_ROOT}...; remove .venv and try again"
        )
    say(f"  {patched} CMake files of the ROS wheels adapted to this Python")


# ---- the package -----------------------------------------------------------------------------------------------


def ros_variables() -> dict[str, str]:
    """The variables that make the venv and the built package a ROS 2 environment."""
    libraries = [BUILD / "install/lib", VENV / "lib", *sorted(VENV.glob("lib/python3.*/site-packages/ros_*.libs"))]
    site = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    return {
        "ROS_DISTRO": "jazzy",
        "ROS_VERSION": "2",
        "ROS_PYTHON_VERSION": "3",
        "AMENT_PREFIX_PATH": f"{BUILD / 'install'}:{VENV}",
        "CMAKE_PREFIX_PATH": f"{BUILD / 'install'}:{VENV}",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        # the checkout first, so that what is edited is what runs; the generated vla_nodes.msg is found in the install
        "PYTHONPATH": f"{ROOT}:{BUILD / 'install' / site}",
        # the wheels' .pth file would start Python a second time to set LD_LIBRARY_PATH; it is set here
        "_ROS_WHEELS_BOOTSTRAP_COMPLETE": "1",
    }


def link_workspace() -> Path:
    """A colcon workspace of symbolic links to this checkout.

    CMake refuses to export a target whose include directories lie inside the source directory, and .venv with numpy's
    headers would lie there if the checkout itself were the source directory.
    """
    package = BUILD / "ws/src/vla_nodes"
    shutil.rmtree(BUILD / "ws", ignore_errors=True)
    package.mkdir(parents=True)
    for name in PACKAGE_PARTS:
        (package / name).symlink_to(ROOT / name)
    return BUILD / "ws"


def build_package() -> None:
    """Generate the messages and install the package with colcon, source files by symbolic link."""
    workspace = link_workspace()
    env = clean_environment(**ros_variables())
    env["PATH"] = f"{VENV / 'bin'}:{env['PATH']}"
    env["AMENT_PREFIX_PATH"] = env["CMAKE_PREFIX_PATH"] = str(VENV)
    env.pop("PYTHONPATH")
    shutil.rmtree(BUILD / "install", ignore_errors=True)
    run(
        [
            str(VENV / "bin/colcon"),
            "--log-base",
            str(BUILD / "log"),
            "build",
            "--base-paths",
            str(workspace / "src"),
            "--build-base",
            str(BUILD / "build"),
            "--install-base",
            str(BUILD / "install"),
            "--merge-install",
            "--symlink-install",
            "--packages-select",
            "vla_nodes",
            "--cmake-args",
            "-DBUILD_TESTING=OFF",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython3_EXECUTABLE={VENV / 'bin/python'}",
            "-DPython3_FIND_VIRTUALENV=ONLY",
            "--no-warn-unused-cli",
        ],
        "colcon",
        env,
    )


def write_env_file() -> None:
    """Write .build/env.sh: `. .build/env.sh` gives a shell this ROS 2 environment."""
    lines = [
        "# Written by tools/bootstrap.py: source it for ROS 2 and vla_nodes of this checkout.",
        "unset AMENT_CURRENT_PREFIX COLCON_PREFIX_PATH PYTHONHOME",
    ]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in ros_variables().items()]
    for folder in (VENV / "bin", BUILD / "install/bin"):
        lines.append(f'case ":$PATH:" in *:{folder}:*) ;; *) export PATH={shlex.quote(str(folder))}:"$PATH" ;; esac')
    with tempfile.NamedTemporaryFile("w", dir=BUILD, delete=False) as file:
        file.write("\n".join(lines) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, ENV_FILE)


def make_engine() -> None:
    """The shipped policy's graphs for this CPU, so that the first start does not make them."""
    env = clean_environment(**ros_variables())
    run([str(VENV / "bin/python"), "-m", "vla_nodes", "engine"], "engine", env)


def installed_files() -> list[str]:
    """Names of the share files and executables, which the build links one by one: a new one needs an install."""
    folders = ("launch", "config", "resource/executables", "resource/bin")
    return sorted(
        str(f.relative_to(ROOT))
        for folder in folders
        for f in (ROOT / folder).rglob("*")
        if f.is_file() and f.suffix != ".pyc"
    )


def setup(tests: bool = False) -> None:
    """Every step, in order; each does nothing where it was done. ``tests`` adds what only ./check needs."""
    check_python()
    BUILD.mkdir(exist_ok=True)
    here = f"{ROOT} {sys.version} {sysconfig.get_paths()['include']} {sysconfig.get_platform()}"
    pins = [REQUIREMENTS / f"{name}.txt" for name in ("constraints", "ros", "runtime")]
    venv_key = digest([here])
    torch_key = digest([venv_key, requirement_line("torch")])
    wheels_key = digest([torch_key, *pins])
    build_key = digest(
        [
            wheels_key,
            Path(__file__),
            ROOT / "CMakeLists.txt",
            ROOT / "package.xml",
            *sorted(ROOT.glob("msg/*.msg")),
            *installed_files(),
        ]
    )

    if not (VENV / "bin/python").exists():
        shutil.rmtree(STAMPS, ignore_errors=True)
    step("system", digest([here, Path(__file__)]), "looking at the system packages", install_system_packages)
    step("venv", venv_key, f"making .venv with Python {platform.python_version()}", make_venv)
    # torch first and by itself, so that no other requirement decides which build of it is taken
    step(
        "torch",
        torch_key,
        f"installing {requirement_line('torch')} (the largest part)",
        lambda: pip("pip-torch", requirement_line("torch")),
    )
    step("wheels", wheels_key, "installing the pinned wheels, ROS 2 Jazzy among them",
         lambda: install_wheels("runtime", "ros"))  # fmt: skip
    step("cmake", digest([wheels_key, Path(__file__)]), "adapting the ROS wheels to this Python", patch_cmake_files)
    step("build", build_key, "generating the messages with colcon", build_package)
    step("env", build_key, f"writing {ENV_FILE.relative_to(ROOT)}", write_env_file)
    if not tests:  # the tests make their own
        shipped = ROOT / "resource/checkpoints/nano"
        files = [f for f in (shipped / "model.safetensors", shipped / "int8.json") if f.exists()]
        engine_key = digest([wheels_key, *files, *sorted((ROOT / "vla_nodes/policy").rglob("*.py"))])
        if files:
            step("engine", engine_key, "exporting the shipped policy to the fast engine", make_engine)
    if tests:
        tests_key = digest([wheels_key, REQUIREMENTS / "dev.txt", REQUIREMENTS / "train.txt"])
        step("tests", tests_key, "installing what only the tests need", lambda: install_wheels("dev", "train"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clean", action="store_true", help="remove .venv and .build first")
    parser.add_argument("--tests", action="store_true", help="also install what only ./check needs")
    arguments = parser.parse_args()
    if arguments.clean:
        shutil.rmtree(VENV, ignore_errors=True)
        shutil.rmtree(BUILD, ignore_errors=True)
    try:
        setup(arguments.tests)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next start goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

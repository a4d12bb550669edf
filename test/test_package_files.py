"""The package's files agree with each other: manifest, build, set-up without ROS, and what the code imports."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ElementTree.parse(ROOT / "package.xml").getroot()
MESSAGES = sorted((ROOT / "msg").glob("*.msg"))
ROS_PACKAGES = {"rclpy", "rosidl_runtime_py", "ament_index_python", "launch", "launch_ros"}
OPTIONAL = {"cv_bridge", "control_msgs", "tf2_msgs"}


def tool(name: str):
    specification = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def bootstrap():
    return tool("bootstrap")


def depends(*kinds: str) -> set[str]:
    return {element.text for kind in kinds for element in MANIFEST.iter(kind)}


def imports(file: Path) -> set[tuple[str, bool]]:
    """(top-level package, whether at module level and outside try) of every import in a file."""
    tree, found = ast.parse(file.read_text()), set()
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0], id(node) in top) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add((node.module.split(".")[0], id(node) in top))
    return found


def test_every_ros_package_that_is_imported_is_an_exec_depend():
    sources = [*ROOT.glob("vla_nodes/**/*.py"), *ROOT.glob("launch/*.py")]
    needed = {
        name
        for file in sources
        for name, required in imports(file)
        if required and (name in ROS_PACKAGES or name.endswith(("_msgs", "_srvs", "_interfaces")))
    }
    assert len(needed) > 5
    assert needed - depends("depend", "exec_depend") == set()


def rooms() -> list[str]:
    """The folders of vla_nodes/ in the order of CONTRIBUTING.md's table: each may import those below it."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Where a change goes")[1].split("\n## ")[0]
    return [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)/`", row)]


def room_imports(room: str) -> list[tuple[str, str]]:
    """(file, folder of vla_nodes/) for every import in a folder's files."""
    found = []
    for file in sorted((ROOT / "vla_nodes" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                parts = name.split(".")
                if parts[0] == "vla_nodes" and len(parts) > 1 and parts[1] != room:
                    found.append((str(file.relative_to(ROOT)), parts[1]))
    return found


def test_every_folder_is_in_the_table_of_rooms():
    folders = {file.parent.name for file in ROOT.glob("vla_nodes/*/__init__.py")}
    assert folders - set(rooms()) == set(), "CONTRIBUTING.md does not say what these hold"


@pytest.mark.parametrize("room", rooms())
def test_rooms_import_only_those_below_them(room):
    order = rooms()
    below = {"cli"} if room in ("policy", "control") else set(order[order.index(room) + 1 :])
    upwards = {f"{file} imports {other}" for file, other in room_imports(room) if other in order and other not in below}
    assert not upwards, sorted(upwards)


@pytest.mark.parametrize("room", rooms()[2:])
def test_rooms_below_the_nodes_never_import_ros(room):
    files = list((ROOT / "vla_nodes" / room).rglob("*.py"))
    assert files
    for file in files:
        names = {name for name, _ in imports(file)}
        assert not names & ROS_PACKAGES, f"{file} imports {names & ROS_PACKAGES}"


def test_no_two_modules_share_a_name():
    """Searching for a file by its name leads to one place.

    Two names say what a file is to its folder: cli.py is its command line, base.py what its modules have in common.
    """
    names = [
        file.stem
        for file in (ROOT / "vla_nodes").rglob("*.py")
        if file.name not in ("__init__.py", "cli.py", "base.py")
    ]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_every_message_is_built():
    text = (ROOT / "CMakeLists.txt").read_text()
    assert {f"msg/{m.name}" for m in MESSAGES} == set(re.findall(r"msg/\w+\.msg", text))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.stem)
def test_every_field_of_a_message_has_a_comment(message):
    """A comment above the field, or above the block of lines without a blank one that it stands in, or beside it."""
    commented = False
    for line in message.read_text().splitlines():
        if not line.strip():
            commented = False
        elif line.startswith("#") or "#" in line:
            commented = True
        else:
            assert commented, f"{message.name}: {line!r} has no comment"


def test_every_node_has_an_executable_that_runs_its_module():
    text = (ROOT / "CMakeLists.txt").read_text()
    names = re.search(r"foreach\(node ([\w ]+)\)", text)[1].split()
    assert set(names) == {f.name for f in (ROOT / "resource/executables").iterdir()}
    for name in names:
        script = ROOT / "resource/executables" / name
        assert script.stat().st_mode & 0o111
        assert f'start("{name}")' in script.read_text()
        assert (ROOT / f"vla_nodes/nodes/{name}.py").exists()


def test_every_requirement_is_pinned():
    pinned = {line.split("==")[0].lower() for line in (ROOT / "requirements/constraints.txt").read_text().splitlines()}
    for name in ("runtime", "dev", "ros", "train"):
        for raw in (ROOT / f"requirements/{name}.txt").read_text().splitlines():
            line = raw.split("#")[0].strip()
            if line and "==" not in line:
                assert re.sub(r"\[.*\]", "", line).lower() in pinned, f"requirements/{name}.txt: {line} is not pinned"


def test_versions_agree():
    import vla_nodes

    assert MANIFEST.findtext("version") == vla_nodes.__version__
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == vla_nodes.__version__


def test_a_step_runs_once_for_a_key_and_again_for_another(tmp_path, monkeypatch):
    module, calls = bootstrap(), []
    monkeypatch.setattr(module, "STAMPS", tmp_path)
    for key in ("a", "a", "b", "b", "a"):
        module.step("x", key, "testing", lambda key=key: calls.append(key))
    assert calls == ["a", "b", "a"]


def test_an_interrupted_step_runs_again(tmp_path, monkeypatch):
    module = bootstrap()
    monkeypatch.setattr(module, "STAMPS", tmp_path)
    module.step("x", "old", "testing", lambda: None)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module.step("x", "new", "testing", interrupted)
    calls = []
    module.step("x", "old", "testing", lambda: calls.append(1))
    assert calls == [1], "a step that was begun for another key must not count as done for the old one"


def test_an_unsupported_python_is_refused_with_the_supported_ones(monkeypatch):
    module = bootstrap()
    monkeypatch.setattr(module.sys, "version_info", (3, 9, 0))
    with pytest.raises(module.SetupError, match="3.10, 3.11, 3.12, 3.13"):
        module.check_python()


def test_without_root_missing_packages_are_named_in_one_line(monkeypatch):
    module = bootstrap()
    monkeypatch.setattr(module, "missing_packages", lambda: ["cmake", "libegl1"])
    monkeypatch.setattr(module.os, "geteuid", lambda: 1000)
    with pytest.raises(module.SetupError) as caught:
        module.install_system_packages()
    assert "sudo apt-get install -y cmake libegl1" in str(caught.value) and "\n" not in str(caught.value)


def test_no_launch_file_reads_a_params_file_with_substitutions():
    """Where launch is not installed: a "$(" in a comment of a params file would be one, and end the launch."""
    for file in (*ROOT.glob("launch/*.py"), ROOT / "vla_nodes/nodes/launching.py"):
        words = {word.arg for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
                 for word in node.keywords}  # fmt: skip
        assert "allow_substs" not in words, file.name


def collect(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    """pytest of this project over a fast file of it, beside the launch_testing of Jazzy, whose hook has the arguments
    of an older pytest."""
    plugin = tmp_path / "launch_testing-3.4.3.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: launch-testing\nVersion: 3.4.3\n")
    (plugin / "entry_points.txt").write_text("[pytest11]\nlaunch_testing = jazzys_launch_testing\n")
    (tmp_path / "jazzys_launch_testing.py").write_text("def pytest_pycollect_makemodule(path, parent, gone): ...\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *options, "test/test_control_seam_report.py"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("options", [(), ("-p", "no:timeout")], ids=["as it is", "without pytest-timeout"])
def test_the_tests_start_beside_launch_testing_and_without_pytest_timeout(tmp_path, options):
    result = collect(tmp_path, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PytestConfigWarning" not in result.stdout, "the key `timeout` is not known"


def test_what_the_tests_import_is_a_test_depend():
    """Of the packages that rosdep knows; the others are oracles, which requirements/dev.txt names and tests skip."""
    keys = {
        "pytest": "python3-pytest",
        "hypothesis": "python3-hypothesis",
        "launch": "launch",
        "launch_ros": "launch_ros",
    }
    used = {name for file in ROOT.glob("test/*.py") for name, _ in imports(file)}
    declared = depends("depend", "exec_depend", "test_depend")
    assert {key for name, key in keys.items() if name in used} | {"python3-pytest-timeout"} <= declared


def test_what_pip_does_not_bring_over_apt_comes_by_rosdep():
    overlay = tool("ros_overlay")
    assert set(overlay.FROM_APT.values()) <= depends("exec_depend")
    names = [overlay.name_of(line) for line in (ROOT / "requirements/runtime.txt").read_text().splitlines()]
    assert set(overlay.FROM_APT) <= set(names)
    from_pip = [overlay.name_of(line) for line in overlay.requirements()]
    assert from_pip[0] == "torch" and not set(from_pip) & set(overlay.FROM_APT)


def test_the_overlay_leaves_the_systems_numpy_alone():
    overlay = tool("ros_overlay")
    lines = overlay.constraints("1.26.4")
    assert [line for line in lines if overlay.name_of(line) == "numpy"] == ["numpy==1.26.4"]
    assert any(line.startswith("mujoco==") for line in lines), "the tested versions of everything else"


def test_every_optional_ros_import_is_an_exec_depend():
    """Packages that are only tried (cv_bridge, control_msgs, tf2_msgs): with rosdep everything works."""
    tried = {name for file in ROOT.glob("vla_nodes/**/*.py") for name, _ in imports(file) if name in OPTIONAL}
    assert tried == OPTIONAL and tried <= depends("depend", "exec_depend")

"""tools/lint finds what is broken on purpose, and nothing in the repository as it is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLEAN = '"""A module."""\n\nANSWER = 42\n'


def lint(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([folder / "tools/lint"], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A repository of one clean module, under the rules of this one."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "vla_nodes").mkdir()
    shutil.copy(ROOT / "tools/lint", tmp_path / "tools/lint")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    (tmp_path / "vla_nodes/__init__.py").write_text(CLEAN)
    return tmp_path


def test_the_repository_is_clean():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_clean_module_passes(copy):
    assert lint(copy).returncode == 0


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("unused.py", f"import os\n\n{CLEAN}", "F401"),
        ("unformatted.py", CLEAN.replace(" = ", "="), "unformatted.py"),
        ("logging.py", CLEAN, "A005"),
        ("wide.py", f"{CLEAN}\n# {'x' * 120}\n", "E501"),
    ],
)
def test_what_is_broken_on_purpose_is_found(copy, name, text, said):
    (copy / "vla_nodes" / name).write_text(text)
    result = lint(copy)
    assert result.returncode != 0 and said in result.stdout + result.stderr


def types(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mypy", "vla_nodes"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "text, said",
    [
        ('def answer() -> int:\n    return "42"\n', "return-value"),
        ("def answer(question):\n    return 42\n", "no-untyped-def"),
        ("def answer(length: float | None) -> float:\n    return length + 1\n", "operator"),
    ],
)
def test_a_wrong_type_is_found(copy, text, said):
    assert types(copy).returncode == 0
    (copy / "vla_nodes/wrong.py").write_text(text)
    result = types(copy)
    assert result.returncode != 0 and said in result.stdout

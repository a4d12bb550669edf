"""tools/lint finds what is broken on purpose, and nothing in the repository as it is."""

import shutil
import subprocess
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

"""Imported before any test: the tabletop chooses MuJoCo's renderer, which must happen before mujoco is imported."""

import pytest
import soak

import vla_nodes.envs.tabletop  # noqa: F401


def pytest_addoption(parser, pluginmanager):
    if not pluginmanager.has_plugin("timeout"):  # pytest-timeout; without it a test that hangs is not ended
        parser.addini("timeout", "s; taken by pytest-timeout where it is installed")
    group = parser.getgroup("vla_nodes")
    group.addoption("--soak", action="store_true", help="also what takes longer: thousands of streams, kills, sessions")
    group.addoption("--first-seed", type=int, default=0, metavar="N", help="where random streams start")


def pytest_configure(config):
    if not config.pluginmanager.has_plugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): taken by pytest-timeout where it is installed")
    soak.enabled = config.getoption("--soak")
    soak.first_seed = config.getoption("--first-seed")


def pytest_collection_modifyitems(config, items):
    """Tests marked slow run with --soak, or where -m asks for them."""
    if soak.enabled or config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def denormals():
    """Some libraries make their thread flush denormal numbers when they load; hypothesis and the laws tested mind."""
    import torch

    torch.set_flush_denormal(False)

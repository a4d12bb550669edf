"""Imported before any test: the tabletop chooses MuJoCo's renderer, which must happen before mujoco is imported."""

import pytest

import vla_nodes.envs.tabletop  # noqa: F401


@pytest.fixture(autouse=True)
def denormals():
    """Some libraries make their thread flush denormal numbers when they load; hypothesis and the laws tested mind."""
    import torch

    torch.set_flush_denormal(False)

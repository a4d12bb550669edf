"""Imported before any test: vla_nodes.sim chooses MuJoCo's renderer, which must happen before mujoco is imported."""

import vla_nodes.sim  # noqa: F401

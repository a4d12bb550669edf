"""The comparison with peers: the same chunks, in the simulator, through our executor and through naive ones."""

import numpy as np
import pytest
import robots

from vla_nodes.benchmarks import executor_compare
from vla_nodes.benchmarks.executor_compare import Player, play, table
from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.envs.tabletop import mjcf
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.tasks import Task

READY = np.asarray(mjcf.READY)


def chunk(stamp, offset=0.0, rows=16, seed=None):
    """A slow swing of every joint, the same for every stamp but for noise: what a policy's chunks agree on."""
    t = stamp + 0.1 * np.arange(1, rows + 1)
    q = READY + offset + 0.15 * (1.0 - np.cos(1.2 * t))[:, None] * np.linspace(0.5, 1.0, 7)
    if seed is not None:
        q += 0.004 * np.random.default_rng(seed).normal(size=(1, 7))
    return ActionChunk(
        stamp, "swing", 0.1, ActionSpace.JOINT_POSITION, np.hstack([q, np.ones((rows, 1))]), robots.GRIPPER
    )


@pytest.fixture(scope="module")
def played():
    chunks = [chunk(0.1 * k, seed=k) for k in range(15)]
    task = Task("pick", next(t.name for t in Scene.demo(0).things if t.kind == "block"))
    return {name: play(Scene.demo(0), task, "", chunks, name, 0.15) for name in executor_compare.EXECUTORS}


def test_ours_moves_with_a_fifth_of_the_naive_jerk_at_most(played):
    rms, peak = ({n: f(p.jerk) for n, p in played.items()} for f in (lambda x: np.sqrt(np.mean(x * x)), np.max))
    for ours in ("ours", "ours-mean"):
        assert rms["naive"] > 5.0 * rms[ours] and peak["naive"] > 5.0 * peak[ours], (rms, peak)
        assert rms["timed"] > 5.0 * rms[ours], rms
        assert rms["mean"] > 3.0 * rms[ours] and peak["mean"] > 3.0 * peak[ours], (rms, peak)


def test_every_executor_goes_where_the_chunks_lead(played):
    travelled = {n: np.linalg.norm(p.tool[-1] - p.tool[0]) for n, p in played.items()}
    assert all(np.linalg.norm(played[n].tool[-1] - played[n].wanted[-1]) < 0.01 for n in played), travelled
    assert min(travelled.values()) > 0.05


def test_latency_shows_in_the_tracking_of_those_that_do_not_compensate(played):
    steady = slice(100, 150)  # 1.0 to 1.5 s: under way, all chunks arriving
    error = {n: np.linalg.norm((p.tool - p.wanted)[steady], axis=1).mean() for n, p in played.items()}
    assert error["naive"] > 1.5 * error["ours"], error
    assert error["naive"] > 1.5 * error["timed"], error  # a chunk with its stamp is compensated by the controller


def test_nothing_succeeds_that_does_nothing(played):
    assert not any(p.success for p in played.values())


def test_a_point_is_the_row_for_its_period_and_the_mean_weighs_the_oldest_most():
    from vla_nodes.envs.tabletop.world import World

    naive, mean = Player(World(Scene.demo(0)), "naive"), Player(World(Scene.demo(0)), "mean")
    first, second = chunk(0.0), chunk(0.1, offset=0.1)
    for player in (naive, mean):
        player._recent.extend([(0.05, first), (0.15, second)])
    point = naive._point(0.25).arm
    np.testing.assert_array_equal(point.positions[0], second.actions[1, :7])
    assert point.times.tolist() == [0.1] and point.velocities is None and point.stamp == 0.0
    weights = np.exp(-0.01 * np.arange(2))
    expected = (weights[0] * first.actions[2] + weights[1] * second.actions[1]) / weights.sum()
    np.testing.assert_allclose(mean._point(0.25).arm.positions[0], expected[:7])
    assert naive._point(10.0) is None  # rows used up: it says nothing more


def test_the_table_has_a_row_per_executor_with_its_figures(played):
    text = table(list(played.values()), [])
    rows = {line.split()[2]: line for line in text.splitlines()[2:]}
    assert set(rows) == set(executor_compare.EXECUTORS) and "0/1" in rows["ours"]
    jerk = played["ours"].jerk
    assert f"{np.sqrt(np.mean(jerk**2)):.1f} / {jerk.max():7.0f}" in rows["ours"]

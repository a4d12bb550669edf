"""Evaluation and collection know no environment: one that is stepped, with four action columns, serves them too."""

import json

import numpy as np
import pytest

from vla_nodes.datasets import episode as episodes
from vla_nodes.envs import base
from vla_nodes.envs.base import Group, Outcome, Plan, Start, Suites
from vla_nodes.evaluation import closed_loop_episode, collect, evaluate
from vla_nodes.policy.contract import Actions, Camera, Contract, Robot, StateVector
from vla_nodes.policy.processing import CameraImage, Observation

STEP = 0.0125  # s of one step of the simulator, as in a gymnasium environment


class PointEnv:
    """A point, to be pushed to 0 along three axes; the fourth column of an action opens and closes nothing."""

    suites = Suites(("near", "far"), {"both": Group(("near", "far"), title="both tasks")}, default="both")
    contract = Contract(
        robot=Robot(name="point", joints=("slide",), base_frame="world", tool_frame="point"),
        state=(StateVector(name="tool_position", size=3, unit="m"),),
        actions=Actions(space="ee_delta", columns=("x", "y", "z", "grip"), scale=(1.0,) * 4, horizon=8, period=STEP),
        cameras=(Camera(name="camera"),),
        tick=4 * STEP,
    )
    latency = 0.0
    families = ("near", "far")
    primitives = ()
    afterwards = 0.1

    def reset(self, suite, seed, instruction=None):
        rng = np.random.default_rng([seed, self.suites.names.index(suite)])
        self.x, self.steps, self.seen = rng.normal(0, 1 if suite == "far" else 0.2, 3), 0, []
        self.seen.append(self.x)
        return Start("go to the middle", suite, limit=3.0, patience=0.5)

    def episodes_for(self, instruction, first_seed, count):
        raise base.EnvError("its instructions are fixed")

    @property
    def time(self):
        return self.steps * STEP

    @property
    def succeeded(self):
        return bool(np.abs(self.x).max() < 0.05)

    def observe(self):
        pose = np.eye(4)
        pose[:3, 3] = self.x
        color = np.full((8, 8, 3), int(np.clip(128 + 40 * self.x[0], 0, 255)), np.uint8)
        camera = CameraImage(color, np.ones((8, 8), np.float32), np.eye(3), np.eye(4))
        return Observation(self.time, {"camera": camera}, np.zeros(1), np.zeros(1), np.array([0.5]), pose)

    def apply(self, actions, period, tick, latency=None):
        assert period == STEP
        for row in range(round(tick / STEP)):
            if actions is not None:
                self.x = self.x + np.clip(actions[min(row, len(actions) - 1), :3], -1, 1) * STEP
            self.steps += 1
        self.seen.append(self.x)
        return ""

    def outcome(self):
        return Outcome(self.succeeded, "" if self.succeeded else "too far", f"{np.abs(self.x).max():.2f} m off")

    @property
    def moments(self):
        return len(self.seen)

    def frame(self, moment):
        return moment * self.contract.tick, np.zeros((8, 8, 3), np.uint8)

    def close(self):
        pass

    def reset_demonstration(self, seed, rng, family=None):
        return self.reset(family or str(rng.choice(self.families)), seed)

    def plan(self, horizon, period):
        return Plan(np.tile([*np.clip(-4 * self.x, -1, 1), 0.0], (horizon, 1)))

    def disturbance(self, rng):
        return lambda chunk, now: chunk

    def labels(self):
        return {}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(base.ENVIRONMENTS, "points", __name__)


def make():
    return PointEnv()


def test_an_expert_is_evaluated_in_it(tmp_path):
    env = base.make_demonstrator("points")
    outcomes = []
    for suite, seed in evaluate.jobs_of(env, "both", 3, 5):
        start = env.reset(suite, seed)
        outcomes.append(closed_loop_episode.run(closed_loop_episode.driver(""), env, start, suite, seed, limit=2.0))
    written = evaluate.save(tmp_path, outcomes, env.suites, env="points")
    rows = json.loads(written[0].read_text())["rows"]
    assert list(rows) == ["near", "far", "both tasks"] and rows["near"]["successes"] == 3
    assert rows["both tasks"]["episodes"] == 6


def test_a_driver_that_holds_still_is_told_so():
    class Idle:
        tick, period = 4 * STEP, STEP

        def begin(self, env, start):
            pass

        def act(self):
            return None, "nothing known"

    env = PointEnv()
    result, frames = closed_loop_episode.run(Idle(), env, env.reset("far", 1), "far", 1)
    assert result.reason == "refused" and "nothing known" in result.detail and result.seconds < 1.0
    assert len(frames) == 8


def test_its_demonstrations_are_episodes(tmp_path):
    path = tmp_path / "3.safetensors"
    assert collect.collect_one(PointEnv(), 3, path, collect.contract_of(PointEnv(), None, 5)) == ""
    episode = episodes.read(path)
    assert episode.header["instruction"] == "go to the middle" and episode.header["tick"] == PointEnv.contract.tick
    assert episode.arrays["actions"].shape[1:] == (5, 4) and episode.arrays["primitive"].max() == -1
    np.testing.assert_allclose(np.diff(episode.arrays["stamp"]), PointEnv.contract.tick, atol=1e-9)


def test_what_an_environment_lacks_is_one_line(monkeypatch):
    with pytest.raises(base.EnvError, match="no environment 'moon'; there are tabletop, points"):
        base.make("moon")
    with pytest.raises(base.EnvError, match="no pictures of static scenes"):
        base.make_static_scenes("points")
    with pytest.raises(base.EnvError, match="no labels for stage 1"):
        base.grounding("points")
    with pytest.raises(base.EnvError, match="no suite 'middle'; there are both, near, far"):
        PointEnv.suites.members("middle")
    monkeypatch.delattr(PointEnv, "plan")
    with pytest.raises(base.EnvError, match="no expert"):
        base.make_demonstrator("points")

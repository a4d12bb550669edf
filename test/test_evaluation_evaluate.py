"""Evaluation: what it counts, what it writes, and that it can be stopped."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from vla_nodes.envs import base as envs
from vla_nodes.envs.tabletop import suites
from vla_nodes.envs.tabletop.environment import IMAGE, Tabletop
from vla_nodes.envs.tabletop.expert import Expert
from vla_nodes.envs.tabletop.scene import Scene, Thing
from vla_nodes.envs.tabletop.tasks import FAMILIES, NOTHING, Task
from vla_nodes.evaluation import closed_loop_episode, contact_sheet, evaluate, metrics
from vla_nodes.evaluation.metrics import Result

RGB = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("won", "count", "low", "high"), [
    (8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (45, 50, 0.7864, 0.9565), (0, 0, 0.0, 1.0),
])  # fmt: skip
def test_wilson_against_known_values(won, count, low, high):
    """Newcombe 1998 and R's binom::binom.wilson."""
    assert metrics.wilson(won, count) == pytest.approx((low, high), abs=5e-4)
    assert 0 <= metrics.wilson(won, count)[0] <= metrics.wilson(won, count)[1] <= 1


def result(suite: str, seed: int, success: bool, **more) -> Result:
    family = more.pop("family", suite.partition("/")[0])
    reason = "" if success else "missed grasp"
    return Result(suite, seed, family, "grab it", success, 6.0 if success else 25.0, reason, "block at 2 cm", **more)


def test_the_table_counts_what_happened():
    results = [result("drawer", s, True) for s in range(3)]
    results += [result("pick-and-place", s, s > 0, wrong=["red can"] if s == 0 else []) for s in range(4)]
    results += [result("pick-and-place/pairs", s, s > 1) for s in range(4)]
    results += [Result("absent", 0, "rearrangement", "x", False, 20.0, "touched something", "bowl", touched=["bowl"])]
    rows = metrics.groups(results, suites.LAYOUT)
    assert list(rows) == ["pick-and-place", "drawer", "all families", "pick-and-place/pairs", "absent"]
    assert [len(part) for part in rows.values()] == [4, 3, 7, 4, 1]
    told = metrics.summary(rows["all families"])
    assert told["successes"] == 6 and told["wrong_object_rate"] == pytest.approx(1 / 7)
    assert told["mean_seconds"] == 6.0, "of successes only"
    assert math.isnan(metrics.summary(rows["absent"])["mean_seconds"])
    text = metrics.table(results, suites.LAYOUT)
    assert "failures: 3 missed grasp, 1 touched something" in text
    assert 'pick-and-place, seed 0, "grab it": missed grasp after 25.0 s (block at 2 cm)' in text


def test_a_held_out_axis_is_compared_with_the_same_families():
    results = [result("drawer", s, False) for s in range(4)]  # would pull the difference up, if it were counted
    for family in ("pick-and-place", "rearrangement"):
        results += [result(family, s, True) for s in range(4)]
        results += [result(f"{family}/pairs", s, s > 0) for s in range(4)]
    assert "held-out pairs: -25.0 points against the same families as trained" in metrics.table(results, suites.LAYOUT)


def test_json_is_strict_and_complete(tmp_path):
    metrics.write_json(tmp_path / "eval.json", [result("drawer", 1, False)], checkpoint="x")
    said = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert said["checkpoint"] == "x" and said["rows"]["drawer"]["mean_seconds"] is None
    assert said["episodes"][0]["seed"] == 1 and said["episodes"][0]["reason"] == "missed grasp"


def test_the_contact_sheet_shows_every_failure_from_start_to_end(tmp_path):
    failures = []
    for seed in range(contact_sheet.ROWS + 2):
        frames = [(float(i), np.full((32, 32, 3), (20 * i, 0, 200), np.uint8)) for i in range(contact_sheet.FRAMES)]
        failures.append((result("drawer", seed, False), frames))
    first, second = contact_sheet.write(tmp_path, failures)
    assert (first.name, second.name) == ("failures.png", "failures-2.png")
    page = cv2.cvtColor(cv2.imread(str(second)), cv2.COLOR_BGR2RGB)
    size, row = contact_sheet.SIZE, contact_sheet.SIZE + contact_sheet.CAPTION
    assert page.shape == (2 * row, contact_sheet.FRAMES * size, 3)
    middle = contact_sheet.CAPTION + size // 2
    assert [tuple(page[middle, c * size + size // 2]) for c in (0, 7)] == [(0, 0, 200), (140, 0, 200)]
    assert (page[: contact_sheet.CAPTION] > 200).any(), "no caption"
    assert contact_sheet.write(tmp_path, []) == []


@pytest.mark.parametrize("count", [1, 3, 8, 9, 250])
def test_moments_are_first_last_and_between(count):
    picked = contact_sheet.pick(count)
    assert picked[0] == 0 and picked[-1] == count - 1 and len(picked) == min(count, contact_sheet.FRAMES)


def test_jobs_take_turns_by_family():
    env = envs.make("tabletop")
    assert evaluate.jobs_of(env, "all", 2, 7) == [(family, seed) for seed in (7, 8) for family in FAMILIES]
    assert len(evaluate.jobs_of(env, "held-out", 1, 0)) == sum(map(len, suites.HELD_OUT.values()))
    jobs = evaluate.jobs_of(env, "demo", 2, 0, "put the red block left of the bowl")
    for suite, seed in jobs:
        suites.episode(suite, seed, "put the red block left of the bowl")


class Idle:
    """Holds still, and says why."""

    tick, period = 0.1, 0.05

    def begin(self, env, start):
        pass

    def act(self):
        return None, "not in view"


class Presser(closed_loop_episode.ExpertDriver):
    """Takes the nearest thing, whatever it was told."""

    def begin(self, env, start):
        env.expert = Expert(Task("pick", "red block"), env.scene)
        super().begin(env, start)


SCENE = Scene(0, [Thing("block", "red", 0.45, 0.0, 0.0, RGB), Thing("block", "blue", 0.36, 0.12, 0.0, RGB)])


def trial(who, suite, scene, task, text, limit=None):
    env = Tabletop()
    start = env.begin(scene, task, text)
    try:
        return closed_loop_episode.run(who, env, start, suite, scene.seed, limit)
    finally:
        env.close()


def test_who_never_acts_has_refused():
    told, frames = trial(Idle(), "drawer", SCENE, Task("open", "drawer"), "open the drawer")
    assert not told.success and told.reason == "refused" and told.detail.startswith("not in view")
    assert told.seconds == pytest.approx(suites.GIVEN_UP, abs=0.2)
    assert len(frames) == contact_sheet.FRAMES and frames[0][1].shape == (IMAGE, IMAGE, 3)


def test_nonsense_asks_that_nothing_is_touched():
    scene, task, text = suites.episode("nonsense", 5)
    assert trial(Idle(), "nonsense", scene, task, text, limit=3.0)[0].success
    told, _ = trial(Presser(), "nonsense", SCENE, NOTHING, text, limit=4.0)
    assert not told.success and told.reason == "touched something"


def test_absent_asks_that_nothing_is_touched_for_the_whole_trial():
    missing = Task("pick", "green block")
    told, _ = trial(Idle(), "absent", SCENE, missing, "pick up the green block", limit=9.0)
    assert told.success and told.seconds == pytest.approx(9.0, abs=0.01), "holding is right, and not the end"
    told, _ = trial(Presser(), "absent", SCENE, missing, "pick up the green block", limit=4.0)
    assert not told.success and told.reason == "touched something" and told.touched == ["red block"]


def test_the_wrong_thing_is_named():
    told, _ = trial(Presser(), "random", SCENE, Task("pick", "blue block"), "pick up the blue block", limit=5.0)
    assert not told.success and told.reason == "wrong object" and told.wrong == ["red block"]


def test_the_expert_closes_a_drawer():
    scene = Scene(0, SCENE.things, drawer_opening=0.1)
    task = Task("close", "drawer")
    told, frames = trial(closed_loop_episode.driver(""), "drawer", scene, task, "close the drawer")
    assert told.success and told.reason == "" and frames == [] and told.wrong == []
    assert told.steps_done == told.steps == 1 and told.touched == ["drawer"] and told.p99_jerk > told.mean_jerk > 0


@pytest.mark.parametrize("arguments", [
    ("--suite", "everything"), ("--episodes", "0"), ("--expert", "--ros"), ("--expert", "--suite", "absent"),
    ("--instruction", "pick up the pink block", "--expert"), ("--checkpoint", "/none"),
    ("--engine", "tensorrt"), ("--engine", "torch", "--ros"),
])  # fmt: skip
def test_wrong_options_are_refused(arguments, capsys):
    assert evaluate.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("vla_nodes eval: ") and error.count("\n") == 1


def test_a_checkpoint_that_cannot_be_loaded_is_said_once_before_anything_is_simulated(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(evaluate, "run", lambda *_: pytest.fail("it began"))
    assert evaluate.main(["--checkpoint", str(tmp_path), "--episodes", "3"]) == 2
    assert capsys.readouterr().err.count("config.json") == 1


def test_interrupted_it_prints_the_table_so_far(tmp_path):
    often = "from vla_nodes import __main__, progress; progress.LOG_PERIOD = 0.1; raise SystemExit(__main__.main())"
    command = [sys.executable, "-c", often, "eval", "--expert", "--suite", "drawer", "--episodes", "500"]
    process = subprocess.Popen([*command, "--workers", "1", "--out", str(tmp_path)], stdout=subprocess.PIPE,
                               stderr=(tmp_path / "bar").open("w"), text=True, env={**os.environ, "COLUMNS": "100"},
                               start_new_session=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while "1/1 = " not in (tmp_path / "bar").read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped early" in out and "drawer" in out
    assert json.loads((tmp_path / "eval.json").read_text())["rows"]["drawer"]["episodes"] >= 1

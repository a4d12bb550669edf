"""The simulated robot behind its controllers: what it is judged by, and what it tells."""

import json

import numpy as np
import pytest

from vla_nodes.envs.tabletop import suites
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.tasks import Task
from vla_nodes.nodes.sim_core import CONTROL_PERIOD, SimulatedRobot


def test_an_instruction_of_two_steps_is_judged_by_both():
    robot = SimulatedRobot(Scene.demo(0))
    robot.judge("open the drawer and put the blue block in it")
    status = json.loads(json.dumps(robot.task_status()))
    assert Task.from_dict(status["task"]) == robot.task and status["obstacle"] == ""
    world = robot.world
    world.data.qpos[world.model.joint("drawer").qposadr[0]] = 0.15
    assert robot.task_status()["steps_done"] == 1
    at = world.model.joint("blue block").qposadr[0]
    robot.step()
    world.data.qpos[at : at + 3] = world.handle_position() + [0.1, 0, -0.02]
    for _ in range(round(1.6 / CONTROL_PERIOD)):
        robot.step()
        if robot.time * 10 % 1 < 1e-6:
            status = robot.task_status()
    assert status["success"] and status["steps_done"] == 2 and "in the drawer" in status["progress"]
    assert status["touched"] == [] and status["wrong"] == []


@pytest.mark.parametrize(("text", "why"), [
    ("pick up the pink block", "there is no pink block"), ("put the red block in the drawer", "the drawer is shut"),
    ("stack the red block on the blue block", ""), ("open the drawer", ""),
])  # fmt: skip
def test_what_the_scene_does_not_allow_is_said(text, why):
    robot = SimulatedRobot(Scene.demo(0))
    robot.judge(text)
    said = robot.task_status()
    assert said["obstacle"].startswith(why) and bool(said["obstacle"]) == bool(why)
    assert not said["success"]


def test_a_new_instruction_and_a_new_scene_start_anew():
    robot = SimulatedRobot(Scene.demo(0))
    robot.judge("open the drawer")
    robot.world.data.qpos[robot.world.model.joint("drawer").qposadr[0]] = 0.15
    for _ in range(10):
        robot.step()
    robot.task_status()
    assert robot.task_status()["mean_jerk"] == 0.0  # two samples of the path are none
    robot.load(suites.episode("absent", 3)[0])
    assert robot.time == 0.0 and robot.task_status()["success"] is False
    robot.judge("")
    assert robot.task_status()["progress"] == "no instruction"
    assert np.isfinite(robot.task_status()["p99_jerk"])

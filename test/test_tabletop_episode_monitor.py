"""The monitor: why an episode failed, and what was touched that nobody had named."""

import json

import mujoco
import numpy as np
import pytest

from vla_nodes.envs.tabletop.episode_monitor import DISPLACED, PATH_PERIOD, EpisodeMonitor
from vla_nodes.envs.tabletop.mjcf import FINGER_OPEN
from vla_nodes.envs.tabletop.rollout import Rollout
from vla_nodes.envs.tabletop.scene import BLOCK_SIZE, Scene, Thing
from vla_nodes.envs.tabletop.tasks import SuccessChecker, Task
from vla_nodes.envs.tabletop.world import World

RGB = (0.5, 0.5, 0.5)
SCENE = Scene(0, [
    Thing("bowl", "grey", 0.48, 0.20, 0.0, RGB), Thing("block", "red", 0.45, 0.0, 0.0, RGB),
    Thing("block", "blue", 0.36, 0.10, 0.0, RGB),
])  # fmt: skip
TASK = Task("place", "red block", "bowl")
HALF = BLOCK_SIZE / 2 / 0.04  # gripper opening at which the fingers touch a block's sides


def put(world: World, name: str, position) -> None:
    joint = world.model.joint(name)
    world.data.qpos[joint.qposadr[0] : joint.qposadr[0] + 3] = position
    world.data.qvel[joint.dofadr[0] : joint.dofadr[0] + 6] = 0
    mujoco.mj_forward(world.model, world.data)


class Scripted:
    """A world in which things happen by hand, its checker and its monitor."""

    def __init__(self, task: Task | None = TASK) -> None:
        self.world = World(SCENE)
        self.checker = SuccessChecker(task) if task else None
        self.monitor = EpisodeMonitor(self.world, self.checker)

    def grip(self, name: str, height: float) -> None:
        """Both fingers around a thing held at a height, the arm put there."""
        at = [*self.world.position(name)[:2], height]
        Rollout(self.world).place(np.array(at), HALF - 0.02)
        put(self.world, name, at)
        assert self.world.touched_by_fingers(name) == 2
        self.look()

    def away(self) -> None:
        Rollout(self.world).place(np.array([0.35, -0.2, 0.3]), 1.0)

    def look(self) -> None:
        if self.checker:
            self.checker.update(self.world)
        self.monitor.sample()
        self.monitor.look()

    def rest(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.1)):
            self.world.advance(0.1)
            self.look()


def test_untouched_means_never_reached():
    seen = Scripted()
    seen.rest(0.3)
    assert seen.monitor.reason == "never reached" and not seen.monitor.touched


def test_a_touch_without_a_lift_is_a_missed_grasp():
    seen = Scripted()
    seen.grip("red block", BLOCK_SIZE / 2 + 0.0005)
    seen.away()
    seen.rest(0.2)
    assert seen.monitor.touched == {"red block"} and seen.monitor.reason == "missed grasp"


def test_what_falls_was_dropped_and_what_is_set_down_elsewhere_misplaced():
    seen = Scripted()
    seen.grip("red block", 0.021)
    seen.grip("red block", 0.12)
    assert seen.monitor.reason == "timeout", "still in the hand"
    seen.away()
    seen.rest(0.5)
    assert seen.monitor.reason == "dropped"
    seen.grip("red block", 0.08)
    seen.grip("red block", 0.03)
    seen.away()
    seen.rest(0.3)
    assert seen.monitor.reason == "misplaced"


def test_another_thing_in_the_hand_is_the_wrong_object():
    seen = Scripted()
    seen.grip("blue block", 0.021)
    assert not seen.monitor.wrong
    seen.grip("blue block", 0.08)
    assert seen.monitor.wrong == {"blue block"} and seen.monitor.reason == "wrong object"


def test_a_thing_pushed_aside_counts_as_wrong_but_does_not_explain_the_failure():
    seen = Scripted()
    start = seen.world.position("blue block")
    put(seen.world, "blue block", start + [DISPLACED - 0.005, 0, 0])
    seen.look()
    assert not seen.monitor.wrong
    put(seen.world, "blue block", start + [DISPLACED + 0.005, 0, 0])
    seen.look()
    assert seen.monitor.wrong == {"blue block"} and seen.monitor.reason == "never reached"
    put(seen.world, "red block", seen.world.position("red block") + [0.1, 0, 0])
    seen.look()
    assert seen.monitor.wrong == {"blue block"}, "what is named may be moved"


def test_success_has_no_reason_and_one_too_short_is_a_timeout():
    seen = Scripted()
    put(seen.world, "red block", seen.world.position("bowl") + [0, 0, 0.03])
    seen.rest(0.5)
    assert seen.monitor.reason == "timeout"
    seen.rest(0.8)
    assert seen.checker.succeeded and seen.monitor.reason == ""
    assert seen.monitor.facts()["steps_done"] == 1


def test_steps_out_of_order_and_undone_ones_say_so():
    task = Task("place", "red block", "bowl", then=Task("open", "drawer"))
    joint = "drawer"
    early = Scripted(task)
    early.look()
    early.world.data.qpos[early.world.model.joint(joint).qposadr[0]] = 0.15
    early.look()
    assert early.monitor.reason == "wrong step order"
    undone = Scripted(task)
    put(undone.world, "red block", undone.world.position("bowl") + [0, 0, 0.03])
    undone.rest(0.4)
    assert undone.monitor.reason == "never reached" and undone.checker.reached == 1
    put(undone.world, "red block", [0.55, 0.0, 0.02])
    undone.rest(0.2)
    assert undone.monitor.reason == "undone again"


def test_the_whole_robot_counts_as_touching():
    seen = Scripted(None)
    seen.rest(0.1)
    assert not seen.monitor.touched and seen.monitor.facts()["reason"] == ""
    Rollout(seen.world).place(seen.world.position("bowl") + [0.075, 0, 0.045], 0.0)  # closed fingers on its wall
    seen.monitor.sample()
    assert seen.monitor.touched == {"bowl"}
    Rollout(seen.world).place(seen.world.handle_position(), 0.0)
    seen.monitor.sample()
    assert "drawer" in seen.monitor.touched


def test_jerk_of_a_known_motion():
    seen = Scripted(None)
    times = np.arange(0, 1, PATH_PERIOD)
    seen.monitor._path = [np.array([0, 0, t**3]) for t in times]  # its third derivative is 6
    assert seen.monitor.jerk() == pytest.approx((6.0, 6.0), rel=1e-6)
    assert EpisodeMonitor(seen.world, None).jerk() == (0.0, 0.0)
    assert json.dumps(seen.monitor.facts())
    assert FINGER_OPEN > BLOCK_SIZE / 2

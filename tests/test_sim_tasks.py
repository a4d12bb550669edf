"""The judge: what counts as done, and for how long."""

import mujoco
import numpy as np
import pytest

from vla_nodes.sim import scene as sc
from vla_nodes.sim.scene import Scene, Thing
from vla_nodes.sim.tasks import HOLD_SECONDS, Judge, Task, contains
from vla_nodes.sim.world import World

RGB = (0.5, 0.5, 0.5)
SCENE = Scene(0, [
    Thing("bowl", "grey", 0.48, 0.15, 0.0, RGB), Thing("tray", "brown", 0.50, -0.05, 0.0, RGB),
    Thing("block", "red", 0.36, 0.05, 0.2, RGB), Thing("can", "blue", 0.36, 0.20, 0.0, RGB),
])  # fmt: skip


def put(world: World, name: str, position) -> None:
    joint = world.model.joint(name)
    world.data.qpos[joint.qposadr[0] : joint.qposadr[0] + 3] = position
    world.data.qvel[joint.dofadr[0] : joint.dofadr[0] + 6] = 0
    mujoco.mj_forward(world.model, world.data)


@pytest.mark.parametrize("goal", ["bowl", "tray"])
@pytest.mark.parametrize("thing", ["red block", "blue can"])
def test_released_above_the_goal_it_ends_inside(thing, goal):
    world = World(SCENE)
    task = Task("place", thing, goal)
    assert not contains(world, goal, thing) and not task.success(world)
    put(world, thing, world.position(goal) + [0.01, 0.01, 0.09])
    assert not contains(world, goal, thing)  # above is not inside
    world.advance(1.2)
    assert contains(world, goal, thing) and task.success(world)
    assert task.progress(world).endswith(f"in the {goal}")


@pytest.mark.parametrize(("goal", "reach"), [("bowl", sc.BOWL_RADIUS), ("tray", sc.TRAY_SIZE[0] / 2)])
def test_beside_the_goal_is_not_inside(goal, reach):
    world = World(SCENE)
    put(world, "red block", world.position(goal) + [-reach - 0.025, 0, 0.021])
    assert not contains(world, goal, "red block")


def test_an_overturned_bowl_holds_nothing():
    world = World(SCENE)
    put(world, "red block", world.position("bowl") + [0, 0, 0.03])
    assert contains(world, "bowl", "red block")
    address = world.model.joint("bowl").qposadr[0]
    world.data.qpos[address + 3 : address + 7] = [np.cos(0.5), np.sin(0.5), 0, 0]  # tilted by 1 rad
    mujoco.mj_forward(world.model, world.data)
    assert not contains(world, "bowl", "red block")


def test_success_must_last():
    world = World(SCENE)
    world.data.qpos[world.model.joint("drawer").qposadr[0]] = sc.DRAWER_TRAVEL
    judge = Judge(Task("open", "drawer"))
    assert judge.task.success(world) and not judge.update(world)
    for _ in range(9):
        world.advance(0.1)
        assert not judge.update(world), f"after {world.time} s"
    world.advance(0.2)
    assert world.time > HOLD_SECONDS and judge.update(world)


def test_an_interruption_starts_the_second_anew():
    world = World(SCENE)
    judge, drawer = Judge(Task("open", "drawer")), world.model.joint("drawer").qposadr[0]
    for opening in (sc.DRAWER_TRAVEL, 0.0, sc.DRAWER_TRAVEL):
        world.data.qpos[drawer] = opening
        assert not judge.update(world)
        world.advance(0.6)
    assert judge._since == pytest.approx(1.2, abs=1e-6)  # time at which it came true again
    assert not judge.update(world)
    world.advance(0.5)
    assert judge.update(world)


def test_drawer_thresholds():
    world = World(SCENE)
    address = world.model.joint("drawer").qposadr[0]
    for opening, opened, closed in ((0.0, False, True), (0.05, False, False), (0.13, True, False)):
        world.data.qpos[address] = opening
        assert Task("open", "drawer").success(world) == opened
        assert Task("close", "drawer").success(world) == closed


def test_lifted_without_fingers_is_not_picked_up():
    world = World(SCENE)
    put(world, "red block", [0.36, 0.05, 0.2])
    assert not Task("pick", "red block").success(world)

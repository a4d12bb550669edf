"""The scripted expert through the executor and controller the nodes use: it does each thing once, disturbed too."""

import mujoco
import numpy as np
import pytest

from vla_nodes.envs.tabletop.environment import DEMONSTRATION_LIMIT, Tabletop
from vla_nodes.envs.tabletop.expert import PRIMITIVES, Expert
from vla_nodes.envs.tabletop.rollout import Rollout
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.suites import feasible_seeds
from vla_nodes.envs.tabletop.tasks import SuccessChecker, Task
from vla_nodes.envs.tabletop.world import World

CONTRACT = Tabletop.contract
TICK, PERIOD, HORIZON = CONTRACT.tick, CONTRACT.actions.period, CONTRACT.actions.horizon
LATENCY = Tabletop.latency


def obey(scene: Scene, task: Task, disturb=None) -> tuple[bool, World, list[str]]:
    """Runs until success or the time limit; ``disturb(world, primitive)`` is called once a tick."""
    world = World(scene)
    rollout, expert, checker, said = Rollout(world), Expert(task, scene), SuccessChecker(task), []
    limit = DEMONSTRATION_LIMIT * len(checker.steps)
    while world.time < limit and not checker.update(world):
        actions, primitive = expert.plan(world, rollout.velocity, HORIZON, PERIOD)
        assert actions.shape == (HORIZON, 7) and np.isfinite(actions).all() and primitive in PRIMITIVES
        assert np.linalg.norm(actions[:, :3], axis=1).max() < 0.5 * PERIOD  # m per row: no row asks for a jump
        said.append(primitive)
        stamp = world.time
        rollout.run(LATENCY)
        output = rollout.submit(actions, stamp, PERIOD)
        assert output.refused is None, output.refused
        rollout.run(TICK - LATENCY)
        if disturb:
            disturb(world, primitive)
    return checker.succeeded, world, said


def opened(seed: int) -> Scene:
    scene = Scene.demo(seed)
    scene.drawer_opening = 0.12
    return scene


BY_THE_BOWL = Task("place", "green block", "bowl", "beside")
IN_THE_DRAWER = Task("place", "blue block", "drawer")


@pytest.mark.parametrize(("scene", "task"), [
    (Scene.demo(12), Task("place", "red block", "green block")),
    (Scene.demo(feasible_seeds("put the green block next to the bowl", 13, 1)[0]), BY_THE_BOWL),
    (Scene.demo(14), Task("open", "drawer", then=IN_THE_DRAWER)),
    (opened(15), Task("place", "yellow block", "tray", then=Task("close", "drawer"))),
], ids=["stack", "beside", "open, then in", "tray, then close"])  # fmt: skip
def test_obeys(scene, task):
    done, world, said = obey(scene, task)
    assert done, f"{task.progress(world)} after {world.time:.1f} s: {' '.join(said)}"
    assert {"reach", "grasp"} <= set(said)


def test_follows_a_block_that_is_moved_away_mid_reach():
    moved = []

    def snatch(world: World, primitive: str) -> None:
        if not moved and world.time > 0.8:
            assert primitive == "reach"
            joint = world.model.joint("blue block")
            world.data.qpos[joint.qposadr[0] : joint.qposadr[0] + 2] = (
                [0.36, 0.02] if world.position("blue block")[0] > 0.46 else [0.56, 0.02]
            )
            mujoco.mj_forward(world.model, world.data)
            moved.append(world.position("blue block"))

    scene = Scene.demo(11)
    scene.things = [t for t in scene.things if t.name == "blue block"]
    done, world, said = obey(scene, Task("pick", "blue block"), snatch)
    assert done, f"{world.time:.1f} s: {' '.join(said)}"
    assert np.linalg.norm((world.position("blue block") - moved[0])[:2]) < 0.05  # picked up where it was moved to


def test_placing_the_robot_puts_the_tool_there():
    rollout = Rollout(World(Scene(0)))
    for target in ([0.40, -0.2, 0.15], [0.58, 0.2, 0.35]):
        rollout.place(np.array(target), 0.3)
        pose = rollout.world.tool_pose()
        np.testing.assert_allclose(pose[:3, 3], target, atol=1e-3)
        assert pose[2, 2] < -0.999 and rollout.world.opening() == pytest.approx(0.3, abs=1e-6)
        rollout.run(0.2)
        np.testing.assert_allclose(rollout.world.tool_pose()[:3, 3], target, atol=5e-3)

"""The simulated camera: what it sees lies where it says."""

import mujoco
import numpy as np
import pytest

from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.envs.tabletop import static_scenes
from vla_nodes.envs.tabletop.camera import MAX_RANGE, Camera
from vla_nodes.envs.tabletop.scene import Scene, View
from vla_nodes.envs.tabletop.world import World

SIZE = 160


@pytest.fixture(scope="module", params=[Scene.demo(5), Scene.random(12)], ids=["demo", "random"])
def seen(request):
    world = World(request.param)
    camera = Camera(world, SIZE, SIZE)
    image, ids = camera.render(), camera.segmentation(SIZE, SIZE)
    yield world, camera, image, ids
    camera.close()


def unproject(depth: np.ndarray, camera: Camera) -> np.ndarray:
    """(H, W, 3) points in base, written out by hand."""
    k, (h, w) = camera.intrinsics, depth.shape
    u, v = np.meshgrid(np.arange(w), np.arange(h))
    optical = np.stack([(u - k[0, 2]) / k[0, 0] * depth, (v - k[1, 2]) / k[1, 1] * depth, depth], -1)
    return optical @ camera.pose[:3, :3].T + camera.pose[:3, 3]


def inner(mask: np.ndarray) -> np.ndarray:
    """Without its border, where a pixel is half one thing and half another."""
    out = mask.copy()
    for axis in (0, 1):
        for shift in (-1, 1):
            out &= np.roll(mask, shift, axis)
    return out


def test_table_is_a_plane_at_zero(seen):
    world, camera, image, ids = seen
    z = unproject(image.depth, camera)[..., 2][inner(ids == world.model.geom("table").id)]
    assert len(z) > 2000 and np.abs(z).max() < 0.003


def test_pixels_of_a_thing_land_on_it(seen):
    world, camera, image, ids = seen
    names, table = static_scenes.names_of(world.scene), static_scenes.owners(world)
    points, labels = unproject(image.depth, camera), table[ids]
    half = {"block": sc.BLOCK_SIZE / 2, "can": max(sc.CAN_HEIGHT / 2, sc.CAN_RADIUS)}
    checked = 0
    for index, name in enumerate(names[:-1]):
        kind = name.split()[-1]
        mask = inner(labels == index + 1)
        if kind not in half or mask.sum() < 5:
            continue
        local = (points[mask] - world.position(name)) @ world.rotation(name)  # in the thing's own frame
        assert np.abs(local).max() < half[kind] + 0.004, name
        if kind == "block":  # visible points lie on its faces, not inside it
            assert np.abs(np.abs(local).max(1) - sc.BLOCK_SIZE / 2).max() < 0.004, name
        checked += 1
    assert checked >= 1


def test_one_pass_equals_the_stock_renderer(seen):
    world, camera, image, _ = seen
    with mujoco.Renderer(world.model, SIZE, SIZE) as renderer:
        option = mujoco.MjvOption()
        option.geomgroup[3] = 0
        renderer.update_scene(world.data, camera._camera, option)
        color = renderer.render()
        renderer.enable_depth_rendering()
        renderer.update_scene(world.data, camera._camera, option)
        depth = renderer.render()
    depth[depth > MAX_RANGE] = 0
    assert np.abs(depth - image.depth).max() < 1e-3
    assert np.abs(color.astype(int) - image.color).max() <= 1


def test_pose_is_a_rotation_that_looks_down_the_view():
    view = View()
    camera = Camera(World(Scene(0)), 32, 32)
    try:
        rotation = camera.pose[:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1)
        forward = np.subtract(view.target, view.position)
        np.testing.assert_allclose(rotation[:, 2], forward / np.linalg.norm(forward), atol=1e-12)
        assert rotation[2, 1] < 0  # y of the optical frame points down (REP 103)
    finally:
        camera.close()


def test_two_cameras_on_one_world_keep_their_own_field_of_view():
    world = World(Scene.demo(1))
    wide = Camera(world, 64, 64)
    before = wide.render().depth
    narrow = Camera(world, 64, 64, View(fovy=25.0))
    other = narrow.render().depth
    after = wide.render().depth
    wide.close()
    narrow.close()
    np.testing.assert_array_equal(before, after)
    assert np.abs(before - other).max() > 0.01


def test_close_twice_and_then_no_picture():
    camera = Camera(World(Scene(0)), 32, 32)
    camera.close()
    camera.close()
    with pytest.raises(RuntimeError, match="closed"):
        camera.render()

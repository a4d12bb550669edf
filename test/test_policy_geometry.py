"""point_map and project are each other's inverse, and agree with a pinhole written out by hand."""

import numpy as np
import torch

from vla_nodes.envs.tabletop.camera import optical_pose
from vla_nodes.envs.tabletop.scene import View
from vla_nodes.policy.configuration import CELL, SpaceConfig
from vla_nodes.policy.modeling import point_map, project

SIZE = 64
TABLE = SpaceConfig(ground_height=0.0)
K = torch.tensor([[[80.0, 0, 31.5], [0, 82.0, 30.5], [0, 0, 1]]])
POSE = torch.tensor(optical_pose(View()), dtype=torch.float32)[None]
PIXELS = np.arange(CELL // 2, SIZE, CELL)


def depth_map() -> torch.Tensor:
    return torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.4


def test_project_inverts_point_map():
    points, valid = point_map(depth_map(), K, POSE, TABLE)
    assert points.shape == (1, 3, SIZE // CELL, SIZE // CELL) and (valid == 1).all()
    at = project(points.flatten(2).transpose(1, 2), K, POSE, SIZE)[0]
    v, u = np.meshgrid(PIXELS, PIXELS, indexing="ij")
    wanted = np.stack([(2 * u.ravel() + 1) / SIZE - 1, (2 * v.ravel() + 1) / SIZE - 1], -1)  # grid_sample's convention
    np.testing.assert_allclose(at.numpy(), wanted, atol=1e-4)


def test_grid_sample_at_a_projected_point_reads_that_pixel():
    depth = depth_map()
    points, _ = point_map(depth, K, POSE, TABLE)
    grid = project(points.flatten(2).transpose(1, 2), K, POSE, SIZE)[:, None]
    read = torch.nn.functional.grid_sample(depth[:, None], grid, align_corners=False)[0, 0, 0]
    np.testing.assert_allclose(
        read.numpy(), depth[0, CELL // 2 :: CELL, CELL // 2 :: CELL].flatten().numpy(), atol=2e-3
    )


def test_point_map_equals_the_pinhole_by_hand():
    depth = depth_map()
    points, _ = point_map(depth, K, POSE, TABLE)
    row, column = 5, 9
    u, v = PIXELS[column], PIXELS[row]
    z = depth[0, v, u].item()
    optical = np.array([(u - 31.5) / 80 * z, (v - 30.5) / 82 * z, z, 1])
    np.testing.assert_allclose(points[0, :, row, column].numpy(), (POSE[0].numpy() @ optical)[:3], atol=1e-5)


def test_where_depth_is_missing_the_ray_meets_the_table_and_is_marked():
    points, valid = point_map(torch.zeros(1, SIZE, SIZE), K, POSE, TABLE)
    assert (valid == 0).all()
    assert points[0, 2].abs().max() < 1e-5
    at = project(points.flatten(2).transpose(1, 2), K, POSE, SIZE)[0, :, 0].numpy()
    np.testing.assert_allclose(at, np.tile((2 * PIXELS + 1) / SIZE - 1, len(PIXELS)), atol=1e-4)


def test_without_a_ground_a_pixel_without_depth_is_nowhere():
    depth = depth_map()
    depth[:, :32] = 0
    points, valid = point_map(depth, K, POSE, SpaceConfig())
    assert (points[:, :, :8] == 0).all() and (valid[:, :, :8] == 0).all()
    known, _ = point_map(depth, K, POSE, TABLE)
    assert torch.equal(points[:, :, 8:], known[:, :, 8:])

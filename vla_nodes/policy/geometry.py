"""Where a pixel is: from depth, intrinsics and the camera's pose to points in the robot's base frame."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_nodes.policy.configuration import CELL

WORKSPACE_CENTRE = (0.48, 0.0, 0.15)  # m in base; positions enter the network relative to it
WORKSPACE_SIZE = 0.25  # m
MAX_DISTANCE = 3.0  # m; farther than any table, where rays that miss the table are cut


def centred(points: Tensor, unit: float = WORKSPACE_SIZE) -> Tensor:
    """Points (..., 3), m in base, relative to the middle of the workspace, in units of ``unit`` m."""
    return (points - points.new_tensor(WORKSPACE_CENTRE)) / unit


def point_map(depth: Tensor, intrinsics: Tensor, camera_pose: Tensor) -> tuple[Tensor, Tensor]:
    """Depth (B, H, W) m, 0 = invalid, K (B, 3, 3), colour optical frame in base (B, 4, 4) -> one point per cell.

    Returns points (B, 3, H/CELL, W/CELL) in base, m, and their validity (B, 1, H/CELL, W/CELL) as 0/1. Where depth is
    invalid the point is where the pixel's ray meets the table plane z = 0: a guess, and marked as one.
    """
    size = depth.shape[-1]
    at = torch.arange(CELL // 2, size, CELL, device=depth.device, dtype=depth.dtype)
    z = depth[:, CELL // 2 :: CELL, CELL // 2 :: CELL]
    u = (at[None, None, :] - intrinsics[:, 0, 2, None, None]) / intrinsics[:, 0, 0, None, None]
    v = (at[None, :, None] - intrinsics[:, 1, 2, None, None]) / intrinsics[:, 1, 1, None, None]
    rays = torch.stack([u.expand_as(z), v.expand_as(z), torch.ones_like(z)], 1)  # optical frame, z = 1
    rays = torch.einsum("bij,bjhw->bihw", camera_pose[:, :3, :3], rays)
    origin = camera_pose[:, :3, 3, None, None]
    downward = rays[:, 2:3].clamp(max=-1e-3)
    to_table = (-origin[:, 2:3] / downward).clamp(0.0, MAX_DISTANCE)
    valid = (z > 0).to(depth.dtype).unsqueeze(1)
    return origin + rays * torch.where(valid > 0, z.unsqueeze(1), to_table), valid


def project(points: Tensor, intrinsics: Tensor, camera_pose: Tensor, size: int) -> Tensor:
    """Points (B, N, 3) in base -> image coordinates (B, N, 2) as grid_sample wants them, -1..1 across the image."""
    relative = points - camera_pose[:, None, :3, 3]
    optical = torch.einsum("bji,bnj->bni", camera_pose[:, :3, :3], relative)
    depth = optical[..., 2].clamp(min=0.05)
    u = optical[..., 0] / depth * intrinsics[:, None, 0, 0] + intrinsics[:, None, 0, 2]
    v = optical[..., 1] / depth * intrinsics[:, None, 1, 1] + intrinsics[:, None, 1, 2]
    return torch.stack([(2 * u + 1) / size - 1, (2 * v + 1) / size - 1], -1)

"""From an RGB-D image and an instruction to a handful of visual tokens that still know where they are.

A small convolutional encoder keeps a feature map of one vector per 4x4 pixels. Roles (the thing acted on, the goal, and
a few free ones) are queries made from the instruction; each looks over the map, and what it sees becomes one token: the
features there and the point in space there. A role that finds nothing looks at a sink instead, and says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_nodes.policy.configuration import PolicyConfig
from vla_nodes.policy.geometry import centred, point_map, project
from vla_nodes.policy.language import BidirectionalBlock, EncodedText
from vla_nodes.policy.mamba.mixers import RMSNorm

HEIGHT_SCALE = 0.05  # m; what tells a block from a can is a centimetre and a half
DEPTH_SCALE = 1.0  # m; depth enters as (depth - 1 m) / 1 m, masked where invalid
TOOL_PROBES = ((0.0, 0.0, 0.0), (0.0, 0.0, -0.05))  # m in base, added to the tool point: where the hand is looked at


class Survey(NamedTuple):
    """All there is to see in B images, one vector and one point per cell."""

    features: Tensor  # (B, C, cells, cells)
    points: Tensor  # (B, 3, cells, cells) m in base


class Scan(NamedTuple):
    """What vision hands to the core, and what losses and people look at."""

    seen: Tensor  # (B, R, C) what each role sees
    points: Tensor  # (B, R, 3) where, m in base
    mass: Tensor  # (B, R) how much of its attention found something, 0..1
    spread: Tensor  # (B, R) how far apart that is, m
    tool: Tensor  # (B, len(TOOL_PROBES) * C) the map at the tool
    log_attention: Tensor  # (B, R, cells*cells + 1), the sink last
    queries: Tensor  # (B, R, C)
    survey: Survey


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = convolution(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Pyramid(nn.Module):
    """(B, inputs, S, S) channels, with the points of their cells, -> (B, width, S/4, S/4)."""

    def __init__(self, inputs: int, widths: tuple[int, ...], blocks: int, width: int) -> None:
        super().__init__()
        a, b, c, d = widths
        self.stem = nn.Sequential(convolution(inputs, a, stride=2), convolution(a, b, stride=2))
        self.place = nn.Conv2d(5, b, 1)  # points, their height once more, and their validity
        self.fine = Residual(b)
        self.middle = nn.Sequential(convolution(b, c, stride=2), *(Residual(c) for _ in range(blocks)))
        self.deep = nn.Sequential(convolution(c, d, stride=2), *(Residual(d) for _ in range(blocks)))
        self.from_stem, self.from_middle, self.from_deep = (nn.Conv2d(n, width, 1) for n in (b, c, d))
        self.mix = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False), nn.BatchNorm2d(width),
            convolution(width, width, 1), nn.Conv2d(width, width, 1))  # fmt: skip

    def forward(self, image: Tensor, place: Tensor) -> Tensor:
        fine = self.fine(self.stem(image) + self.place(place))
        middle = self.middle(fine)
        deep = self.deep(middle)
        coarse = self.from_middle(middle) + F.interpolate(self.from_deep(deep), scale_factor=2.0, mode="nearest")
        return self.mix(self.from_stem(fine) + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))


class RgbdEncoder(nn.Module):
    """RGB-D -> (B, C, S/4, S/4): half of the channels are the look of a cell, half its shape.

    The look comes of colour and depth. The shape comes of depth alone (of brightness where there is none): what a can
    is then cannot depend on its colour, so that a can of a colour no can ever had is a can like any other.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        half, blocks = config.half_width, config.vision_blocks
        self.look = Pyramid(5, config.vision_widths, blocks, half)
        self.shape = Pyramid(3, tuple(width // 2 for width in config.vision_widths), blocks, half)

    def forward(self, color: Tensor, depth: Tensor, points: Tensor) -> Tensor:
        """color (B, 3, S, S) 0..1, depth (B, 1, S, S) m, points (B, 4, S/4, S/4): m in base, and validity 0/1."""
        seen = (depth > 0).to(depth.dtype)
        range_image = torch.cat([(depth - 1.0) * seen / DEPTH_SCALE, seen], 1)
        height = (points[:, 2:3] / HEIGHT_SCALE).clamp(-1, 4)
        place = torch.cat([centred(points[:, :3].movedim(1, -1)).movedim(-1, 1), height, points[:, 3:]], 1)
        brightness = (color.mean(1, keepdim=True) - 0.5) * (1 - seen)
        return torch.cat([self.look(torch.cat([color - 0.5, range_image], 1), place),
                          self.shape(torch.cat([range_image, brightness], 1), place)], 1)  # fmt: skip


def unit(features: Tensor, dim: int) -> Tensor:
    """Features along ``dim`` >= 0, their look and their shape each of length 1."""
    halves = features.unflatten(dim, (2, -1))
    return F.normalize(halves, dim=dim + 1).flatten(dim, dim + 1)


class RoleQueries(nn.Module):
    """From token states to one query per step and role, a summary of each step, and whether there is such a step.

    The thing and the goal are each asked for by a colour, which is looked up in the look of a cell, and by a kind,
    which is in its shape. Each is read off words of its own, so a colour and a kind that were never heard together are
    asked for like any other. Which words those are follows from the whole sentence; what they mean, from themselves.
    """

    NAMED = 2  # roles that words name: the thing and the goal

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width, self.free, self.steps = config.language.d_model, config.free_roles, config.steps
        pools = self.steps * self.NAMED * 2
        self.read = BidirectionalBlock(config.language)  # who does what in which step is more than what words mean
        self.norm = RMSNorm(width)
        self.attend = nn.Linear(width, self.steps * (self.free + 1))
        self.point, self.point_nowhere = nn.Linear(width, pools), nn.Linear(width, pools)
        self.nowhere = nn.Parameter(torch.randn(width) * 0.1)  # in place of a word: there is no goal, or no colour
        self.role = nn.Parameter(torch.randn(self.NAMED + self.free, width) * 0.1)
        half = config.half_width
        self.color, self.kind, self.query = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))
            for outputs in (half, half, config.feature_width)
        )
        self.wanted = nn.Linear(width, 1)

    def forward(self, text: EncodedText) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, R, C) queries, (B, K, W) summaries and (B, K) logits that there is such a step."""
        tokens, unread = self.norm(self.read(text.tokens, text.mask.sum(1))), ~text.mask.unsqueeze(-1)
        weights = self.attend(tokens).masked_fill(unread, float("-inf")).softmax(1)
        pooled = torch.einsum("btr,btw->brw", weights, tokens).unflatten(1, (self.steps, self.free + 1))
        summary = pooled[:, :, -1]
        free = self.query(pooled[:, :, :-1] + self.role[self.NAMED :])

        pointed = self.point(tokens).masked_fill(unread, float("-inf"))
        pointed = torch.cat([pointed, self.point_nowhere(tokens[:, :1])], 1).softmax(1)
        words = torch.cat([text.tokens, self.nowhere.expand(len(tokens), 1, -1)], 1)
        words = torch.einsum("btp,btw->bpw", pointed, words).unflatten(1, (self.steps, self.NAMED, 2))
        color, kind = (words + self.role[: self.NAMED, None]).unbind(3)
        named = torch.cat([self.color(color), self.kind(kind)], -1)
        return torch.cat([named, free], 2), summary, self.wanted(summary).squeeze(-1)


class Vision(nn.Module):
    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = RgbdEncoder(config)
        self.scale = nn.Parameter(torch.tensor(8.0))
        self.sink = nn.Linear(config.feature_width, 1)

    def survey(self, color: Tensor, depth: Tensor, intrinsics: Tensor, camera_pose: Tensor) -> Survey:
        """color (B, 3, S, S) 0..1, depth (B, S, S) m with 0 = invalid."""
        points, valid = point_map(depth, intrinsics, camera_pose)
        return Survey(self.encoder(color, depth.unsqueeze(1), torch.cat([points, valid], 1)), points)

    def forward(self, color: Tensor, depth: Tensor, intrinsics: Tensor, camera_pose: Tensor, tool: Tensor,
                queries: Tensor) -> Scan:  # fmt: skip
        """Images as in `survey`, tool (B, 3) m in base, queries (B, R, C).

        In training each image may serve n questions in a row: queries (n B, R, C) then give a scan of n B rows.
        """
        survey = self.survey(color, depth, intrinsics, camera_pose)
        features, points = survey
        images, questions = len(color), len(queries) // len(color)
        flat = features.flatten(2)  # (B, C, cells)
        asked = queries.view(images, -1, queries.shape[-1])  # (B, n R, C)
        logits = self.scale * torch.einsum("brc,bcn->brn", asked, unit(flat, 1))
        log_attention = torch.cat([logits, self.sink(asked)], -1).log_softmax(-1)
        attention = log_attention[..., :-1].exp()
        mass = attention.sum(-1)
        share = attention / mass.clamp(min=1e-4).unsqueeze(-1)
        flat_points = points.flatten(2)
        centre = torch.einsum("brn,bdn->brd", share, flat_points)
        square = torch.einsum("brn,bn->br", share, flat_points.square().sum(1))
        spread = (square - centre.square().sum(-1)).clamp(min=1e-8).sqrt()
        looked = torch.einsum("brn,bcn->brc", attention, flat)
        probes = tool.unsqueeze(1) + tool.new_tensor(TOOL_PROBES)
        grid = project(probes, intrinsics, camera_pose, self.config.image_size).unsqueeze(1)
        at_tool = F.grid_sample(features, grid, align_corners=False, padding_mode="border").squeeze(2)  # (B, C, probes)
        at_tool = at_tool.flatten(1).repeat_interleave(questions, 0)
        rows = queries.shape[:2]
        return Scan(looked.view(*rows, -1), centre.view(*rows, 3), mass.view(rows), spread.view(rows), at_tool,
                    log_attention.view(*rows, -1), queries, survey)  # fmt: skip

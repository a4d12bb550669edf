"""The vision-language-action model: images, proprioception and an instruction in, an action chunk out.

It reads from top to bottom: images become a feature map that knows where each cell is; queries made from the
instruction look over the cells of all cameras, and each becomes one token; the tokens of a tick, in AnoleVLA's order
(arXiv 2603.15046: proprioception first, instruction last), go through the selective state space core, which carries its
state from tick to tick; from the last token's output the head reads an action chunk.

With `grounding: targets` the words also name a target object and a reference object, as PokeVLA grounds language in
vision before it acts (arXiv 2604.20834): each is asked for by an appearance and a category. Without it all queries come
from the whole sentence, and nothing has to be named or labelled.

Shapes: B rows, T ticks, K steps of an instruction, R queries, C channels, N cells of all cameras, W width of the
instruction's summary, D width of the core, H rows of a chunk, A columns of a row, P primitives. Lengths are in metres,
points and poses in the robot's base frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_nodes.policy.configuration import CELL, PolicyConfig, SpaceConfig
from vla_nodes.policy.contract import Actions, Camera, Contract
from vla_nodes.policy.language import BidirectionalBlock, EncodedText, InstructionEncoder
from vla_nodes.policy.mamba.mixers import RMSNorm, SequenceCore
from vla_nodes.policy.processing import StateLayout

TARGET, REFERENCE = 0, 1  # the queries that words name


class CameraInput(NamedTuple):
    """A batch of one camera's images."""

    color: Tensor  # (B, 3, S, S) 0..1
    depth: Tensor  # (B, S, S) m, 0 = invalid
    intrinsics: Tensor | None = None  # (B, 3, 3), None where the contract says that the pose is unknown
    pose: Tensor | None = None  # T_base_camera (B, 4, 4), None likewise


class StepQueries(NamedTuple):
    """One step of an instruction, encoded once and used at every tick."""

    queries: Tensor  # (B, R, C)
    summary: Tensor  # (B, W)


class Instruction(NamedTuple):
    """All an instruction asks for, one step after the other."""

    queries: Tensor  # (B, K, R, C)
    summary: Tensor  # (B, K, W)
    step_present: Tensor  # (B, K) logit that there is such a step; the first always is

    def at(self, step: int | Tensor) -> StepQueries:
        """The given step of every row; a tensor (B,) takes each row's own."""
        rows = torch.arange(len(self.queries), device=self.queries.device)
        return StepQueries(self.queries[rows, step], self.summary[rows, step])


class FeatureMap(NamedTuple):
    """All there is to see, one vector and one place per cell, the cells of all cameras in a row."""

    features: Tensor  # (B, C, N)
    points: Tensor  # (B, 3, N) m in base, zero where not located
    valid: Tensor  # (B, 1, N) 0..1, whether the point was measured
    located: Tensor  # (B, 1, N) 0..1, whether there is a point, measured or guessed to be on the ground


class VisionOutput(NamedTuple):
    """What the queries found, and what losses and people look at."""

    features: Tensor  # (B, R, C)
    points: Tensor  # (B, R, 3) where, m in base
    visibility: Tensor  # (B, R) how much of the attention found something, 0..1
    attention_std: Tensor  # (B, R) how far apart that is, m
    tool: Tensor | None  # (B, probes * C) the map at the tool, with `grounding: targets`
    pixels: Tensor | None  # (B, R, 4 per camera), see `Vision._pixels`; without a grounding
    log_attention: Tensor  # (B, R, N + 1), the sink last
    queries: Tensor  # (B, R, C)
    feature_map: FeatureMap


class VisualTokens(NamedTuple):
    """The compressed view of one tick; small enough to cache, so the core can be trained without the images."""

    features: Tensor  # (..., R, C)
    points: Tensor  # (..., R, 3) m in base; of a target corrected from the visible surface to the object's centre
    visibility: Tensor  # (..., R)
    attention_std: Tensor  # (..., R)
    tool: Tensor | None = None  # (..., probes * C)
    place_position: Tensor | None = None  # (..., 3) where the target is to be put, m in base
    feasibility: Tensor | None = None  # (...,) logit that all the step names is in view and can be done
    pixels: Tensor | None = None  # (..., R, 4 per camera), see `Vision._pixels`


class TickOutput(NamedTuple):
    """What a tick gives: in normalised units inside the model, see `VlaPolicy.denormalize`."""

    actions: Tensor  # (..., H, A)
    primitive: Tensor | None  # (..., P) logits
    feasibility: Tensor | None  # (...,) logit
    object_center: Tensor | None  # (..., 3) of the target, m in base
    done: Tensor | None  # (...,) logit that the current step is done and the hand clear of it


# -- geometry ----------------------------------------------------------------------------------------------------------
def centered(points: Tensor, space: SpaceConfig, unit: float | None = None) -> Tensor:
    """Points (..., 3), m in base, relative to the centre of the space, in units of ``unit`` m, by default its size."""
    return (points - points.new_tensor(space.center)) / (unit or space.size)


def point_map(depth: Tensor, intrinsics: Tensor, pose: Tensor, space: SpaceConfig) -> tuple[Tensor, Tensor]:
    """Depth (B, S, S) m, 0 = invalid, K (B, 3, 3), T_base_camera (B, 4, 4) -> one point per cell.

    Returns points (B, 3, S/CELL, S/CELL) in base, m, and their validity (B, 1, S/CELL, S/CELL) as 0/1. Where depth is
    invalid the point is where the pixel's ray meets the ground plane, if there is one: a guess, and marked as one.
    """
    size = depth.shape[-1]
    at = torch.arange(CELL // 2, size, CELL, device=depth.device, dtype=depth.dtype)
    z = depth[:, CELL // 2 :: CELL, CELL // 2 :: CELL]
    u = (at[None, None, :] - intrinsics[:, 0, 2, None, None]) / intrinsics[:, 0, 0, None, None]
    v = (at[None, :, None] - intrinsics[:, 1, 2, None, None]) / intrinsics[:, 1, 1, None, None]
    rays = torch.stack([u.expand_as(z), v.expand_as(z), torch.ones_like(z)], 1)  # optical frame, z = 1
    rays = torch.einsum("bij,bjhw->bihw", pose[:, :3, :3], rays)
    origin = pose[:, :3, 3, None, None]
    valid = (z > 0).to(depth.dtype).unsqueeze(1)
    if space.ground_height is None:
        return (origin + rays * z.unsqueeze(1)) * valid, valid
    height = origin[:, 2:3] - space.ground_height if space.ground_height else origin[:, 2:3]
    downward = rays[:, 2:3].clamp(max=-1e-3)
    to_ground = (-height / downward).clamp(0.0, space.ray_length)
    return origin + rays * torch.where(valid > 0, z.unsqueeze(1), to_ground), valid


def cell_places(side: int, like: Tensor) -> Tensor:
    """(2, side, side): column and row of each cell of an image, -1..1, on the device of ``like``."""
    line = torch.linspace(-1, 1, side, device=like.device, dtype=like.dtype)
    row, column = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([column, row])


def project(points: Tensor, intrinsics: Tensor, pose: Tensor, size: int) -> Tensor:
    """Points (B, n, 3) in base -> image coordinates (B, n, 2) as grid_sample wants them, -1..1 across the image."""
    relative = points - pose[:, None, :3, 3]
    optical = torch.einsum("bji,bnj->bni", pose[:, :3, :3], relative)
    depth = optical[..., 2].clamp(min=0.05)
    u = optical[..., 0] / depth * intrinsics[:, None, 0, 0] + intrinsics[:, None, 0, 2]
    v = optical[..., 1] / depth * intrinsics[:, None, 1, 1] + intrinsics[:, None, 1, 2]
    return torch.stack([(2 * u + 1) / size - 1, (2 * v + 1) / size - 1], -1)


# -- vision: images to a feature map -----------------------------------------------------------------------------------
def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = convolution(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Pyramid(nn.Module):
    """(B, inputs, S, S) channels, with the places of their cells, -> (B, width, S/4, S/4)."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int], blocks: int, width: int) -> None:
        super().__init__()
        a, b, c, d = widths
        self.stem = nn.Sequential(convolution(inputs, a, stride=2), convolution(a, b, stride=2))
        self.place = nn.Conv2d(5, b, 1)  # points, their height once more, and their validity
        self.fine = ResidualBlock(b)
        self.middle = nn.Sequential(convolution(b, c, stride=2), *(ResidualBlock(c) for _ in range(blocks)))
        self.deep = nn.Sequential(convolution(c, d, stride=2), *(ResidualBlock(d) for _ in range(blocks)))
        self.from_stem, self.from_middle, self.from_deep = (nn.Conv2d(n, width, 1) for n in (b, c, d))
        self.mix = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False), nn.BatchNorm2d(width),
            convolution(width, width, 1), nn.Conv2d(width, width, 1))  # fmt: skip

    def forward(self, image: Tensor, place: Tensor) -> Tensor:
        fine = self.fine(self.stem(image) + self.place(place))  # (B, b, S/4, S/4)
        middle = self.middle(fine)  # (B, c, S/8, S/8)
        deep = self.deep(middle)  # (B, d, S/16, S/16)
        coarse = self.from_middle(middle) + F.interpolate(self.from_deep(deep), scale_factor=2.0, mode="nearest")
        return self.mix(self.from_stem(fine) + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))


class RgbdEncoder(nn.Module):
    """RGB-D -> (B, C, S/4, S/4): half of the channels are the appearance of a cell, half its category.

    The appearance comes of colour and depth. The category comes of depth alone (of brightness where there is none):
    what an object is then cannot depend on its colour, so that one of a colour never seen on it is one like any other.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        half, blocks, widths = config.half_width, config.vision_blocks, config.vision_widths
        self.space = config.space
        self.appearance = Pyramid(5, widths, blocks, half)
        a, b, c, d = (width // 2 for width in widths)
        self.category = Pyramid(3, (a, b, c, d), blocks, half)

    def forward(self, color: Tensor, depth: Tensor, points: Tensor, located: Tensor | None = None) -> Tensor:
        """color (B, 3, S, S) 0..1, depth (B, 1, S, S) m, points (B, 4, S/4, S/4): m in base, and validity 0/1.

        A cell with no point, located (B, 1, S/4, S/4) 0 there, enters with its place in the image, -1..1, instead.
        """
        seen = (depth > 0).to(depth.dtype)
        range_image = torch.cat([(depth - 1.0) * seen, seen], 1)  # m from 1 m
        height = (points[:, 2:3] / self.space.height_scale).clamp(-1, 4)
        place = centered(points[:, :3].movedim(1, -1), self.space).movedim(-1, 1)
        if located is not None:
            in_image = F.pad(cell_places(points.shape[-1], points), (0, 0, 0, 0, 0, 1))  # (3, S/4, S/4)
            place = torch.where(located > 0, place, in_image)
        place = torch.cat([place, height, points[:, 3:]], 1)
        brightness = (color.mean(1, keepdim=True) - 0.5) * (1 - seen)
        return torch.cat([self.appearance(torch.cat([color - 0.5, range_image], 1), place),
                          self.category(torch.cat([range_image, brightness], 1), place)], 1)  # fmt: skip


def unit(features: Tensor, dim: int) -> Tensor:
    """Features along ``dim`` >= 0, their appearance and their category each of length 1."""
    halves = features.unflatten(dim, (2, -1))
    return F.normalize(halves, dim=dim + 1).flatten(dim, dim + 1)


def category_of(features: Tensor) -> Tensor:
    """The half of features of the map (..., C) that does not come of colours (`RgbdEncoder`): (..., C / 2)."""
    return features.chunk(2, -1)[1]


# -- language: a sentence to queries -----------------------------------------------------------------------------------
class TargetQueries(nn.Module):
    """From token states to one query per step and object, a summary of each step, and whether there is such a step.

    The target and the reference are each asked for by a colour, which is looked up in the appearance of a cell, and by
    a category. Each is read off words of its own, so a colour and a category that were never heard together are asked
    for like any other. Which words those are follows from the whole sentence; what they mean, from themselves.
    """

    NAMED = 2  # the target and the reference

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width, self.free, self.steps = config.language.d_model, config.free_queries, config.steps
        pools = self.steps * self.NAMED * 2
        self.read = BidirectionalBlock(config.language)  # who does what in which step is more than what words mean
        self.norm = RMSNorm(width)
        self.attend = nn.Linear(width, self.steps * (self.free + 1))
        self.point, self.point_nowhere = nn.Linear(width, pools), nn.Linear(width, pools)
        self.nowhere = nn.Parameter(torch.randn(width) * 0.1)  # in place of a word: there is no reference, or no colour
        self.role = nn.Parameter(torch.randn(self.NAMED + self.free, width) * 0.1)
        half = config.half_width
        self.appearance, self.category, self.query = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))
            for outputs in (half, half, config.feature_width)
        )
        self.step_present = nn.Linear(width, 1)

    def forward(self, text: EncodedText) -> Instruction:
        tokens, unread = self.norm(self.read(text.tokens, text.mask.sum(1))), ~text.mask.unsqueeze(-1)
        weights = self.attend(tokens).masked_fill(unread, float("-inf")).softmax(1)
        pooled = torch.einsum("btr,btw->brw", weights, tokens).unflatten(1, (self.steps, self.free + 1))
        summary = pooled[:, :, -1]  # (B, K, W)
        free = self.query(pooled[:, :, :-1] + self.role[self.NAMED :])  # (B, K, free, C)

        pointed = self.point(tokens).masked_fill(unread, float("-inf"))
        pointed = torch.cat([pointed, self.point_nowhere(tokens[:, :1])], 1).softmax(1)
        words = torch.cat([text.tokens, self.nowhere.expand(len(tokens), 1, -1)], 1)
        words = torch.einsum("btp,btw->bpw", pointed, words).unflatten(1, (self.steps, self.NAMED, 2))
        appearance, category = (words + self.role[: self.NAMED, None]).unbind(3)
        named = torch.cat([self.appearance(appearance), self.category(category)], -1)  # (B, K, 2, C)
        return Instruction(torch.cat([named, free], 2), summary, self.step_present(summary).squeeze(-1))


class SentenceQueries(nn.Module):
    """From token states to queries that the whole sentence makes: one step, nothing named."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width, self.count = config.language.d_model, config.free_queries
        self.read, self.norm = BidirectionalBlock(config.language), RMSNorm(width)
        self.attend = nn.Linear(width, self.count + 1)
        self.role = nn.Parameter(torch.randn(self.count, width) * 0.1)
        self.query = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.feature_width))

    def forward(self, text: EncodedText) -> Instruction:
        tokens = self.norm(self.read(text.tokens, text.mask.sum(1)))  # (B, words, W)
        weights = self.attend(tokens).masked_fill(~text.mask.unsqueeze(-1), float("-inf")).softmax(1)
        pooled = torch.einsum("btr,btw->brw", weights, tokens)  # (B, R + 1, W)
        queries, summary = self.query(pooled[:, :-1] + self.role), pooled[:, -1]
        return Instruction(queries.unsqueeze(1), summary.unsqueeze(1), torch.ones_like(summary[:, :1]))


# -- attention: queries over the cells of all cameras ------------------------------------------------------------------
class Vision(nn.Module):
    """Feature maps of all cameras, and what queries find in them. A query that finds nothing looks at a sink."""

    def __init__(self, config: PolicyConfig, cameras: Sequence[Camera]) -> None:
        super().__init__()
        self.config, self.cameras = config, tuple(cameras)
        self.encoder = RgbdEncoder(config)
        self.scale = nn.Parameter(torch.tensor(8.0))
        self.sink = nn.Linear(config.feature_width, 1)
        known = all(camera.pose == "known" for camera in self.cameras)
        self.everywhere = known and config.space.ground_height is not None  # every cell has a point
        if len(self.cameras) > 1:  # which camera a cell is of
            self.camera = nn.Parameter(torch.randn(len(self.cameras), config.feature_width) * 0.02)

    def feature_maps(self, images: Sequence[CameraInput]) -> list[FeatureMap]:
        """One for each camera, its cells still in rows and columns: (B, ., S/CELL, S/CELL)."""
        found = []
        for number, image in enumerate(images):
            guessed = self.config.space.ground_height is not None
            if image.pose is not None and image.intrinsics is not None:
                points, valid = point_map(image.depth, image.intrinsics, image.pose, self.config.space)
                located = torch.ones_like(valid) if guessed else valid
            else:
                located = valid = torch.zeros_like(image.depth[:, None, ::CELL, ::CELL])
                points, guessed = valid.expand(-1, 3, -1, -1), False
            features = self.encoder(image.color, image.depth.unsqueeze(1), torch.cat([points, valid], 1),
                                    None if guessed else located)  # fmt: skip
            if len(self.cameras) > 1:
                features = features + self.camera[number, :, None, None]
            found.append(FeatureMap(features, points, valid, located))
        return found

    def forward(self, images: Sequence[CameraInput], tool: Tensor | None, queries: Tensor) -> VisionOutput:
        """tool (B, 3) m in base, needed with `grounding: targets`; queries (n B, R, C).

        In training each image may serve n questions in a row: the result then has n B rows.
        """
        maps = self.feature_maps(images)
        cells = FeatureMap(*(_side_by_side(part) for part in zip(*maps, strict=True)))  # (B, ., N)
        rows, count = len(cells.features), len(queries) // len(cells.features)
        asked = queries.view(rows, -1, queries.shape[-1])  # (B, n R, C)
        logits = self.scale * torch.einsum("brc,bcn->brn", asked, unit(cells.features, 1))
        log_attention = torch.cat([logits, self.sink(asked)], -1).log_softmax(-1)  # (B, n R, N + 1)
        attention = log_attention[..., :-1].exp()
        visibility = attention.sum(-1)
        share = attention / visibility.clamp(min=1e-4).unsqueeze(-1)
        mean = torch.einsum("brn,bdn->brd", share, cells.points)
        square = torch.einsum("brn,bn->br", share, cells.points.square().sum(1))
        if not self.everywhere:  # of what has a point
            located = torch.einsum("brn,bn->br", share, cells.located[:, 0]).clamp(min=1e-4)
            mean, square = mean / located.unsqueeze(-1), square / located
        std = (square - mean.square().sum(-1)).clamp(min=1e-8).sqrt()
        found = torch.einsum("brn,bcn->brc", attention, cells.features)
        of = queries.shape[:2]
        targets = self.config.grounding == "targets"
        at_tool = self._at_tool(images[0], maps[0].features, tool, count) if targets else None
        pixels = None if targets else self._pixels(attention, cells.located).view(*of, -1)
        return VisionOutput(found.view(*of, -1), mean.view(*of, 3), visibility.view(of), std.view(of), at_tool, pixels,
                            log_attention.view(*of, -1), queries, cells)  # fmt: skip

    def _at_tool(self, image: CameraInput, features: Tensor, tool: Tensor | None, count: int) -> Tensor:
        """The first camera's map where the tool is (n B, probes * C)."""
        assert tool is not None and image.intrinsics is not None and image.pose is not None
        probes = tool.unsqueeze(1) + tool.new_tensor(self.config.space.tool_probes)
        grid = project(probes, image.intrinsics, image.pose, self.config.image_size).unsqueeze(1)
        at_tool = F.grid_sample(features, grid, align_corners=False, padding_mode="border").squeeze(2)
        return at_tool.flatten(1).repeat_interleave(count, 0)

    def _pixels(self, attention: Tensor, located: Tensor) -> Tensor:
        """(B, R, 4 per camera): attention, that on cells with a point, mean column and row -1..1 times attention."""
        side = self.config.cells
        column, row = cell_places(side, attention)
        parts = []
        for at, with_point in zip(attention.split(side * side, -1), located.split(side * side, -1), strict=True):
            parts += [
                at.sum(-1),
                (at * with_point).sum(-1),
                (at * column.flatten()).sum(-1),
                (at * row.flatten()).sum(-1),
            ]
        return torch.stack(parts, -1)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """The cells of all cameras in a row."""
    flat = [part.flatten(2) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


# -- heads -------------------------------------------------------------------------------------------------------------
class ChunkHead(nn.Module):
    """One pass regresses the whole chunk: a trunk shared by all primitives, and a light decoder of each.

    The decoders are mixed by the predicted primitive probabilities, so a moment between two primitives gets a blend.
    Without primitives there is the shared decoder alone, and nothing says when a step is done.
    """

    def __init__(self, config: PolicyConfig, actions: Actions, geometry: int, rank: int = 32) -> None:
        super().__init__()
        self.horizon, self.size, self.primitives = actions.horizon, actions.size, len(config.primitives)
        width, outputs = config.head_width, actions.horizon * actions.size
        self.trunk = nn.Sequential(
            nn.Linear(config.d_model + geometry, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU())  # fmt: skip
        if self.primitives:
            self.primitive = nn.Linear(width, self.primitives)
            self.done = nn.Linear(width, 1)
        self.shared = nn.Linear(width, outputs)
        if self.primitives:
            self.narrow = nn.Linear(width, rank)
            self.decoders = nn.Parameter(torch.randn(self.primitives, rank, outputs) * 0.02)

    def forward(self, core: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """core (..., D), geometry (..., G) -> actions (..., H, A), logits of primitives (..., P), of done (...)."""
        hidden = self.trunk(torch.cat([core, geometry], -1))
        if not self.primitives:
            return self.shared(hidden).unflatten(-1, (self.horizon, self.size)), None, None
        logits = self.primitive(hidden)
        parts = torch.einsum("...p,...r,pro->...o", logits.softmax(-1), self.narrow(hidden), self.decoders)
        actions = (self.shared(hidden) + parts).unflatten(-1, (self.horizon, self.size))
        return actions, logits, self.done(hidden).squeeze(-1)


class FeasibilityHead(nn.Module):
    """Whether all of it is there and can be done: as doubtful as the most doubtful of its parts (a soft minimum).

    The appearance and the category of the target and of the reference are each compared with what was asked for without
    knowing the others. A colour and a category that never stood together are then judged like any others.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.sizes = (*(3 * config.half_width,) * 4, 2 * 4 + config.language.d_model)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 64), nn.SiLU(), nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 1))
            for size in self.sizes
        )

    def forward(self, evidence: Tensor) -> Tensor:
        """(..., E), see `VlaPolicy.evidence`, to a logit (..., 1)."""
        logits = [part(seen) for part, seen in zip(self.parts, evidence.split(self.sizes, -1), strict=True)]
        return -torch.logsumexp(-torch.cat(logits, -1), -1, keepdim=True)


# -- the whole ---------------------------------------------------------------------------------------------------------
class VlaPolicy(nn.Module):
    """The network of a configuration, with the inputs and outputs of a contract.

    Raises:
        ValueError: the contract lacks what `grounding: targets` needs.
    """

    def __init__(self, config: PolicyConfig, contract: Contract, tokenizer: Any = None) -> None:
        super().__init__()
        self.config, self.contract = config, contract
        self.layout = StateLayout(contract)
        self.targets = config.grounding == "targets"
        if self.targets:
            _need_for_targets(contract, self.layout)
        self.language = InstructionEncoder(config.language, tokenizer)
        self.queries = (TargetQueries if self.targets else SentenceQueries)(config)
        self.vision = Vision(config, contract.cameras)
        width, d, words = config.feature_width, config.d_model, config.language.d_model
        state, tool = sum(self.layout.sizes.values()), "tool_position" in self.layout.where
        if self.targets:
            self.object_center = nn.Linear(width, 3)  # from a visible surface to the centre of the object, m
            nn.init.zeros_(self.object_center.weight)
            # From the reference to where the target's centre goes: the relation in space that the words name.
            self.placement_head = nn.Sequential(
                nn.Linear(words + 3, 128), nn.SiLU(),
                nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 3))  # fmt: skip
            self.feasibility_head = FeasibilityHead(config)
        self.embed_state = nn.ModuleDict({token: nn.Linear(size, d) for token, size in self.layout.sizes.items()})
        if self.targets:
            # Colours have done their work when an object is found: to move it, only its category counts. One of a
            # colour that its category never had is then moved like any other.
            self.embed_tool = nn.Linear(len(config.space.tool_probes) * config.half_width, d)
            self.embed_image = nn.Linear(config.half_width + 8, d)
            self.embed_instruction = nn.Linear(words + 6, d)
            # of the target and the reference: relative place and visibility; of the place position: relative place
            geometry = 2 * (3 + 1) + 3 + 3 + 1 + _moving(self.layout)
        else:
            seen = 3 + 3 * tool + 2 + 4 * len(contract.cameras)  # see `_seen`
            self.embed_image = nn.Linear(width + seen, d)
            self.embed_instruction = nn.Linear(words, d)
            geometry = config.free_queries * seen + state
        self.token_type = nn.Parameter(torch.randn(self.tokens, d) * 0.02)
        self.core = SequenceCore(d, config.n_layer, config.mixer, config.d_state, config.headdim, config.expand,
                                 twin_of=config.twin_of)  # fmt: skip
        self.head = ChunkHead(config, contract.actions, geometry)

    @property
    def tokens(self) -> int:
        """Tokens of one tick: one per state token, per query, of the instruction, and with targets of the tool."""
        return len(self.layout.sizes) + self.config.free_queries + 1 + (3 if self.targets else 0)

    # -- once per instruction --------------------------------------------------------------------------------------
    def encode_instruction(self, text: EncodedText) -> Instruction:
        return self.queries(text)

    # -- once per observation ----------------------------------------------------------------------------------------
    def encode_observation(
        self, images: Sequence[CameraInput], tool: Tensor | None, step: StepQueries
    ) -> tuple[VisualTokens, VisionOutput]:
        """The images of every camera of the contract, in its order; tool (B, 3) m in base, needed with targets."""
        seen = self.vision(images, tool, step.queries)
        tokens = VisualTokens(seen.features, seen.points, seen.visibility, seen.attention_std, pixels=seen.pixels)
        if self.targets:
            points = seen.points + self.object_center(seen.features)  # (B, R, 3)
            feasibility = self.feasibility_head(self.evidence(seen, points, step.summary)).squeeze(-1)  # (B,)
            place = self.place_position(points[:, REFERENCE], step.summary)  # (B, 3)
            tokens = tokens._replace(points=points, tool=seen.tool, place_position=place, feasibility=feasibility)
        return tokens, seen

    def evidence(self, seen: VisionOutput, points: Tensor, summary: Tensor) -> Tensor:
        """What feasibility is judged by (B, E): of target and reference what was found, what was asked for and how they
        agree, first the appearance of each and then its category; how much was found and where; what the step says.
        """
        found = unit(seen.features, 2)
        named = torch.stack([found, seen.queries, found * seen.queries], 2)[:, :2]  # (B, 2, 3, C)
        halves = named.unflatten(3, (2, -1)).transpose(2, 3)  # (B, 2, half, 3, C / 2)
        fine = centered(points, self.config.space, self.config.space.fine)  # a centimetre tells states of things apart
        where = torch.cat([seen.visibility.unsqueeze(-1), fine], -1)[:, :2]
        return torch.cat([halves.flatten(1), where.flatten(1), summary], -1)

    def place_position(self, reference: Tensor, summary: Tensor) -> Tensor:
        """Where the target's centre goes, m in base (..., 3), for a reference at (..., 3) and a step's summary
        (..., W)."""
        return reference + self.config.space.near * self.placement_head(self.placement_input(reference, summary))

    def placement_input(self, reference: Tensor, summary: Tensor) -> Tensor:
        """What `place_position` goes by (..., W + 3)."""
        return torch.cat([summary, centered(reference, self.config.space, self.config.space.fine)], -1)

    # -- once per tick, or a whole history at once -------------------------------------------------------------
    def forward(
        self, state: dict[str, Tensor], view: VisualTokens, summary: Tensor, carried: tuple | None
    ) -> tuple[TickOutput, tuple]:
        """T ticks of B streams; equal to T calls with T = 1.

        Args:
            state: {token: (B, T, size)}, see `StateLayout`.
            view: (B, T, ...).
            summary: (B, T, W), or (B, W) the same at all ticks.
            carried: the core's state, None at the beginning of an episode.
        """
        batch, ticks = view.visibility.shape[:2]
        summary = summary if summary.dim() == 3 else summary.unsqueeze(1).expand(-1, ticks, -1)  # (B, T, W)
        embedded, geometry = (self._target_tokens if self.targets else self._image_tokens)(state, view, summary)
        proprioception = [embed(state[token]).unsqueeze(2) for token, embed in self.embed_state.items()]
        tokens = torch.cat([*proprioception, *embedded], 2) + self.token_type  # (B, T, tokens, D)
        # Without memory every tick is a sequence of its own.
        sequence, carried = (tokens.flatten(1, 2), carried) if self.config.memory else (tokens.flatten(0, 1), None)
        out, carried = self.core(sequence.to(self.core.norm_f.weight.dtype), carried)  # may be bf16 on a GPU
        last = out.reshape(batch, ticks, self.tokens, -1)[:, :, -1].to(tokens.dtype)  # (B, T, D), the instruction's
        actions, primitive, done = self.head(last, geometry)  # (B, T, H, A), (B, T, P), (B, T)
        center = view.points[..., TARGET, :] if self.targets else None  # (B, T, 3)
        return TickOutput(actions, primitive, view.feasibility, center, done), carried

    def _target_tokens(
        self, state: dict[str, Tensor], view: VisualTokens, summary: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Tokens of the tool, of what each query found and of the instruction; and what the head gets beside."""
        assert view.tool is not None and view.place_position is not None
        space, odds = self.config.space, self.config.visibility_odds
        tool = self._tool_position(state)  # (B, T, 1, 3)
        relative = (view.points - tool) / space.near  # (B, T, R, 3)
        place = centered(view.points, space)
        trust = odds / (1 + (odds - 1) * view.visibility.unsqueeze(-1))
        found = trust * view.visibility.unsqueeze(-1)  # (B, T, R, 1)
        seen = torch.cat([trust * category_of(view.features), relative.clamp(-4, 4) * found, place * found, found,
                          view.attention_std.unsqueeze(-1) / space.near], -1)  # fmt: skip
        to_place = ((view.place_position - tool.squeeze(2)) / space.near).clamp(-4, 4) * found[..., REFERENCE, :]
        goal = centered(view.place_position, space) * found[..., REFERENCE, :]
        embedded = [self.embed_tool(category_of(view.tool)).unsqueeze(2), self.embed_image(seen),
                    self.embed_instruction(torch.cat([summary, to_place, goal], -1)).unsqueeze(2)]  # fmt: skip
        near = torch.cat([relative[..., :2, :].clamp(-4, 4) * found[..., :2, :], found[..., :2, :]], -1).flatten(2)
        moving = [state[token] for token in _moving_tokens(self.layout)]
        own = [self._part(state, "tool_position"), self._part(state, "gripper")]
        return embedded, torch.cat([near, to_place, *own, *moving], -1)

    def _image_tokens(
        self, state: dict[str, Tensor], view: VisualTokens, summary: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Tokens of what each query found and of the instruction; and what the head gets beside."""
        seen = self._seen(state, view)  # (B, T, R, .)
        embedded = [self.embed_image(torch.cat([view.features, seen], -1)),
                    self.embed_instruction(summary).unsqueeze(2)]  # fmt: skip
        return embedded, torch.cat([seen.flatten(2), *state.values()], -1)

    def _seen(self, state: dict[str, Tensor], view: VisualTokens) -> Tensor:
        """Where each query found something: in the base frame, from the tool, in each image; how much, how spread."""
        assert view.pixels is not None
        space, located = self.config.space, view.pixels[..., 1::4].sum(-1, keepdim=True)
        parts = [centered(view.points, space).clamp(-8, 8) * located]
        if "tool_position" in self.layout.where:
            parts.append(((view.points - self._tool_position(state)) / space.near).clamp(-8, 8) * located)
        std = (view.attention_std.unsqueeze(-1) / space.near).clamp(max=8) * located
        return torch.cat([*parts, view.visibility.unsqueeze(-1), std, view.pixels], -1)

    def _part(self, state: dict[str, Tensor], name: str) -> Tensor:
        """One vector (B, T, size) of the state, offset and scaled as it enters."""
        token, first, end = self.layout.where[name]
        return state[token][..., first:end]

    def _tool_position(self, state: dict[str, Tensor]) -> Tensor:
        """(B, T, 1, 3) m in base."""
        (vector,) = (v for v in self.contract.state if v.name == "tool_position")
        part = self._part(state, "tool_position").unsqueeze(-2)
        scale = part.new_tensor(vector.scale)
        return part * scale + part.new_tensor(vector.offset)

    # -- units of actions ----------------------------------------------------------------------------------------------
    def denormalize(self, actions: Tensor) -> Tensor:
        """What the head gives (..., A) in the units of the contract's columns; grippers 0..1."""
        columns = self.contract.actions
        physical = actions * actions.new_tensor(columns.scale)
        if columns.offset is not None:
            physical = physical + actions.new_tensor(columns.offset)
        for column in columns.gripper_columns:
            physical[..., column : column + 1] = actions[..., column : column + 1].sigmoid()
        return physical

    def normalize(self, actions: Tensor) -> Tensor:
        """Actions in the contract's units to what the head regresses; grippers stay 0..1, targets for a logit."""
        columns = self.contract.actions
        moved = actions if columns.offset is None else actions - actions.new_tensor(columns.offset)
        normal = moved / actions.new_tensor(columns.scale)
        for column in columns.gripper_columns:
            normal[..., column] = actions[..., column]
        return normal


def _moving_tokens(layout: StateLayout) -> list[str]:
    """The state tokens that hold velocities."""
    return [token for token, vectors in layout.vectors.items() if all("velocit" in v.name for v in vectors)]


def _moving(layout: StateLayout) -> int:
    return sum(layout.sizes[token] for token in _moving_tokens(layout))


def _need_for_targets(contract: Contract, layout: StateLayout) -> None:
    """ValueError where a contract lacks what grounded targets go by."""
    for name, size in (("tool_position", 3), ("gripper", 1)):
        token, first, end = layout.where.get(name, ("", 0, 0))
        if end - first != size:
            raise ValueError(f"grounding: targets needs the state vector {name} of {size} numbers in the contract")
    if not contract.cameras or contract.cameras[0].pose != "known":
        raise ValueError("grounding: targets needs a first camera whose pose is known")

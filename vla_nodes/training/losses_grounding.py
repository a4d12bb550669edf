"""Stage 1: language meets vision. Where is the target that a step names, where is the reference, where does the target
go, and is all of it there?

Vision and queries learn on single frames (PokeVLA's first stage, arXiv 2604.20834: vision-language grounding
before action). The masks and positions are training-only: goal-aware segmentation and geometry losses.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vla_nodes.envs.base import Grounding, Sentence
from vla_nodes.policy.modeling import (
    CameraInput,
    FeatureMap,
    Instruction,
    StepQueries,
    VisionOutput,
    VisualTokens,
    VlaPolicy,
    unit,
)
from vla_nodes.training.examples import augment
from vla_nodes.training.grounding_data import NO_NAME, Frame, Names

TRAINED = ("queries", "vision", "object_center", "placement_head", "feasibility_head")  # language stays as distilled
SEEING = ("vision.encoder", "object_center")  # what learns when nothing is asked
SPOTS = 16  # places of a reference for each sentence
TOGETHER = 16  # sentences the encoder reads at a time
SEEN = 3  # cells that must show an object before it counts as seen
IMAGES = ("color", "depth", "intrinsics", "camera_pose", "tool", "shown", "shown_center")


def collate(frames: list[Frame], rng: np.random.Generator | None, questions: int = 1, depth: bool = True) -> dict:
    """A batch of tensors, augmented when a generator is given. ``questions`` frames in a row share their image.

    Without ``depth`` all of it is invalid.
    """
    seen = frames[::questions]
    images = [augment(f.color, f.depth, rng) if rng else (f.color.astype(np.float32) / 255, f.depth) for f in seen]
    batch = {
        "color": torch.from_numpy(np.stack([i[0] for i in images])).permute(0, 3, 1, 2),  # channels last in memory
        "depth": torch.from_numpy(np.stack([i[1] for i in images])),
    }
    if not depth:
        batch["depth"].zero_()
    for name in IMAGES[2:]:
        batch[name] = torch.from_numpy(np.stack([getattr(f, name) for f in seen]))
    for name in ("cells", "wanted", "present", "center", "place_position"):
        batch[name] = torch.from_numpy(np.stack([getattr(f, name) for f in frames]))
    batch["step"], batch["steps"] = (torch.tensor([getattr(f, n) for f in frames]) for n in ("step", "steps"))
    batch["grounded"] = torch.tensor([float(f.grounded) for f in frames])
    return {**batch, "text": [f.text for f in frames]}


def understand(model: VlaPolicy, texts: list[str]) -> Instruction:
    """Sentences of like length together: padding costs as much as words."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    groups = [order[i : i + TOGETHER] for i in range(0, len(order), TOGETHER)]
    asked = [model.encode_instruction(model.language.encode([texts[i] for i in group])) for group in groups]
    back = torch.tensor(order).argsort()
    return Instruction(*(torch.cat(part)[back] for part in zip(*asked, strict=True)))


def images(batch: dict) -> tuple[CameraInput]:
    """The one camera's images of a batch."""
    return (CameraInput(batch["color"], batch["depth"], batch["intrinsics"], batch["camera_pose"]),)


def asked(model: VlaPolicy, batch: dict) -> tuple[VisualTokens, VisionOutput, StepQueries, Instruction]:
    """What the model sees in a batch's images when it looks for what is asked."""
    instruction = understand(model, [t if not model.language.check(t) else "?" for t in batch["text"]])
    prepared = instruction.at(batch["step"])
    view, scan = model.encode_observation(images(batch), batch["tool"], prepared)
    return view, scan, prepared, instruction


def hidden(batch: dict) -> Tensor:
    """(B,) whether something that a question names is there and hardly to be seen."""
    found = [batch["present"][:, role] & ((batch["cells"] == role + 1).flatten(1).sum(1) < SEEN) for role in range(2)]
    return found[0] | found[1]


def losses(model: VlaPolicy, batch: dict, reader: Cells | None = None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Loss terms and what a person wants to know about the batch."""
    view, scan, _, instruction = asked(model, batch)
    near = model.config.space.near
    terms, report = {}, {}
    for role, name in enumerate(("target", "reference")):
        cells = (batch["cells"] == role + 1).flatten(1).float()
        present, visible = batch["present"][:, role], cells.sum(1) > 0
        answer = torch.cat([cells / cells.sum(1, keepdim=True).clamp(min=1), (~present).float().unsqueeze(1)], 1)
        counted = visible | ~present  # present but hidden: nothing to learn from this frame
        log_attention = scan.log_attention[:, role]
        terms[f"{name} mask"] = -(answer * log_attention).sum(1)[counted].sum() / counted.sum().clamp(min=1)
        gap = (view.points[:, role] - batch["center"][:, role]).norm(dim=1)
        center = batch["center"][:, role]
        terms[f"{name} point"] = F.smooth_l1_loss(view.points[:, role][visible] / near, center[visible] / near,
                                                  beta=0.05) if visible.any() else gap.sum() * 0  # fmt: skip
        best = log_attention.argmax(1)
        right = torch.where(present, torch.cat([cells, cells[:, :1] * 0], 1).gather(1, best[:, None])[:, 0] > 0,
                            best == cells.shape[1])  # fmt: skip
        report[f"{name} found"] = float(right[visible].float().mean()) if visible.any() else 1.0
        report[f"{name} cm"] = 100 * float(gap[visible].detach().mean()) if visible.any() else 0.0
    placed = torch.isfinite(batch["place_position"]).all(1) & ((batch["cells"] == 2).flatten(1).sum(1) > 0)
    if placed.any():
        gap = view.place_position[placed] - batch["place_position"][placed]
        terms["place position"] = F.smooth_l1_loss(gap / model.config.space.near, torch.zeros_like(gap), beta=0.05)
        report["place position cm"] = 100 * float(gap.detach().norm(dim=1).mean())
    else:
        terms["place position"], report["place position cm"] = view.place_position.sum() * 0, 0.0
    later = torch.arange(1, instruction.step_present.shape[1])
    answer = (later[None] < batch["steps"][:, None]).float()
    terms["steps"] = F.binary_cross_entropy_with_logits(instruction.step_present[:, 1:], answer)
    report["steps right"] = float(((instruction.step_present[:, 1:] > 0) == (answer > 0)).all(1).float().mean())
    judged = F.binary_cross_entropy_with_logits(view.feasibility, batch["grounded"], reduction="none")
    counted = ~hidden(batch)
    terms["grounding"] = judged[counted].sum() / counted.sum().clamp(min=1)
    said = view.feasibility > 0
    for name, rows in (("yes", (batch["grounded"] > 0) & counted), ("no", (batch["grounded"] == 0) & counted)):
        report[f"grounded {name}"] = (
            float((said == (batch["grounded"] > 0))[rows].float().mean()) if rows.any() else 1.0
        )
    if reader is not None:
        more, seen = reader.loss(model, scan.feature_map, batch)
        terms, report = {**terms, **more}, {**report, **seen}
    return terms, report


WEIGHTS = {
    "target mask": 1.0,
    "reference mask": 1.0,
    "target point": 2.0,
    "reference point": 1.0,
    "place position": 1.0,
    "steps": 0.5,
    "grounding": 2.0,
    "words": 1.0,
    "where": 1.0,
    "cells": 1.0,
    "centers": 2.0,
}


class NameReader(torch.nn.Module):
    """Training only: from (..., C) features or queries to logits of every appearance and of every category."""

    def __init__(self, model: VlaPolicy, grounding: Grounding) -> None:
        super().__init__()
        half = model.config.half_width
        self.appearance = torch.nn.Linear(half, len(grounding.appearances))
        self.category = torch.nn.Linear(half, len(grounding.categories))

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        appearance, category = values.chunk(2, -1)
        return self.appearance(appearance), self.category(category)


class Cells(torch.nn.Module):
    """Training only: the appearance, the category and the center of what stands in every cell, read off the map.

    One image answers for all its things at once (goal-aware segmentation and geometry of PokeVLA, with every thing a
    goal), so eyes learn several times faster from it than from questions.
    """

    def __init__(self, model: VlaPolicy, grounding: Grounding) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(8.0))
        self.name = NameReader(model, grounding)
        self.background = Names(grounding).nothing[1]

    def loss(
        self, model: VlaPolicy, feature_map: FeatureMap, batch: dict
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Objects and the background weigh the same, however many cells each has."""
        features = feature_map.features.flatten(2).transpose(1, 2)  # (B, cells, C)
        shown = batch["shown"].flatten(2).long()
        thing = shown[:, 1] != self.background
        if not thing.any():
            return {"cells": features.sum() * 0, "centers": features.sum() * 0}, {"cells right": 1.0, "centers cm": 0.0}
        said = self.name(self.scale * unit(features, 2))
        total, right = features.new_zeros(()), torch.ones_like(thing)
        for logits, answer in zip(said, shown.unbind(1), strict=True):
            wrong = F.cross_entropy(logits.flatten(0, 1), answer.flatten(), ignore_index=NO_NAME, reduction="none")
            wrong = wrong.view_as(answer)
            total = total + wrong[thing].mean() + wrong[~thing].mean()
            right &= (logits.argmax(-1) == answer) | (answer == NO_NAME)
        center = feature_map.points.flatten(2).transpose(1, 2)[thing] + model.object_center(features[thing])
        gap = center - batch["shown_center"].flatten(2).transpose(1, 2)[thing]
        centers = F.smooth_l1_loss(gap / model.config.space.near, torch.zeros_like(gap), beta=0.05)
        report = {"cells right": float(right[thing].float().mean()),
                  "background right": float(right[~thing].float().mean()),
                  "centers cm": 100 * float(gap.detach().norm(dim=1).mean())}  # fmt: skip
        return {"cells": total, "centers": centers}, report


class Words(torch.nn.Module):
    """Training only: what is asked for, read off the queries and summaries alone. Sentences cost far less than images.

    It says the appearance and category of each step's target and reference, and the step's relation, else its verb.
    """

    def __init__(self, model: VlaPolicy, grounding: Grounding) -> None:
        super().__init__()
        self.name, self.names = NameReader(model, grounding), Names(grounding)
        self.verbs = {verb: index for index, verb in enumerate(grounding.verbs)}
        self.verb = torch.nn.Linear(model.config.language.d_model, len(self.verbs))

    def loss(self, model: VlaPolicy, sentences: list[Sentence], asked: Instruction | None = None
             ) -> tuple[Tensor, float]:  # fmt: skip
        """Mean cross entropy over the steps of sentences, and the share of steps with all of it right."""
        asked = asked or understand(model, [text for text, _ in sentences])
        rows, total, right = [], [], []
        for row, (_, steps) in enumerate(sentences):
            rows += [(row, at, step) for at, step in enumerate(steps)]
        row, at = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
        for role in range(2):
            names = [(step.target, step.reference)[role] for _, _, step in rows]
            said = self.name(asked.queries[row, at, role])
            for logits, answer in zip(said, torch.tensor([self.names.of(n) for n in names]).T, strict=True):
                total.append(F.cross_entropy(logits, answer))
                right.append(logits.argmax(1) == answer)
        answer = torch.tensor([self.verbs[step.relation or step.verb] for _, _, step in rows])
        logits = self.verb(asked.summary[row, at])
        total.append(F.cross_entropy(logits, answer))
        right.append(logits.argmax(1) == answer)
        return torch.stack(total).sum(), float(torch.stack(right).all(0).float().mean())


class Spots(NamedTuple):
    """Made-up places of the references that sentences name, and where the targets would go: geometry without images."""

    row: Tensor  # (N,) which sentence
    step: Tensor  # (N,) which step of it
    reference: Tensor  # (N, SPOTS, 3) m in base
    place_position: Tensor  # (N, SPOTS, 3) m in base


def spots(sentences: list[Sentence], grounding: Grounding, rng: np.random.Generator) -> Spots:
    """References anywhere they could be."""
    found = []
    for row, (_, steps) in enumerate(sentences):
        for at, step in enumerate(steps):
            if step.reference:
                places = [grounding.reference_position(step, rng) for _ in range(SPOTS)]
                found.append((row, at, places, [grounding.place_position(step, there) for there in places]))
    row, at, reference, place = zip(*found, strict=True) if found else ((),) * 4
    shape = (len(row), SPOTS, 3)
    references, places = (torch.tensor(np.array(v), dtype=torch.float32).reshape(shape) for v in (reference, place))
    return Spots(torch.tensor(row, dtype=torch.long), torch.tensor(at, dtype=torch.long), references, places)


def where(model: VlaPolicy, asked: Instruction, spots: Spots) -> tuple[Tensor, float]:
    """How far `VlaPolicy.place_position` is off, as a loss and in cm."""
    if not len(spots.row):
        return asked.summary.sum() * 0, 0.0
    summary = asked.summary[spots.row, spots.step].unsqueeze(1).expand(-1, SPOTS, -1)
    gap = model.place_position(spots.reference, summary) - spots.place_position
    loss = F.smooth_l1_loss(gap / model.config.space.near, torch.zeros_like(gap), beta=0.05)
    return loss, 100 * float(gap.detach().norm(dim=-1).mean())


def sentences(grounding: Grounding, rng: np.random.Generator, count: int) -> list[Sentence]:
    """Sentences about scenes that are nowhere drawn, each asking for something."""
    found: list[Sentence] = []
    while len(found) < count:
        sentence = grounding.imagined(rng)
        if sentence.steps:
            found.append(sentence)
    return found

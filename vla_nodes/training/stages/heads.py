"""One small part of stage 1 learnt anew, by itself: what it goes by is worked out once and then gone over many times.

    placement_head    where does it go? From the words and made-up places of the reference, without images.
    feasibility_head  is all of it there and possible? From what the eyes found in the pictures.

To look costs a thousand times what such a part costs. Its examples are therefore made first, in files beside the run:
a run that was stopped goes on with the next file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_nodes.datasets.episode import DataError
from vla_nodes.envs import base as envs
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.progress import progress
from vla_nodes.training import losses_grounding, token_cache
from vla_nodes.training import state as states
from vla_nodes.training.config import HeadSettings
from vla_nodes.training.grounding_data import FrameSampler
from vla_nodes.training.trainer import Terms

IMAGES, QUESTIONS = 100, 10  # of each image, in one file of the feasibility head's
BATCH = 10  # images looked at together
SENTENCES = 100  # in one file of the placement head's
SOFT = 0.01  # what a label may be wrong by
NOISE = {"feasibility_head": 0.05, "placement_head": 0.01}  # of the inputs' spread


class Examples(NamedTuple):
    """What a part goes by, and the right answer."""

    inputs: Tensor  # (N, D)
    answers: Tensor  # (N, 1) 0 or 1 for feasibility, (N, 3) in units of the space's `near` for the placement


class Job(NamedTuple):
    """One file of examples."""

    stage: str
    env: str
    data: tuple[Path, ...]
    every: int
    held: bool
    seed: int
    depth: bool
    target: Path
    fingerprint: str


@lru_cache(maxsize=2)
def _sampler(env: str, data: tuple[Path, ...], held: bool, every: int) -> FrameSampler:
    return FrameSampler(data, envs.grounding(env), held_out=held, every=every)


def placed(model: VlaPolicy, job: Job, rng: np.random.Generator) -> Examples:
    """Sentences, and where the targets would go that they name."""
    grounding = envs.grounding(job.env)
    said = losses_grounding.sentences(grounding, rng, SENTENCES)
    spots = losses_grounding.spots(said, grounding, rng)
    asked = losses_grounding.understand(model, [text for text, _ in said])
    summary = asked.summary[spots.row, spots.step].unsqueeze(1).expand(-1, losses_grounding.SPOTS, -1)
    inputs = model.placement_input(spots.reference, summary).flatten(0, 1)
    return Examples(inputs, ((spots.place_position - spots.reference) / model.config.space.near).flatten(0, 1))


def judged(model: VlaPolicy, job: Job, rng: np.random.Generator) -> Examples:
    """Pictures and questions about them; those about something hidden are left out."""
    sampler, found = _sampler(job.env, job.data, job.held, job.every), []
    for _ in range(IMAGES // BATCH):
        frames = [frame for _ in range(BATCH) for frame in sampler.questions(rng, QUESTIONS)]
        batch = losses_grounding.collate(frames, None if job.held else rng, QUESTIONS, job.depth)
        view, scan, prepared, _ = losses_grounding.asked(model, batch)
        counted = ~losses_grounding.hidden(batch)
        evidence = model.evidence(scan, view.points, prepared.summary)
        found.append(Examples(evidence[counted], batch["grounded"][counted, None]))
    return Examples(*map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def _make(model: VlaPolicy, job: Job) -> None:
    rng = np.random.default_rng([job.seed, job.held, 5])
    examples = (judged if job.stage == "feasibility_head" else placed)(model, job, rng)
    states.write(job.target, {k: v.half() for k, v in examples._asdict().items()}, {"eyes": job.fingerprint})


def examples(model: VlaPolicy, settings: HeadSettings, held: bool) -> Examples:
    """All of a run's, made where they are missing or of other eyes."""
    eyes = token_cache.made_by(model, settings.seed, settings.depth)
    asks = settings.stage == "feasibility_head"
    if asks and not _sampler(settings.env, settings.data, held, settings.held_out).paths:
        raise DataError(f"{', '.join(map(str, settings.data))}: no episode to ask about"
                        + " that is held out for measuring" * held)  # fmt: skip
    count = max(1, settings.examples // settings.held_out) if held else settings.examples
    folder = settings.out / "examples"
    jobs = [Job(settings.stage, settings.env, settings.data, settings.held_out, held, settings.seed + k, settings.depth,
                folder / f"{'held_' * held}{k:04d}.safetensors", eyes) for k in range(count)]  # fmt: skip
    missing = [job for job in jobs if not job.target.exists() or states.read_header(job.target).get("eyes") != eyes]
    with token_cache.answers(_make, model, missing, settings.example_workers) as made:
        for _ in progress(made, total=len(missing), unit="files", label=f"examples in {folder}", show=bool(missing)):
            pass
    parts = [states.read(job.target)[0] for job in jobs]
    return Examples(*(torch.cat([part[name] for part in parts]).float() for name in Examples._fields))


class Objective(nn.Module):
    """The part, behind inputs that are brought to one spread."""

    def __init__(self, stage: str, part: nn.Module, inputs: Tensor, near: float, start: float) -> None:
        super().__init__()
        self.stage, self.part = stage, part
        self.near, self.start = near, start  # m; probability from which the policy starts
        self.register_buffer("mean", inputs.mean(0))
        self.register_buffer("spread", inputs.std(0) + 1e-3)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Terms:
        inputs, answers, noise = batch
        said = self.part((inputs - self.mean) / self.spread + noise)
        if self.stage == "feasibility_head":
            loss = F.binary_cross_entropy_with_logits(said, answers * (1 - 2 * SOFT) + SOFT)
            yes, sure = answers > 0, said.detach().sigmoid() > self.start
            report = {"yes right": _share(sure[yes]), "no right": _share(~sure[~yes])}
        else:
            loss = F.smooth_l1_loss(said, answers, beta=0.05)
            gap = 100 * self.near * (said.detach() - answers).norm(dim=1)
            report = {"cm": float(gap.mean()), "within 3 cm": _share(gap < 3)}
        return loss, {}, report

    def folded(self) -> dict[str, Tensor]:
        """The part's weights for inputs as they come: layer 0 of each of its stacks takes its share of them."""
        firsts = {name: layer for name, layer in self.part.named_modules()
                  if isinstance(layer, nn.Linear) and name.split(".")[-1] == "0"}  # fmt: skip
        folded, sizes = self.part.state_dict(), [first.in_features for first in firsts.values()]
        spans = zip(firsts.items(), self.mean.split(sizes), self.spread.split(sizes), strict=True)
        for (name, first), mean, spread in spans:
            weight = first.weight / spread
            folded |= {f"{name}.weight": weight, f"{name}.bias": first.bias - weight @ mean}
        return folded


def _share(right: Tensor) -> float:
    return float(right.float().mean()) if right.numel() else 1.0


class HeadStage:
    """As the loop sees it."""

    def __init__(self, model: VlaPolicy, settings: HeadSettings, say: Callable[[str], None] = print) -> None:
        self.model, self.settings = model, settings
        model.eval().requires_grad_(False)
        self.held = examples(model, settings, held=True)
        self.training = examples(model, settings, held=False)
        part = model.get_submodule(settings.stage).requires_grad_(True)
        near, start = model.config.space.near, model.contract.thresholds.start
        self.objective = Objective(settings.stage, part, self.training.inputs, near, start)
        self.trained = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        self.data = {"examples": len(self.training.inputs), "held out": len(self.held.inputs)}
        say(f"{self.data['examples']} examples to learn from, {self.data['held out']} held out")

    def batch(self, step: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        seed = np.random.default_rng([self.settings.seed, step, rank, 3]).integers(2**62)
        random = torch.Generator().manual_seed(int(seed))
        rows = torch.randint(0, len(self.training.inputs), (self.settings.batch,), generator=random)
        inputs, answers = (part[rows] for part in self.training)
        return inputs, answers, NOISE[self.settings.stage] * torch.randn(inputs.shape, generator=random)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        device = self.model.token_type.device
        inputs, answers = (part.to(device) for part in self.held)
        loss, _, report = self.objective((inputs, answers, torch.zeros_like(inputs)))
        return {"loss": float(loss), **report}

    def weights(self) -> dict[str, Tensor]:
        part = {f"{self.settings.stage}.{name}": tensor for name, tensor in self.objective.folded().items()}
        return {**self.model.state_dict(), **part}

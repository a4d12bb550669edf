"""Stage 1 as the loop sees it: which weights learn, from which frames, and how well it grounds held-out scenes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_nodes.envs import base as envs
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.training import losses_grounding
from vla_nodes.training.config import GroundingSettings, SettingsError
from vla_nodes.training.grounding_data import FrameSampler
from vla_nodes.training.trainer import Terms, to_device


class Objective(nn.Module):
    """The model, and the training-only readers of its queries and its map, behind one call."""

    def __init__(self, model: VlaPolicy, settings: GroundingSettings, grounding: envs.Grounding) -> None:
        super().__init__()
        self.model = model
        self.words = losses_grounding.Words(model, grounding) if settings.questions else None
        self.cells = losses_grounding.Cells(model, grounding)
        unknown = set(settings.weights) - set(losses_grounding.WEIGHTS)
        if unknown:
            raise SettingsError(
                f"weights: no loss term {sorted(unknown)[0]}; there are {', '.join(losses_grounding.WEIGHTS)}"
            )
        self.factors = {
            name: weight * settings.weights.get(name, 1.0) for name, weight in losses_grounding.WEIGHTS.items()
        }

    def forward(self, batch: tuple[dict, list, losses_grounding.Spots | None]) -> Terms:
        frames, said, spots = batch
        terms, report = self.answers(frames)
        if spots is not None:
            asked = losses_grounding.understand(self.model, [text for text, _ in said])
            terms["where"], report["where cm"] = losses_grounding.where(self.model, asked, spots)
            terms["words"], report["words right"] = self.words.loss(self.model, said, asked)
        return sum(self.factors[name] * term for name, term in terms.items()), terms, report

    def answers(self, frames: dict) -> tuple[dict[str, Tensor], dict[str, float]]:
        """On the images of a batch, and on what is asked of them, if anything."""
        if "text" in frames:
            return losses_grounding.losses(self.model, frames, self.cells)
        (feature_map,) = self.model.vision.feature_maps(losses_grounding.images(frames))
        return self.cells.loss(self.model, feature_map, frames)


class GroundingStage:
    """Vision and queries on single frames; the language encoder stays as it was distilled."""

    def __init__(self, model: VlaPolicy, settings: GroundingSettings) -> None:
        self.model, self.settings, self.grounding = model, settings, envs.grounding(settings.env)
        model.vision.encoder.to(memory_format=torch.channels_last)
        parts = losses_grounding.TRAINED if settings.questions else losses_grounding.SEEING
        if unknown := sorted(set(settings.frozen) - set(parts)):
            raise SettingsError(f"frozen: {unknown[0]} does not learn here; what does: {', '.join(parts)}")
        self.parts = [name for name in parts if name not in settings.frozen]
        model.requires_grad_(False)
        for name in self.parts:
            model.get_submodule(name).requires_grad_(True)
        self.objective = Objective(model, settings, self.grounding)
        self._mode()
        self.trained = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        self.frames = FrameSampler(settings.data, self.grounding, every=settings.held_out)
        self.held = FrameSampler(settings.data, self.grounding, held_out=True, every=settings.held_out)
        self.data = {"episodes": len(self.frames.paths), "held out": len(self.held.paths)}

    def _mode(self) -> None:
        self.objective.train()
        self.model.language.eval()

    def _collate(self, frames: list, rng: np.random.Generator | None, questions: int = 1) -> dict[str, Any]:
        batch = losses_grounding.collate(frames, rng, max(1, questions), self.settings.depth)
        if not questions:
            batch = {name: batch[name] for name in losses_grounding.IMAGES}
        return batch

    def batch(self, step: int, rank: int) -> tuple[dict, list, losses_grounding.Spots | None]:
        rng = np.random.default_rng([self.settings.seed, step, rank, 1])
        count = self.settings.questions
        asked = [frame for _ in range(self.settings.batch) for frame in self.frames.questions(rng, max(1, count))]
        frames = self._collate(asked, rng, count)
        if self.objective.words is None:
            return frames, [], None
        said = losses_grounding.sentences(self.grounding, rng, 2 * self.settings.batch)
        return frames, said, losses_grounding.spots(said, self.grounding, rng)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Accuracy on held-out episodes, the same frames each time."""
        if not self.held.paths:
            return {}
        self.objective.eval()
        rng, device = np.random.default_rng(7), self.model.token_type.device
        found = []
        for _ in range(self.settings.measure_batches):
            batch = self._collate([self.held.draw(rng) for _ in range(32)], None, min(1, self.settings.questions))
            found.append(self.objective.answers(to_device(batch, device))[1])
        self._mode()
        return {key: float(np.mean([row[key] for row in found])) for key in found[0]}

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()

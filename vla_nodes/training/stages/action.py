"""Stage 2 as the loop sees it: windows of cached episodes, some of which continue from the state of the ticks before.

Truncated backpropagation through time: the ticks before a window pass through the core without gradient, and the window
begins with the state they leave. It is made with the weights of the moment, so it is never stale, nothing of it has to
outlive the step, and the batch of a step still follows from its number alone. The other windows begin with an empty
state at a random tick (state dropout), so that the policy does not lean on a past it may not have.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vla_nodes.datasets.episode import DataError
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.training import losses_action
from vla_nodes.training import token_cache as caching
from vla_nodes.training.config import ActionSettings, SettingsError
from vla_nodes.training.examples import number
from vla_nodes.training.trainer import Terms, to_device

Tokens = dict[str, Tensor]
MEASURED = 16  # windows at a time


def split(batch: Tokens, before: int) -> tuple[Tokens, Tokens]:
    """The first ticks of every window, and the rest."""
    return {k: v[:, :before] for k, v in batch.items()}, {k: v[:, before:] for k, v in batch.items()}


@torch.no_grad()
def carried(model: VlaPolicy, batch: Tokens) -> tuple:
    """The state that these ticks leave behind, detached."""
    view, own = losses_action.view_of(batch), losses_action.state_of(model, batch)
    _, state = model(own, view, batch["summary"], None)
    torch.clear_autocast_cache()  # or the window would meet weights cast without gradient
    return state


class Objective(nn.Module):
    def __init__(self, model: VlaPolicy, settings: ActionSettings) -> None:
        super().__init__()
        self.model, self.factors = model, settings.weights

    def forward(self, batch: tuple[Tokens, int]) -> Terms:
        tokens, before = batch
        past, window = split(tokens, before)
        terms, report = losses_action.losses(self.model, window, carried(self.model, past) if before else None)
        unknown = set(self.factors) - set(terms)
        if unknown:
            raise SettingsError(f"weights: no loss term {sorted(unknown)[0]}; there are {', '.join(terms)}")
        return sum(self.factors.get(name, 1.0) * term for name, term in terms.items()), terms, report


class ActionStage:
    """The core and the head, on what the frozen eyes of stage 1 saw."""

    def __init__(self, model: VlaPolicy, settings: ActionSettings, paths: list[Path], say=print) -> None:
        self.model, self.settings = model, settings
        model.eval().requires_grad_(False)
        for name in losses_action.TRAINED:
            getattr(model, name).requires_grad_(True)
        self.objective = Objective(model, settings)
        self.trained = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        self.model.train()
        frozen = [p for p in paths if number(p) % settings.held_out == 0]
        self.held = [self._tokens(p) for p in frozen]
        self.training = [self._tokens(p) for p in paths if p not in set(frozen)]
        if not self.training:
            raise DataError(f"{', '.join(map(str, settings.data))}: no usable episode to learn from")
        ticks = sum(len(t["actions"]) for t in self.training)
        self.data = {"episodes": len(self.training), "held out": len(self.held), "ticks": ticks}
        say(f"{len(self.training)} episodes to learn from, {len(self.held)} held out, {ticks} ticks")
        for label, known in (("primitive", lambda t: (t["primitive"] >= 0).any()),
                             ("done", lambda t: torch.isfinite(t["done"]).any())):  # fmt: skip
            if lacking := sum(not known(t) for t in self.training):
                say(f"{lacking} of {len(self.training)} episodes have no {label} labels: they teach nothing about that")

    @torch.no_grad()
    def _tokens(self, path: Path) -> Tokens:
        """Cached tokens, their place positions as this model has them."""
        tokens = caching.load(path)
        place = self.model.place_position(tokens["view_points"][:, 1], tokens["summary"][0, tokens["step"]])
        return {**tokens, "view_place_position": place}

    def batch(self, step: int, rank: int) -> tuple[Tokens, int]:
        settings = self.settings
        rng = np.random.default_rng([settings.seed, step, rank, 2])
        before, pool = 0, self.training
        if rng.random() >= settings.state_dropout:
            before = int(rng.integers(settings.carried[0], settings.carried[-1] + 1))
            pool = [t for t in self.training if len(t["actions"]) > before + settings.window_ticks // 4]
            if not pool:  # no episode is so long
                before, pool = 0, self.training
        chosen = [pool[i] for i in rng.integers(0, len(pool), settings.batch)]
        windows = [losses_action.window(tokens, settings.window_ticks, rng, before) for tokens in chosen]
        rows = losses_action.stack(windows)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return losses_action.noisy(losses_action.mistaken(rows, generator), generator), before

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """On held-out episodes, the same windows each time."""
        if not self.held:
            return {}
        self.model.eval()
        rng, device, found = np.random.default_rng(0), self.model.token_type.device, []
        for start in range(0, len(self.held), MEASURED):
            some = self.held[start : start + MEASURED]
            rows = to_device(
                losses_action.stack([losses_action.window(t, self.settings.window_ticks, rng) for t in some]), device
            )
            terms, report = losses_action.losses(self.model, rows)
            found.append({"loss": float(sum(terms.values())), **report})
        self.model.train()
        return {key: float(np.mean([row[key] for row in found])) for key in found[0]}

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()

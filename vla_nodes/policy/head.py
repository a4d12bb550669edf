"""What is read off at the end: from the core's last token a chunk of actions, the primitive a person can read and
whether the step is done; from what the eyes found, whether all of it is there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_nodes.policy.configuration import PRIMITIVES, PolicyConfig


class ChunkHead(nn.Module):
    """One pass regresses the whole chunk: a trunk shared by all primitives, and a light part of each.

    The parts are mixed by the predicted primitive probabilities, so a moment between two primitives gets a blend.
    """

    def __init__(self, config: PolicyConfig, geometry: int, rank: int = 32) -> None:
        super().__init__()
        self.horizon, self.action_dim = config.horizon, config.action_dim
        width, outputs = config.head_width, config.horizon * config.action_dim
        self.trunk = nn.Sequential(
            nn.Linear(config.d_model + geometry, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU())  # fmt: skip
        self.primitive = nn.Linear(width, len(PRIMITIVES))
        self.done = nn.Linear(width, 1)
        self.shared = nn.Linear(width, outputs)
        self.narrow = nn.Linear(width, rank)
        self.parts = nn.Parameter(torch.randn(len(PRIMITIVES), rank, outputs) * 0.02)

    def forward(self, core: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """core (..., D), geometry (..., G) -> actions (..., H, A), logits of primitives (..., P), of done (...)."""
        hidden = self.trunk(torch.cat([core, geometry], -1))
        logits = self.primitive(hidden)
        parts = torch.einsum("...p,...r,pro->...o", logits.softmax(-1), self.narrow(hidden), self.parts)
        actions = (self.shared(hidden) + parts).unflatten(-1, (self.horizon, self.action_dim))
        return actions, logits, self.done(hidden).squeeze(-1)


class Judge(nn.Module):
    """Whether all of it is there and can be done: as doubtful as the most doubtful of its parts (a soft minimum).

    The look and the shape of the thing and of the goal are each compared with what was asked for without knowing the
    others. A colour and a kind that never stood together are then judged like any others.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.sizes = (*(3 * config.half_width,) * 4, 2 * 4 + config.language.d_model)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 64), nn.SiLU(), nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 1))
            for size in self.sizes
        )

    def forward(self, evidence: Tensor) -> Tensor:
        """(..., J), see `VlaPolicy.evidence`, to a logit (..., 1)."""
        logits = [part(seen) for part, seen in zip(self.parts, evidence.split(self.sizes, -1), strict=True)]
        return -torch.logsumexp(-torch.cat(logits, -1), -1, keepdim=True)

"""Stage 2: learning to act. The core and the head learn action chunks from cached visual tokens.

Losses: L1 on the rows (velocity), LAMBDA_ACC times L1 on their differences (acceleration; AnoleVLA, arXiv 2603.15046),
L1 on where the rows lead, the gripper and the primitive. The history starts at a random tick with an empty state, so
the policy cannot lean on a past it may not have.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vla_nodes.policy.modeling import MOVE_SCALE, Proprioception, VisualTokens, VlaPolicy

TRAINED = ("embed_state", "embed_change", "embed_tool", "embed_view", "embed_summary", "kind", "core", "head")
LAMBDA_ACC = 0.25
MISTAKEN, FAINT = 0.3, 0.6  # share of windows in which a role is lost for a while; most of its mass that is left
SURE, LONGEST = 3, 40  # ticks of a window before that, and most of it


def window(tokens: dict[str, Tensor], length: int, rng: np.random.Generator, before: int = 0) -> dict[str, Tensor]:
    """``length`` ticks of one episode behind ``before`` others of it; shorter ones are padded with weight 0."""
    count = len(tokens["state"])
    if before:
        start = int(rng.integers(0, max(1, count - before - length // 2)))
    else:
        start = int(rng.integers(0, max(1, count - length // 2))) if rng.random() < 0.6 else 0
    length += before
    cut = {k: v[start : start + length] for k, v in tokens.items() if k != "summary"}
    used = len(cut["state"])
    cut = {k: F.pad(v, [0, 0] * (v.dim() - 1) + [0, length - used]) for k, v in cut.items()}
    weight = torch.zeros(length)
    weight[:used] = 1.0
    phrasing = tokens["summary"][rng.integers(len(tokens["summary"]))]  # (K, W)
    return {**cut, "weight": weight, "summary": phrasing[cut["step"]]}


def noisy(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """What the cached tokens lack: small errors of localisation, features and proprioception."""

    def jitter(value: Tensor, size: float) -> Tensor:
        return value + size * torch.randn(value.shape, generator=generator)

    return {**batch, "view_points": jitter(batch["view_points"], 0.002), "view_aim": jitter(batch["view_aim"], 0.002),
            "view_features": jitter(batch["view_features"], 0.02), "view_tool": jitter(batch["view_tool"], 0.02),
            "state": jitter(batch["state"], 0.003),
            "change": jitter(batch["change"], 0.02)}  # fmt: skip


def mistaken(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """In some windows the thing or the goal is lost from sight for a while, and faintly something else taken for it.

    So it goes where the hand hides it. What else it may be is what another window's role sees.
    """

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    rows, ticks, roles = batch["view_mass"].shape
    first = SURE + random(rows, 1) * (ticks - SURE)
    tick = torch.arange(ticks).expand(rows, -1)
    lost = (tick >= first) & (tick < first + LONGEST * random(rows, 1)) & (random(rows, 1) < MISTAKEN)
    role = torch.randint(0, 2, (rows, 1, 1), generator=generator)
    lost = lost.unsqueeze(-1) & (role == torch.arange(roles))  # (B, T, R)
    other, faint = torch.randperm(rows, generator=generator), FAINT * random(rows, 1, 1)

    def instead(name: str, factor: Tensor | float = 1.0) -> Tensor:
        value = batch[name]
        where = lost.view(*lost.shape, *[1] * (value.dim() - 3)) if name != "view_aim" else lost[:, :, 1:2]
        return torch.where(where, factor * value[other], value)

    return {**batch, "view_mass": instead("view_mass", faint), "view_points": instead("view_points"),
            "view_features": instead("view_features", faint.unsqueeze(-1)), "view_spread": instead("view_spread"),
            "view_aim": instead("view_aim")}  # fmt: skip


def losses(model: VlaPolicy, batch: dict[str, Tensor], state: tuple | None = None
           ) -> tuple[dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """Terms, and what a person wants to know. Ticks with primitive -1 or done NaN lack that label and do not count."""
    view = VisualTokens(*(batch[f"view_{name}"] for name in VisualTokens._fields))
    out, _ = model.think(Proprioception(batch["state"], batch["change"]), view, batch["summary"], state)
    weight = batch["weight"] / batch["weight"].sum()
    wanted, moves = batch["actions"], out.actions[..., :6]
    gap = (moves - wanted[..., :6]).abs()
    bend = (moves.diff(dim=-2) - wanted[..., :6].diff(dim=-2)).abs()
    lead = (moves[..., :3].cumsum(-2) - wanted[..., :3].cumsum(-2)).abs()
    grip = F.binary_cross_entropy_with_logits(out.actions[..., 6], wanted[..., 6].clamp(0, 1), reduction="none")
    named = F.cross_entropy(out.primitive.flatten(0, 1), batch["primitive"].flatten(), reduction="none",
                            ignore_index=-1).view_as(weight)  # fmt: skip
    ended = batch["done"].nan_to_num(0.0)
    done = F.binary_cross_entropy_with_logits(out.done, ended, reduction="none")
    labelled = (batch["weight"] * (batch["primitive"] >= 0), batch["weight"] * batch["done"].isfinite())
    of_named, of_done = (share / share.sum().clamp(min=1) for share in labelled)
    terms = {
        "velocity": (gap.mean((-1, -2)) * weight).sum(),
        "acceleration": LAMBDA_ACC * (bend.mean((-1, -2)) * weight).sum(),
        "lead": 0.15 * (lead.mean((-1, -2)) * weight).sum(),
        "gripper": 0.5 * (grip.mean(-1) * weight).sum(),
        "primitive": 0.1 * (named * of_named).sum(),
        "done": 0.2 * (done * of_done).sum(),
    }
    with torch.no_grad():
        right = (out.primitive.argmax(-1) == batch["primitive"]).float()
        agree = ((out.actions[..., 6] > 0) == (wanted[..., 6] > 0.5)).float().mean(-1)
        end = 1e3 * MOVE_SCALE * (moves[..., :3].sum(-2) - wanted[..., :3].sum(-2)).norm(dim=-1)
        report = {"end mm": float((end * weight).sum()), "primitive right": float((right * of_named).sum()),
                  "gripper right": float((agree * weight).sum()),
                  "done right": float((((out.done > 0).float() == ended).float() * of_done).sum())}  # fmt: skip
    return terms, report


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

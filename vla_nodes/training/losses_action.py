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

from vla_nodes.policy.modeling import VisualTokens, VlaPolicy

TRAINED = ("embed_state", "embed_tool", "embed_image", "embed_instruction", "token_type", "core", "head")
LAMBDA_ACC = 0.25
MISTAKEN, FAINT = 0.3, 0.6  # share of windows in which a role is lost for a while; most of its visibility that is left
STATE_NOISE = {"state_position": 0.003, "state_velocity": 0.02}  # of what proprioception measures, normalised
SURE, LONGEST = 3, 40  # ticks of a window before that, and most of it


def window(tokens: dict[str, Tensor], length: int, rng: np.random.Generator, before: int = 0) -> dict[str, Tensor]:
    """``length`` ticks of one episode behind ``before`` others of it; shorter ones are padded with weight 0."""
    count = len(tokens["actions"])
    if before:
        start = int(rng.integers(0, max(1, count - before - length // 2)))
    else:
        start = int(rng.integers(0, max(1, count - length // 2))) if rng.random() < 0.6 else 0
    length += before
    cut = {k: v[start : start + length] for k, v in tokens.items() if k != "summary"}
    used = len(cut["actions"])
    cut = {k: F.pad(v, [0, 0] * (v.dim() - 1) + [0, length - used]) for k, v in cut.items()}
    weight = torch.zeros(length)
    weight[:used] = 1.0
    phrasing = tokens["summary"][rng.integers(len(tokens["summary"]))]  # (K, W)
    return {**cut, "weight": weight, "summary": phrasing[cut["step"]]}


def noisy(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """What the cached tokens lack: small errors of localisation, features and proprioception."""

    def jitter(value: Tensor, size: float) -> Tensor:
        return value + size * torch.randn(value.shape, generator=generator)

    return {**batch, "view_points": jitter(batch["view_points"], 0.002),
            "view_place_position": jitter(batch["view_place_position"], 0.002),
            "view_features": jitter(batch["view_features"], 0.02), "view_tool": jitter(batch["view_tool"], 0.02),
            **{name: jitter(batch[name], STATE_NOISE.get(name, 0.01))
               for name in sorted(batch) if name.startswith("state_")}}  # fmt: skip


def mistaken(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """In some windows the thing or the goal is lost from sight for a while, and faintly something else taken for it.

    So it goes where the hand hides it. What else it may be is what another window's role sees.
    """

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    rows, ticks, roles = batch["view_visibility"].shape
    first = SURE + random(rows, 1) * (ticks - SURE)
    tick = torch.arange(ticks).expand(rows, -1)
    lost = (tick >= first) & (tick < first + LONGEST * random(rows, 1)) & (random(rows, 1) < MISTAKEN)
    role = torch.randint(0, 2, (rows, 1, 1), generator=generator)
    lost = lost.unsqueeze(-1) & (role == torch.arange(roles))  # (B, T, R)
    other, faint = torch.randperm(rows, generator=generator), FAINT * random(rows, 1, 1)

    def instead(name: str, factor: Tensor | float = 1.0) -> Tensor:
        value = batch[name]
        where = lost.view(*lost.shape, *[1] * (value.dim() - 3)) if name != "view_place_position" else lost[:, :, 1:2]
        return torch.where(where, factor * value[other], value)

    return {**batch, "view_visibility": instead("view_visibility", faint), "view_points": instead("view_points"),
            "view_features": instead("view_features", faint.unsqueeze(-1)),
            "view_attention_std": instead("view_attention_std"),
            "view_place_position": instead("view_place_position")}  # fmt: skip


def view_of(batch: dict[str, Tensor]) -> VisualTokens:
    """The visual tokens of a batch of cached ones."""
    return VisualTokens(**{name: batch[f"view_{name}"] for name in VisualTokens._fields if f"view_{name}" in batch})


def state_of(model: VlaPolicy, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state tokens of a batch of cached ones."""
    return {token: batch[f"state_{token}"] for token in model.layout.sizes}


def losses(model: VlaPolicy, batch: dict[str, Tensor], state: tuple | None = None
           ) -> tuple[dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """Terms, and what a person wants to know. Ticks with primitive -1 or done NaN lack that label and do not count."""
    view = view_of(batch)
    out, _ = model(state_of(model, batch), view, batch["summary"], state)
    weight = batch["weight"] / batch["weight"].sum()
    columns, wanted = model.contract.actions, batch["actions"]
    motion, grippers = list(columns.motion_columns), list(columns.gripper_columns)
    gap = out.actions[..., motion] - wanted[..., motion]  # (B, T, H, motion)
    terms = {
        "velocity": (gap.abs().mean((-1, -2)) * weight).sum(),
        "acceleration": LAMBDA_ACC * (gap.diff(dim=-2).abs().mean((-1, -2)) * weight).sum(),
    }
    places = gap[..., : 3 if columns.space.startswith("ee_") else None]  # of the tool, or of every joint
    ahead = places.cumsum(-2) if columns.space.endswith("delta") else places
    if columns.space.endswith("delta"):
        terms["lead"] = 0.15 * (ahead.abs().mean((-1, -2)) * weight).sum()
    with torch.no_grad():
        scale = ahead.new_tensor([columns.scale[i] for i in motion][: ahead.shape[-1]])
        unit = "mm" if columns.space.startswith("ee_") else "mrad"
        report = {f"end {unit}": float(((1e3 * scale * ahead[..., -1, :]).norm(dim=-1) * weight).sum())}
    if grippers:
        grip = F.binary_cross_entropy_with_logits(
            out.actions[..., grippers], wanted[..., grippers].clamp(0, 1), reduction="none")  # fmt: skip
        terms["gripper"] = 0.5 * (grip.mean((-1, -2)) * weight).sum()
        agree = ((out.actions[..., grippers] > 0) == (wanted[..., grippers] > 0.5)).float().mean((-1, -2))
        report["gripper right"] = float((agree * weight).sum())
    if out.primitive is not None and out.done is not None:
        more, seen = _labelled(out.primitive, out.done, batch)
        terms, report = {**terms, **more}, {**report, **seen}
    return terms, report


def _labelled(primitive: Tensor, done: Tensor, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What only labelled ticks teach: the primitive, and when a step is done."""
    named = F.cross_entropy(primitive.flatten(0, 1), batch["primitive"].flatten(), reduction="none",
                            ignore_index=-1).view_as(batch["weight"])  # fmt: skip
    ended = batch["done"].nan_to_num(0.0)
    wrong = F.binary_cross_entropy_with_logits(done, ended, reduction="none")
    labelled = (batch["weight"] * (batch["primitive"] >= 0), batch["weight"] * batch["done"].isfinite())
    of_named, of_done = (share / share.sum().clamp(min=1) for share in labelled)
    right = (primitive.argmax(-1) == batch["primitive"]).float()
    report = {"primitive right": float((right * of_named).sum()),
              "done right": float((((done > 0).float() == ended).float() * of_done).sum())}  # fmt: skip
    return {"primitive": 0.1 * (named * of_named).sum(), "done": 0.2 * (wrong * of_done).sum()}, report


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

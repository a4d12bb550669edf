"""Stage 2: learning to act. The core and the head learn action chunks from cached visual tokens.

Losses: L1 on the rows (velocity), LAMBDA_ACC times L1 on their differences (acceleration; AnoleVLA, arXiv 2603.15046),
L1 on where the rows lead, the gripper and the primitive. The history starts at a random tick with an empty state, so
the policy cannot lean on a past it may not have.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from vla_nodes.policy.config import preset
from vla_nodes.policy.language import InstructionEncoder
from vla_nodes.policy.model import Proprioception, VisualTokens, VlaPolicy
from vla_nodes.train import cache as caching
from vla_nodes.train.ground import TRAINED as GROUNDED
from vla_nodes.train.ground import line, save

TRAINED = ("embed_state", "embed_change", "embed_tool", "embed_view", "embed_summary", "kind", "core", "head")
LAMBDA_ACC = 0.25


def window(tokens: dict[str, Tensor], length: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """``length`` ticks of one episode; shorter ones are padded with weight 0."""
    count = len(tokens["state"])
    start = int(rng.integers(0, max(1, count - length // 2))) if rng.random() < 0.6 else 0
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


def losses(model: VlaPolicy, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    view = VisualTokens(*(batch[f"view_{name}"] for name in VisualTokens._fields))
    out, _ = model.think(Proprioception(batch["state"], batch["change"]), view, batch["summary"], None)
    weight = batch["weight"] / batch["weight"].sum()
    wanted, moves = batch["actions"], out.actions[..., :6]
    gap = (moves - wanted[..., :6]).abs()
    bend = (moves.diff(dim=-2) - wanted[..., :6].diff(dim=-2)).abs()
    lead = (moves[..., :3].cumsum(-2) - wanted[..., :3].cumsum(-2)).abs()
    grip = F.binary_cross_entropy_with_logits(out.actions[..., 6], wanted[..., 6].clamp(0, 1), reduction="none")
    named = F.cross_entropy(out.primitive.flatten(0, 1), batch["primitive"].flatten(), reduction="none").view_as(weight)
    done = F.binary_cross_entropy_with_logits(out.done, batch["done"], reduction="none")
    terms = {
        "velocity": (gap.mean((-1, -2)) * weight).sum(),
        "acceleration": LAMBDA_ACC * (bend.mean((-1, -2)) * weight).sum(),
        "lead": 0.15 * (lead.mean((-1, -2)) * weight).sum(),
        "gripper": 0.5 * (grip.mean(-1) * weight).sum(),
        "primitive": 0.1 * (named * weight).sum(),
        "done": 0.2 * (done * weight).sum(),
    }
    with torch.no_grad():
        right = (out.primitive.argmax(-1) == batch["primitive"]).float()
        agree = ((out.actions[..., 6] > 0) == (wanted[..., 6] > 0.5)).float().mean(-1)
        end = 16.0 * (moves[..., :3].sum(-2) - wanted[..., :3].sum(-2)).norm(dim=-1)
        report = {"end mm": float((end * weight).sum()), "primitive right": float((right * weight).sum()),
                  "gripper right": float((agree * weight).sum()),
                  "done right": float((((out.done > 0).float() == batch["done"]).float() * weight).sum())}  # fmt: skip
    return terms, report


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@torch.no_grad()
def measure(model: VlaPolicy, held: list[dict[str, Tensor]], length: int) -> dict[str, float]:
    model.eval()
    rng = np.random.default_rng(0)
    rows = [losses(model, stack([window(t, length, rng) for t in held[i : i + 16]])) for i in range(0, len(held), 16)]
    model.train()
    total = {"held-out loss": float(np.mean([float(sum(t.values())) for t, _ in rows]))}
    return {**total, **{k: float(np.mean([r[k] for _, r in rows])) for k in rows[0][1]}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_nodes act", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of episodes")
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder for visual tokens; empty it when the stage 1 weights change"
    )
    parser.add_argument("--language", type=Path, required=True)
    parser.add_argument(
        "--grounded", type=Path, required=True, help="stage 1 weights, taken for all that stage 1 trains"
    )
    parser.add_argument("--resume", type=Path, help="stage 2 weights to start from, taken for the rest")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mixer", choices=("mamba2", "mamba1", "attention"), default=None)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=48, help="ticks of history in a training window")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = VlaPolicy(preset("nano", args.mixer))
    if args.resume:
        model.load_state_dict(load_file(args.resume), strict=False)
    eyes = {k: v for k, v in load_file(args.grounded).items() if k.split(".")[0] in GROUNDED}
    model.load_state_dict(eyes, strict=False)
    model.language = InstructionEncoder.from_folder(args.language)
    model.eval().requires_grad_(False)
    paths = [p for folder in args.data for p in caching.fill(model, folder, args.cache / folder.name, args.seed)]
    held = [caching.load(p) for p in paths if int(p.stem) % 12 == 0]
    training = [caching.load(p) for p in paths if int(p.stem) % 12]
    print(
        f"{len(training)} episodes to learn from, {len(held)} held out, {sum(len(t['state']) for t in training)} ticks",
        flush=True,
    )
    parameters = []
    for name in TRAINED:
        part = getattr(model, name)
        found = [part] if isinstance(part, torch.nn.Parameter) else list(part.parameters())
        parameters += [p.requires_grad_(True) for p in found]
    optimiser = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.01, betas=(0.9, 0.95))
    average = [p.detach().clone() for p in parameters]
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    started, step, shown = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - started) / (60 * args.minutes)) < 1.0:
        for group in optimiser.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * share)))
        chosen = [training[i] for i in rng.integers(0, len(training), args.batch)]
        terms, report = losses(model, noisy(stack([window(t, args.length, rng) for t in chosen]), generator))
        total = sum(terms.values())
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        keep = min(0.995, step / (step + 20))
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.lerp_(parameter, 1 - keep)
        if time.monotonic() - started - shown > 60:
            shown = time.monotonic() - started
            print(
                f"{shown / 60:5.1f} min, step {step}: {line({k: v.item() for k, v in terms.items()})}, {line(report)}",
                flush=True,
            )
            if step and int(shown / 60) % 3 == 0 and held:
                with averaged(parameters, average):
                    print(f"          {line(measure(model, held, args.length))}", flush=True)
                    save(model, args.out)
    with averaged(parameters, average):
        if held:
            print(f"held out: {line(measure(model, held, args.length))}")
        save(model, args.out)
    return 0


class averaged:
    """Within it the parameters are their running averages, which drive an arm more steadily than the last step's."""

    def __init__(self, parameters: list, average: list[Tensor]) -> None:
        self.parameters, self.average = parameters, average

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()


if __name__ == "__main__":
    raise SystemExit(main())

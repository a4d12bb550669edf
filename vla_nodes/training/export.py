"""From training weights to a checkpoint folder a robot can load."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import click
import torch
from safetensors.torch import load_file

from vla_nodes import cli
from vla_nodes.policy import checkpoint
from vla_nodes.policy.configuration import preset
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.share import SHIPPED_CHECKPOINT, share_path, share_roots
from vla_nodes.training.losses_grounding import TRAINED as GROUNDED


def commit() -> str:
    """The commit the code was at, or "unknown" outside a checkout."""
    run = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=share_roots()[0], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def write(folder: Path, model: VlaPolicy, tokenizer: Path, provenance: dict, like: checkpoint.CheckpointConfig) -> None:
    """A checkpoint folder for the robot that ``like`` describes."""
    config = replace(like, policy=model.config, provenance={**provenance, "commit": commit()})
    checkpoint.save(folder, model, config, tokenizer, torch.bfloat16)


def export(args: cli.Options) -> None:
    """The command."""
    like = checkpoint.read_config(args.like or share_path(SHIPPED_CHECKPOINT))
    policy = preset("nano", args.mixer)
    policy = replace(policy, space=like.policy.space)
    model = VlaPolicy(policy, like.contract)
    weights = load_file(args.weights)
    if args.grounded:
        weights |= {k: v for k, v in load_file(args.grounded).items() if k.split(".")[0] in GROUNDED}
    model.load_state_dict(weights)
    write(args.out, model, args.language / "tokenizer.json", json.loads(args.provenance), like)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e6:.1f} MB")


command = cli.Command(
    "export",
    """
    A checkpoint folder that a robot can load, from training weights.
    """,
    export,
    cli.option("--weights", type=cli.Existing("file of weights"), metavar="FILE", required=True, help="of stage 2"),
    cli.option("--grounded", type=cli.Existing("file of weights"), metavar="FILE",
               help="stage 1 weights refined since, for that part"),
    cli.option("--language", type=cli.Existing("language folder", "tokenizer.json"), metavar="DIR", required=True,
               help="the instruction encoder, as `distill` wrote it"),
    cli.option("--like", type=cli.PATH, metavar="DIR", help="checkpoint of the same robot; without it the shipped one"),
    cli.out("folder for the checkpoint", required=True),
    cli.option("--mixer", type=click.Choice(("mamba2", "mamba1", "attention")), help="the core, if not the preset's"),
    cli.option("--provenance", metavar="JSON", default="{}", help="commands, data, hours, scores"),
    examples="""
    python -m vla_nodes export --weights work/action/weights.safetensors --language work/language --out work/nano
    """,
    errors=(OSError, ValueError, RuntimeError),  # RuntimeError: weights of another model
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

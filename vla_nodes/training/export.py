"""From training weights to a checkpoint folder a robot can load."""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from vla_nodes.envs.tabletop import mjcf
from vla_nodes.envs.tabletop.camera import MAX_RANGE
from vla_nodes.evaluation.collect import PERIOD, TICK
from vla_nodes.policy import checkpoint
from vla_nodes.policy.configuration import preset
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.share import share_roots
from vla_nodes.training.losses_grounding import TRAINED as GROUNDED


def commit() -> str:
    """The commit the code was at, or "unknown" outside a checkout."""
    run = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=share_roots()[0], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def write(folder: Path, model: VlaPolicy, tokenizer: Path, provenance: dict, depth: bool = True,
          like: checkpoint.CheckpointConfig | None = None) -> None:  # fmt: skip
    """A checkpoint folder for the simulated Panda, or for the robot of the checkpoint that ``like`` belongs to.

    Without ``depth`` no depth is valid, so the policy sees none.
    """
    config = like or checkpoint.CheckpointConfig(
        model.config, mjcf.ARM_JOINTS, mjcf.FINGER_JOINTS[0], "ee_delta", PERIOD, TICK, "camera",
        (0.1, MAX_RANGE) if depth else (0.0, 0.0))  # fmt: skip
    config = replace(config, policy=model.config, provenance={**provenance, "commit": commit()})
    checkpoint.save(folder, model, config, tokenizer, torch.bfloat16)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_nodes export", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="stage 2 weights")
    parser.add_argument("--grounded", type=Path, help="stage 1 weights refined since, for that part")
    parser.add_argument("--language", type=Path, required=True, help="folder with the student's tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mixer", choices=("mamba2", "mamba1", "attention"), default=None)
    parser.add_argument("--provenance", default="{}", help="JSON: commands, data, hours, scores")
    args = parser.parse_args(argv)
    policy = preset("nano", args.mixer)
    model = VlaPolicy(policy)
    weights = load_file(args.weights)
    if args.grounded:
        weights |= {k: v for k, v in load_file(args.grounded).items() if k.split(".")[0] in GROUNDED}
    model.load_state_dict(weights)
    write(args.out, model, args.language / "tokenizer.json", json.loads(args.provenance))
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

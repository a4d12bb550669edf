"""From training weights to a checkpoint folder a robot can load."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import click
import torch
from safetensors.torch import load_file

from vla_nodes import cli
from vla_nodes.datasets import episode as episodes
from vla_nodes.policy import checkpoint
from vla_nodes.policy import contract as contracts
from vla_nodes.policy.configuration import PolicyConfig, preset
from vla_nodes.policy.contract import Contract
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.share import share_path, share_roots
from vla_nodes.training.config import SettingsError
from vla_nodes.training.initialize import SHIPPED
from vla_nodes.training.losses_grounding import TRAINED as GROUNDED


def commit() -> str:
    """The commit the code was at, or "unknown" outside a checkout."""
    run = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=share_roots()[0], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def contract_of(folders: Iterable[Path]) -> Contract:
    """The contract of recorded episodes. SettingsError when they have none, or not all the same."""
    found: Contract | None = None
    for path in (path for folder in folders for path in episodes.files(folder)):
        header = episodes.read_header(path)
        if "contract" not in header:
            raise SettingsError(f"{path} does not say of which robot it is: set start to a checkpoint of that robot")
        contract = contracts.parse(header["contract"])
        if found is not None and (rows := contracts.differences(found, contract)):
            raise SettingsError(f"{path} is of another robot or another tick than those before it: {rows[0]}")
        found = contract
    if found is None:
        raise SettingsError("no episode, so no contract")
    return found


def config_of(policy: PolicyConfig, contract: Contract, depth: bool) -> checkpoint.CheckpointConfig:
    """What a checkpoint says of the robot that its data are of. Without ``depth`` no depth is valid: it sees none."""
    robot, actions, camera = contract.robot, contract.actions, contract.cameras[0]
    return checkpoint.CheckpointConfig(
        policy, robot.joints, robot.grippers[0].joint, actions.space, actions.period, contract.tick, camera.name,
        camera.depth_range if depth else (0.0, 0.0), robot.tool_frame, robot.base_frame)  # fmt: skip


def write(folder: Path, model: VlaPolicy, tokenizer: Path, provenance: dict, like: checkpoint.CheckpointConfig) -> None:
    """A checkpoint folder for the robot that ``like`` describes."""
    config = replace(like, policy=model.config, provenance={**provenance, "commit": commit()})
    checkpoint.save(folder, model, config, tokenizer, torch.bfloat16)


def export(args: cli.Options) -> None:
    """The command."""
    like = checkpoint.read_config(args.like or share_path(SHIPPED))
    policy = preset("nano", args.mixer)
    model = VlaPolicy(policy)
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

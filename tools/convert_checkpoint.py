"""Brings a checkpoint of vla_nodes 0.1 (format 1) to format 2: see --help."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from vla_nodes import cli
from vla_nodes.policy import checkpoint
from vla_nodes.policy.checkpoint import CheckpointConfig
from vla_nodes.policy.inference import quantize

NAMES = (  # (pattern, replacement) on the names of tensors and modules, the first that fits
    (r"^roles\.color\.", "queries.appearance."),
    (r"^roles\.kind\.", "queries.category."),
    (r"^roles\.wanted\.", "queries.step_present."),
    (r"^roles\.", "queries."),
    (r"^vision\.encoder\.look\.", "vision.encoder.appearance."),
    (r"^vision\.encoder\.shape\.", "vision.encoder.category."),
    (r"^middle\.", "object_center."),
    (r"^offset\.", "placement_head."),
    (r"^judge\.", "feasibility_head."),
    (r"^embed_state\.", "embed_state.position."),
    (r"^embed_change\.", "embed_state.velocity."),
    (r"^embed_view\.", "embed_image."),
    (r"^embed_summary\.", "embed_instruction."),
    (r"^kind$", "token_type"),
    (r"^head\.parts$", "head.decoders"),
)
SPACE = {
    "center": [0.48, 0.0, 0.15], "size": 0.25, "ground_height": 0.0, "ray_length": 3.0, "height_scale": 0.05,
    "near": 0.10, "fine": 0.03, "tool_probes": [[0.0, 0.0, 0.0], [0.0, 0.0, -0.05]],
}  # fmt: skip
PRESETS = {"anole-370m": "mamba1-370m", "anole-2b": "mamba2-2b", "poke-3b": "mamba2-3b"}
COLUMNS = {"ee_delta": ["dx", "dy", "dz", "rx", "ry", "rz"], "ee_pose": ["x", "y", "z", "qx", "qy", "qz", "qw"]}


def renamed(name: str) -> str:
    """The present name of a tensor or module."""
    for pattern, replacement in NAMES:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def converted(old: dict[str, Any]) -> CheckpointConfig:
    """Format 1's config.json as format 2's. KeyError or ValueError where it is none."""
    policy = dict(old["policy"])
    joints, horizon, size = policy.pop("joints"), policy.pop("horizon"), policy.pop("action_dim")
    policy["free_queries"] = policy.pop("free_roles")
    policy["preset"] = PRESETS.get(policy["preset"], policy["preset"])
    if old["action_space"] != "ee_delta" or size != 7:
        raise ValueError(f"action space {old['action_space']} of {size} columns: format 1 had ee_delta of 7 only")
    vectors = [
        {
            "name": "tool_position",
            "size": 3,
            "unit": "m",
            "token": "position",
            "offset": SPACE["center"],
            "scale": 0.25,
        },
        {"name": "tool_rotation", "size": 6, "token": "position"},
        {"name": "gripper", "size": 1, "unit": "opening", "token": "position", "offset": 0.5, "scale": 0.5},
        {"name": "joint_positions", "size": joints, "unit": "rad", "token": "position", "scale": 2.0},
        {"name": "tool_velocity", "size": 3, "unit": "m/s", "token": "velocity", "scale": 0.2},
        {"name": "gripper_velocity", "size": 1, "unit": "1/s", "token": "velocity", "scale": 4.0},
        {"name": "joint_velocities", "size": joints, "unit": "rad/s", "token": "velocity"},
    ]
    contract = {
        "robot": {
            "name": "panda", "joints": old["joint_names"], "base_frame": old["base_frame"],
            "tool_frame": old["tool_frame"],
            "grippers": [{"name": "gripper", "joint": old["gripper_joint"], "closed": 0.0, "open": 0.04}],
        },
        "state": vectors,
        "actions": {
            "space": "ee_delta", "columns": [*COLUMNS["ee_delta"], "gripper"],
            "scale": [0.016] * 3 + [0.05] * 3 + [1.0],
            "grippers": ["gripper"], "horizon": horizon, "period": old["period"],
        },
        "cameras": [{"name": old["camera"], "depth": "optional", "depth_range": old["depth_range"]}],
        "tick": old["tick"],
    }  # fmt: skip
    values = {"policy": {**policy, "space": SPACE}, "contract": contract, "provenance": old.get("provenance", {})}
    return CheckpointConfig.from_dict(values)


def convert(folder: Path, out: Path) -> None:
    """Write the converted checkpoint to `out`, which may be `folder` itself. CheckpointError names what is wrong."""
    try:
        old = json.loads((folder / checkpoint.CONFIG).read_text())
        if old.get("format") != 1:
            raise ValueError(f"format {old.get('format')!r}, this tool converts format 1")
        config = converted(old)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{folder / checkpoint.CONFIG}: {error}") from None
    tensors = {renamed(name): tensor for name, tensor in load_file(folder / checkpoint.WEIGHTS).items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / checkpoint.WEIGHTS)
    (out / checkpoint.CONFIG).write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    for name in (checkpoint.TOKENIZER, "README.md"):
        if (folder / name).is_file() and folder.resolve() != out.resolve():
            shutil.copy(folder / name, out / name)
    model, _ = checkpoint.load(out)
    if (ranges := folder / quantize.FILE).is_file():
        values = json.loads(ranges.read_text())
        found = {renamed(name): tuple(pair) for name, pair in values["ranges"].items()}
        quantize.save(out, model, found, values.get("about", {}))


def run(options: cli.Options) -> int:
    convert(options.checkpoint, options.out or options.checkpoint)
    return 0


command = cli.Command(
    "convert_checkpoint",
    """
    Bring a checkpoint of vla_nodes 0.1 (format 1) to format 2: tensors by their present names, and the contract.

    The network computes the same numbers before and after. Format 1 was only ever made for the simulated Panda and
    its table, so what that format left to the code is written into the new config.json.
    """,
    run,
    cli.argument(
        "CHECKPOINT", "folder of the checkpoint of format 1", type=cli.Existing("checkpoint", checkpoint.CONFIG)
    ),
    cli.out("folder of the converted checkpoint; without it CHECKPOINT itself", metavar="FOLDER"),
    examples="""
    python tools/convert_checkpoint.py nano-0.1 --out nano
    """,
    errors=(checkpoint.CheckpointError, OSError),
    program="python tools/convert_checkpoint.py",
)


if __name__ == "__main__":
    sys.exit(cli.main(command))

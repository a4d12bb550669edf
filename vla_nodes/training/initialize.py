"""The model a run begins with, put together from weights, checkpoints and the language encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file

from vla_nodes.datasets import episode as episodes
from vla_nodes.policy import checkpoint
from vla_nodes.policy import contract as contracts
from vla_nodes.policy.configuration import preset
from vla_nodes.policy.contract import Contract
from vla_nodes.policy.language import InstructionEncoder
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.share import SHIPPED_CHECKPOINT, share_path
from vla_nodes.training.config import ActionSettings, HeadSettings, Settings, SettingsError
from vla_nodes.training.losses_grounding import TRAINED as GROUNDED


@dataclass
class Begun:
    """A model, and what a checkpoint made from it needs beside."""

    model: VlaPolicy
    tokenizer: Path
    config: checkpoint.CheckpointConfig  # of the checkpoint it began with, else what the run's data say


def encoder(folder: Path) -> InstructionEncoder:
    """The instruction encoder of a folder that `distill` wrote, or of a checkpoint folder (whatever else is in it)."""
    values = json.loads((folder / "config.json").read_text())
    if "policy" not in values:
        return InstructionEncoder.from_folder(folder)
    language = InstructionEncoder.from_config(values["policy"]["language"], folder / "tokenizer.json")
    weights = load_file(folder / "model.safetensors")
    mine = {k.removeprefix("language."): v.float() for k, v in weights.items() if k.startswith("language.")}
    language.load_state_dict(mine)
    return language.eval()


def _load(model: VlaPolicy, weights: dict, source: Path | None, say: Callable[[str], None]) -> None:
    """Weights that may lack parts, which stay as they are; SettingsError when they are another model's."""
    if source is None:
        return
    known = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if foreign := [n for n, t in weights.items() if known.get(n) != tuple(t.shape)]:
        raise SettingsError(f"{source}: not of this model: {foreign[0]} and {len(foreign) - 1} others differ")
    model.load_state_dict(weights, strict=False)
    if fresh := sorted({name.split(".")[0] for name in known if name not in weights} - {"language"}):
        say(f"not in {source}, so it learns from the beginning: {', '.join(fresh)}")


def begin(settings: Settings, say: Callable[[str], None] = print) -> Begun:
    """Seeded fresh weights, then those of ``start``, then the eyes of ``grounded``, then the language encoder."""
    torch.manual_seed(settings.seed)
    weights, start = {}, settings.start
    if start is not None and not start.exists():
        start = share_path(str(start))  # one that is shipped, or FileNotFoundError
    if start is not None and start.is_dir():
        started, config = checkpoint.load(start)
        policy, weights = config.policy, started.state_dict()
    else:
        shipped = checkpoint.read_config(share_path(SHIPPED_CHECKPOINT))
        contract = contract_of(settings.data) or shipped.contract
        policy = replace(preset(settings.preset), space=shipped.policy.space)
        config = checkpoint.CheckpointConfig(policy, _without_depth(contract) if not settings.depth else contract)
        if start is not None:
            weights = load_file(start)
    if settings.mixer is not None and settings.mixer != policy.mixer:
        twin = policy.mixer if settings.mixer == "attention" else policy.twin_of
        policy = replace(policy, mixer=settings.mixer, twin_of=twin)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("core.")}
    policy = replace(policy, memory=settings.memory)
    model = VlaPolicy(policy, config.contract)
    if isinstance(settings, HeadSettings):  # it is learnt anew
        weights = {name: tensor for name, tensor in weights.items() if name.split(".")[0] != settings.stage}
    _load(model, weights, start, say)
    if isinstance(settings, ActionSettings) and settings.grounded is not None:
        eyes = {k: v for k, v in load_file(settings.grounded).items() if k.split(".")[0] in GROUNDED}
        _load(model, {**model.state_dict(), **eyes}, settings.grounded, say)
    begins = start if start is not None and start.is_dir() else None
    folder = settings.language or begins or share_path(SHIPPED_CHECKPOINT)
    model.language = encoder(folder).requires_grad_(False)
    return Begun(model, folder / "tokenizer.json", replace(config, policy=policy))


def contract_of(folders: Iterable[Path]) -> Contract | None:
    """The contract of recorded episodes, None where there are none or they name none.

    Raises:
        SettingsError: not all have the same.
    """
    found: Contract | None = None
    for path in (path for folder in folders if folder.is_dir() for path in episodes.files(folder)):
        header = episodes.read_header(path)
        if "contract" not in header:
            return None
        contract = contracts.parse(header["contract"])
        if found is not None and (rows := contracts.differences(found, contract)):
            raise SettingsError(f"{path} is of another robot or another tick than those before it: {rows[0]}")
        found = contract
    return found


def _without_depth(contract: Contract) -> Contract:
    cameras = tuple(msgspec.structs.replace(camera, depth="none") for camera in contract.cameras)
    return msgspec.structs.replace(contract, cameras=cameras)

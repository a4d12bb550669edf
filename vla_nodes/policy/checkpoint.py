"""A checkpoint is a folder: model.safetensors, config.json and tokenizer.json. No pickle is ever read.

config.json holds the sizes of the network and the contract: all that a robot and its cameras must agree on with it.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vla_nodes.policy import contract as contracts
from vla_nodes.policy.configuration import PolicyConfig
from vla_nodes.policy.contract import Contract
from vla_nodes.policy.language import load_tokenizer
from vla_nodes.policy.modeling import VlaPolicy

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
MAX_WEIGHTS_BYTES = 16 << 30  # the largest preset fits; more is no checkpoint of this suite
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 32 << 20
FORMAT = 2


class CheckpointError(ValueError):
    """One line: which file, what is wrong with it, and the remedy."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Everything a checkpoint says beside its weights."""

    policy: PolicyConfig  # sizes of the network
    contract: Contract  # what robot, cameras and data have to agree with
    provenance: dict[str, Any] = field(default_factory=dict)  # command, data, commit, scores

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "policy": self.policy.to_dict(),
            "contract": contracts.plain(self.contract),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointConfig:
        """ValueError names an entry that is missing, unknown or wrong."""
        known = {"format", "policy", "contract", "provenance"}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown entry {unknown[0]!r}")
        if missing := [name for name in ("policy", "contract") if name not in values]:
            raise ValueError(f"entry {missing[0]!r} is missing")
        contract = contracts.parse(values["contract"])
        return cls(PolicyConfig.from_dict(values["policy"]), contract, dict(values.get("provenance", {})))


def save(
    folder: Path, model: VlaPolicy, config: CheckpointConfig, tokenizer: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a checkpoint folder; floating weights are stored in ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() and "running_" not in name else tensor).contiguous().cpu()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    (folder / TOKENIZER).write_bytes(Path(tokenizer).read_bytes())


def load(folder: Path, device: str = "cpu") -> tuple[VlaPolicy, CheckpointConfig]:
    """The model in float32, in eval mode, and its config. CheckpointError on anything missing, foreign or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder: set the checkpoint parameter to one")
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: a checkpoint holds {CONFIG}, {WEIGHTS} and {TOKENIZER}")
    config = read_config(folder)
    shapes = _declared_shapes(folder / WEIGHTS)
    try:
        with _NoInitialValues():
            model = VlaPolicy(config.policy, config.contract)
    except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"{folder / CONFIG} describes no policy that can be built: {error}") from None
    _compare(folder / WEIGHTS, {name: tuple(t.shape) for name, t in model.state_dict().items()}, shapes)
    try:
        model.language.tokenizer = load_tokenizer(folder / TOKENIZER, config.policy.language)
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}; copy the checkpoint again or train a new one") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder / WEIGHTS}: tensor {name} holds NaN or infinite values")
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    return model.eval().to(device), config


class _NoInitialValues(torch.overrides.TorchFunctionMode):
    """Parameters are made and not filled: a file's are about to be. A forged size then asks for address space, which is
    refused or costs nothing. (On the meta device each operation would import torch's compiler: seconds of a start.)"""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def read_config(folder: Path) -> CheckpointConfig:
    path = Path(folder) / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {MAX_CONFIG_BYTES} bytes")
        values = json.loads(path.read_text())
        if isinstance(values, dict) and values.get("format") == 1:
            raise ValueError("a checkpoint of vla_nodes 0.1: convert it with python tools/convert_checkpoint.py FOLDER")
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"not a vla_nodes checkpoint of format {FORMAT}")
        return CheckpointConfig.from_dict(values)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}; is this a checkpoint of vla_nodes?") from None


def _declared_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes from the file's header alone: a file that claims more than it holds never touches memory."""
    size = path.stat().st_size
    if size > MAX_WEIGHTS_BYTES:
        raise CheckpointError(f"{path} is {size >> 30} GiB; at most {MAX_WEIGHTS_BYTES >> 30} are read")
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path} is truncated or not a safetensors file; copy the checkpoint again")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
            shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path}: its header is damaged ({type(error).__name__}: {error})") from None
    if end != size - 8 - length:
        held = size - 8 - length
        raise CheckpointError(f"{path} claims {end} bytes of weights and holds {held}: truncated or forged")
    return shapes


def _compare(path: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    both = [n for n in wanted if n in found]
    differing = [f"{n} is {found[n]}, config.json asks for {wanted[n]}" for n in both if found[n] != wanted[n]]
    differing += [f"{n} is missing" for n in wanted if n not in found]
    differing += [f"{n} is unknown" for n in found if n not in wanted]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(f"{path} does not fit its config.json: {'; '.join(differing[:3])}{more}")

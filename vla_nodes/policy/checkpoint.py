"""A checkpoint is a folder: model.safetensors, config.json and tokenizer.json. No pickle is ever read.

config.json holds all that a robot and a camera must agree on with the policy; `misfits` tables what does not.
"""

from __future__ import annotations

import json
import struct
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vla_nodes.policy.configuration import PolicyConfig
from vla_nodes.policy.contract import Actions, Camera, Contract, Gripper, Robot
from vla_nodes.policy.language import load_tokenizer
from vla_nodes.policy.modeling import VlaPolicy

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
MAX_WEIGHTS_BYTES = 16 << 30  # the largest preset fits; more is no checkpoint of this suite
MAX_CONFIG_BYTES = 1 << 20
COLUMNS = {
    "ee_delta": ("dx", "dy", "dz", "rx", "ry", "rz"),
    "ee_pose": ("x", "y", "z", "qx", "qy", "qz", "qw"),
}
MAX_HEADER_BYTES = 32 << 20
FORMAT = 1


class CheckpointError(ValueError):
    """One line: which file, what is wrong with it, and the remedy."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What training fixed about robot, camera and actions. Units in the names' comments."""

    policy: PolicyConfig
    joint_names: tuple[str, ...]  # order of every joint vector
    gripper_joint: str
    action_space: str  # as ActionChunk.action_space
    period: float  # s between rows of a chunk
    tick: float  # s between observations in training
    camera: str  # name of the camera the images are from
    depth_range: tuple[float, float]  # m; outside is invalid
    tool_frame: str = "panda_hand_tcp"
    base_frame: str = "panda_link0"
    gripper_polarity: str = "0 closed, 1 open"
    format: int = FORMAT
    provenance: dict[str, Any] = field(default_factory=dict)  # command, data, commit, scores

    @property
    def image_size(self) -> int:
        return self.policy.image_size

    @property
    def horizon(self) -> int:
        return self.policy.horizon

    @property
    def contract(self) -> Contract:
        """The same as a contract, for all that compares with it."""
        columns = (*COLUMNS.get(self.action_space, self.joint_names), "gripper")
        gripper = Gripper(joint=self.gripper_joint, closed=0.0, open=0.04)
        return Contract(
            robot=Robot(name="", joints=self.joint_names, base_frame=self.base_frame, tool_frame=self.tool_frame,
                        grippers=(gripper,)),
            state=(),
            actions=Actions(space=self.action_space, columns=columns, scale=(1.0,) * len(columns),
                            grippers=("gripper",), horizon=self.horizon, period=self.period),
            cameras=(Camera(name=self.camera, depth_range=self.depth_range),),
            tick=self.tick,
        )  # fmt: skip

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> CheckpointConfig:
        known = [f.name for f in fields(cls)]
        required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown entry {unknown[0]!r}")
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"entry {missing[0]!r} is missing")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**{**values, "policy": PolicyConfig.from_dict(values["policy"])})

    def misfits(self, **offered: Any) -> list[tuple[str, Any, Any]]:
        """(entry, what the checkpoint wants, what is offered) for each offered entry that differs."""
        return [(name, getattr(self, name), value) for name, value in offered.items() if getattr(self, name) != value]


def misfit_table(rows: list[tuple[str, Any, Any]]) -> str:
    """A table for the log of what differs."""
    cells = [("entry", "checkpoint", "robot or camera"), *((name, str(a), str(b)) for name, a, b in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


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
            model = VlaPolicy(config.policy)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError) as error:
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

    def __torch_function__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def read_config(folder: Path) -> CheckpointConfig:
    path = Path(folder) / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {MAX_CONFIG_BYTES} bytes")
        values = json.loads(path.read_text())
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

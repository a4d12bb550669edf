"""The state of a training run on disk: one safetensors file with a JSON header, replaced whole or not at all.

It holds everything the next step depends on: weights, buffers, the optimizer's moments, running averages, the step, the
time spent, and sums not logged yet. Random numbers need no entry: those of step k follow from (seed, k). No pickle.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

STATE, WEIGHTS = "state.safetensors", "weights.safetensors"


class StateError(ValueError):
    """One line: the file, and why a run cannot go on from it."""


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Atomically: a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(kept, partial, metadata={"training": json.dumps(header)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())  # the name must not outlive the content when the power goes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a state or weights file. StateError when it is damaged or another kind of file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["training"])
            return {name: file.get_tensor(name) for name in file.keys()}, header
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StateError(f"{path}: not the state of a training run ({error}); delete it to begin anew") from None


def read_header(path: Path) -> dict[str, Any]:
    """What a weights file says about how it was made; empty for a file of another origin."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("training", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"{path}: not a readable weights file ({error})") from None


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries that `prefixed` named so, under their own names."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}/")}

"""The vision's heavy convolutions in 8 bits: ranges calibrated on camera frames, error said in millimetres.

Only dense 3x3 convolutions of many channels are rounded: most of a tick's arithmetic is theirs, and least of its
precision. The first layer, the layers that mix the final map, the core and the head stay in float32. Rounding is
written as fake quantisation (Jacob et al., arXiv 1712.05877): one step for a layer's input, one per output channel of
its weights. An engine that finds this pattern computes it in integers; in PyTorch it gives the same numbers slowly.

The ranges are measured once per checkpoint and kept beside it in int8.json, with the hash of the weights they are of.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vla_nodes.policy.modeling import CameraInput, VlaPolicy

FILE, FORMAT = "int8.json", 1
MAX_FILE_BYTES = 1 << 20
LEAST_CHANNELS = 16  # of a convolution's input; the first layer, which sees the image itself, has fewer
Ranges = dict[str, tuple[float, float]]  # by module name: the least and greatest input


class QuantisedConv(nn.Module):
    """A convolution whose input and weights are rounded to 8 bits. x (B, C, H, W) -> as the convolution."""

    weight_step: Tensor
    weight_zero: Tensor

    def __init__(self, conv: nn.Conv2d, low: float, high: float) -> None:
        super().__init__()
        self.conv = conv
        low, high = min(low, 0.0), max(high, 0.0, 1e-6)  # zero must be exact: it is what padding adds
        self.step = (high - low) / 255
        self.zero = round(-low / self.step)
        self.register_buffer("weight_step", conv.weight.detach().abs().amax((1, 2, 3)).clamp(min=1e-12) / 127)
        self.register_buffer("weight_zero", torch.zeros(len(conv.weight), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv
        x = torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, 0, 255)
        weight = torch.fake_quantize_per_channel_affine(c.weight, self.weight_step, self.weight_zero, 0, -127, 127)
        return F.conv2d(x, weight, c.bias, c.stride, c.padding, c.dilation, c.groups)


def folded(model: VlaPolicy) -> VlaPolicy:
    """The model with a copy of its vision, in which every batch norm that follows a convolution is folded into it."""
    model, vision = copy.copy(model), copy.deepcopy(model.vision).eval()
    model._modules = {**model._modules, "vision": vision}  # the rest is shared: it may be billions of weights
    for parent in list(vision.modules()):
        if not isinstance(parent, nn.Sequential):
            continue
        for first, second in zip(list(parent), list(parent)[1:], strict=False):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                at = list(parent).index(first)
                parent[at], parent[at + 1] = fuse_conv_bn_eval(first, second), nn.Identity()
    return model


def heavy(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that are worth rounding, by name."""
    return {
        name: module for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.kernel_size == (3, 3)
        and module.in_channels >= LEAST_CHANNELS
    }  # fmt: skip


@contextmanager
def watching(model: VlaPolicy) -> Iterator[Ranges]:
    """Yields the ranges of what goes into the heavy convolutions while the block runs."""
    ranges: Ranges = {}

    def note(name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(_: nn.Module, inputs: tuple) -> None:
            x = inputs[0]
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(x.min())), max(high, float(x.max()))

        return hook

    hooks = [conv.register_forward_pre_hook(note(name)) for name, conv in heavy(model).items()]
    try:
        yield ranges
    finally:
        for hook in hooks:
            hook.remove()


def quantised(model: VlaPolicy, ranges: Ranges) -> VlaPolicy:
    """The model with a copy of its vision, these convolutions rounded. ValueError for the ranges of another one."""
    model = folded(model)
    found = heavy(model)
    if set(found) != set(ranges):
        other = sorted(set(found) ^ set(ranges))[0]
        raise ValueError(f"the 8-bit ranges are of another model: {other} is in one of them only")
    for name, conv in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantisedConv(conv, *ranges[name]))
    return model


def fingerprint(model: VlaPolicy) -> str:
    """Changes with any weight of the vision."""
    total = hashlib.sha256()
    for key, tensor in sorted(model.vision.state_dict().items()):
        total.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def save(folder: Path, model: VlaPolicy, ranges: Ranges, about: dict) -> Path:
    """int8.json into a checkpoint folder; `about` says which frames and what error."""
    values = {"format": FORMAT, "vision": fingerprint(model), "ranges": ranges, "about": about}
    path = Path(folder) / FILE
    path.write_text(json.dumps(values, indent=1) + "\n")
    return path


def load(folder: Path, model: VlaPolicy) -> Ranges | None:
    """The ranges beside a checkpoint; None when there are none. ValueError when damaged or of other weights."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    remedy = "measure them again (python -m vla_nodes engine --calibrate) or delete the file"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, this version reads {FORMAT}")
        ranges = {str(name): (float(low), float(high)) for name, (low, high) in values["ranges"].items()}
        if not all(math.isfinite(n) for pair in ranges.values() for n in pair):
            raise ValueError("a range is not finite")
        of = values["vision"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; {remedy}") from None
    if of != fingerprint(model):
        raise ValueError(f"{path} was measured with other weights; {remedy}")
    return ranges


def in_floats(image: CameraInput) -> CameraInput:
    """An image of bytes as 0..1."""
    return image._replace(color=image.color.float() / 255) if image.color.dtype == torch.uint8 else image


@torch.no_grad()
def calibrate(model: VlaPolicy, frames: Iterable[tuple]) -> Ranges:
    """Ranges over these inputs of an engine's `encode_observation`. ValueError without any."""
    model, seen = folded(model), 0
    with watching(model) as ranges:
        for images, *others in frames:
            model.encode_observation([in_floats(image) for image in images], *others)
            seen += 1
    if not seen:
        raise ValueError("no frames to calibrate on")
    return ranges

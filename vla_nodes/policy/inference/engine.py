"""Who computes a tick: PyTorch, or a graph exported once per checkpoint to OpenVINO or onnxruntime.

Both parts of a tick, vision (`encode_observation`: images to visual tokens) and core (`forward`: tokens and carried
state to chunk and new state), have the same call in every engine. PyTorch eager is the reference: an exported engine is
used only after it has carried a few made-up ticks to the same numbers, in this process, on this machine. States stay
values: nested tuples of tensors.

Precision f32 is the model as it is; int8 rounds the vision's heavy convolutions (quantise.py) where the checkpoint
brings the ranges for it. Everything is flattened to plain tensors by structure, so a new field needs no change here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_nodes.policy.contract import Camera
from vla_nodes.policy.inference import graphs, quantize
from vla_nodes.policy.language import EncodedText
from vla_nodes.policy.mamba.mixers import map_state
from vla_nodes.policy.modeling import CameraInput, StepQueries, TickOutput, VisualTokens, VlaPolicy

log = logging.getLogger(__name__)
# Largest difference of any output or state, relative to its largest value, on made-up images. How far 8 bits are off on
# camera frames is measured together with their ranges (evaluation/export_engine.py).
TOLERANCE = {"f32": 1e-3, "bf16": 5e-2, "int8": 0.1}
PRECISIONS = ("auto", *TOLERANCE)
SMALL_CORE = 4_000_000  # parameters; below it a second thread waits more than it computes (measured at 0.5 million)
PROOF_TICKS = 4
TIMED_TICKS = 15
EXPORTED = ("openvino", "onnxruntime")  # in this order: OpenVINO was the faster one wherever both were measured
NAMES = ("auto", "torch", *EXPORTED)


class EngineError(ValueError):
    """One line: which engine cannot run this policy, why, and what to do."""


class TorchEngine:
    """The model as it is written, its batch norms folded into the convolutions; the reference for the others."""

    name, precision, error = "torch", "f32", 0.0

    def __init__(self, model: VlaPolicy) -> None:
        self.model = quantize.folded(model)
        self.model.vision.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it

    @torch.no_grad()
    def encode_observation(self, images: Sequence[CameraInput], tool: Tensor, step: StepQueries) -> VisualTokens:
        """As VlaPolicy.encode_observation, without what only losses need; colours as bytes, or 0..1."""
        return self.model.encode_observation([quantize.in_floats(image) for image in images], tool, step)[0]

    @torch.no_grad()
    def forward(
        self, state: dict[str, Tensor], view: VisualTokens, summary: Tensor, carried: tuple | None
    ) -> tuple[TickOutput, tuple]:
        """As VlaPolicy.forward."""
        return self.model(state, view, summary, carried)


class Part(nn.Module):
    """A part of a tick with plain tensors in and out, as exporters want it: `arguments` give the structure."""

    def __init__(self, model: VlaPolicy, arguments: tuple) -> None:
        super().__init__()
        self.model: VlaPolicy = model
        self.arguments = arguments

    def call(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten(self.call(*unflatten(tensors, self.arguments))))


class VisionPart(Part):
    """`VlaPolicy.encode_observation` of one image (1, S, S, 3) of each camera as bytes, in the camera's own order."""

    def call(self, *arguments: Any) -> VisualTokens:
        images, *others = arguments
        floats = [image._replace(color=image.color.permute(0, 3, 1, 2).float() / 255) for image in images]
        return self.model.encode_observation(floats, *others)[0]


class CorePart(Part):
    """`VlaPolicy.forward` for one tick, the state of each layer as separate inputs and outputs."""

    def call(self, *arguments: Any) -> tuple[TickOutput, tuple]:
        return self.model(*arguments)


def flatten(state: Any) -> list[Tensor]:
    """The tensors of a state, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_state(note, state)
    return found


def unflatten(tensors: Iterable[Tensor], template: Any) -> Any:
    """A state of the template's structure with these tensors."""
    rest = iter(tensors)
    return map_state(lambda _: next(rest), template)


class ExportedEngine:
    """A tick of one stream, computed by two compiled graphs (see graphs.Graph)."""

    def __init__(self, name: str, precision: str, vision: graphs.Graph, core: graphs.Graph, outputs: dict[str, Any],
                 start: tuple, tool: bool) -> None:  # fmt: skip
        self.name, self.precision, self.error = name, precision, float("nan")
        self._vision, self._core, self._outputs, self._start, self._tool = vision, core, outputs, start, tool

    def encode_observation(self, images: Sequence[CameraInput], tool: Tensor, step: StepQueries) -> VisualTokens:
        """As TorchEngine.encode_observation, for one image of each camera; a colour of 0..1 is rounded to bytes."""
        inputs = (
            tuple(channels_last(image) for image in images),
            tool if self._tool else None,
            in_vision(step, self._tool),
        )
        return unflatten(self._vision(tuple(flatten(inputs))), self._outputs["vision"])

    def forward(
        self, state: dict[str, Tensor], view: VisualTokens, summary: Tensor, carried: tuple | None
    ) -> tuple[TickOutput, tuple]:
        """As TorchEngine.forward, for one tick of one stream."""
        carried = self._start if carried is None else carried
        return unflatten(self._core(tuple(flatten((state, view, summary, carried)))), self._outputs["core"])


Engine = TorchEngine | ExportedEngine


def in_vision(step: StepQueries, targets: bool) -> StepQueries:
    """What vision uses of a step: without targets nothing but the queries."""
    return step if targets else step._replace(summary=None)  # type: ignore[arg-type]  # left out of the graph


def channels_last(image: CameraInput) -> CameraInput:
    """An image as the graphs take it: bytes (B, S, S, 3)."""
    return image._replace(color=in_bytes(image.color).permute(0, 2, 3, 1))


def in_bytes(color: Tensor) -> Tensor:
    """An image of 0..1 as the bytes it came from."""
    return color if color.dtype == torch.uint8 else (color * 255).round().to(torch.uint8)


def one_tick(view: VisualTokens) -> VisualTokens:
    """(B, ...) -> (B, 1, ...): what `look` gives as what `think` takes."""
    return map_state(lambda part: part.unsqueeze(1), view)


def example(
    model: VlaPolicy, seed: int, depth: bool = True
) -> tuple[tuple[CameraInput, ...], Tensor, dict[str, Tensor]]:
    """Made-up but plausible inputs of one tick: images, tool position, state. Deterministic in `seed`."""
    g = torch.Generator().manual_seed(seed)
    images = tuple(_example_image(model, camera, g, depth) for camera in model.contract.cameras)
    tool = torch.tensor([model.config.space.center]) + 0.1 * torch.randn(1, 3, generator=g)
    state = {token: 0.5 * torch.randn(1, 1, size, generator=g) for token, size in model.layout.sizes.items()}
    return images, tool, state


def _example_image(model: VlaPolicy, camera: Camera, g: torch.Generator, depth: bool) -> CameraInput:
    """Blobs, as images have them, seen from above."""
    size = model.config.image_size
    coarse = torch.rand(1, 4, size // 16, size // 16, generator=g)
    picture = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    color = (picture[0, :3] * 255).byte().permute(1, 2, 0).contiguous()  # (S, S, 3) as a camera gives it
    color = color.permute(2, 0, 1).unsqueeze(0).float() / 255
    distance = 0.4 + picture[:, 3]
    there = depth and camera.depth != "none"
    distance = torch.where(torch.rand(1, size, size, generator=g) < 0.05, 0.0, distance) if there else 0 * distance
    if camera.pose == "unknown":
        return CameraInput(color, distance)
    intrinsics = torch.tensor([[[size * 0.9, 0, size / 2], [0, size * 0.9, size / 2], [0, 0, 1]]])
    x, y, z = model.config.space.center
    pose = torch.tensor([[[0.0, -0.6, 0.8, x - 0.6], [-1, 0, 0, y + 0.02], [0, -0.8, -0.6, z + 0.55], [0, 0, 0, 1]]])
    return CameraInput(color, distance, intrinsics, pose)


@torch.no_grad()
def example_instruction(model: VlaPolicy, seed: int = 0, words: int = 6) -> StepQueries:
    """What the model makes of random token ids: needs no tokeniser."""
    ids = torch.randint(model.config.language.vocabulary, (1, words), generator=torch.Generator().manual_seed(seed))
    text: EncodedText = model.language(ids, torch.ones_like(ids, dtype=torch.bool))
    return model.encode_instruction(text).at(0)


def run_ticks(engine: Engine, model: VlaPolicy, ticks: int) -> tuple[list[Tensor], float]:
    """Carries made-up ticks, the last but one without depth: every output, the last state, the fastest tick in ms."""
    step, carried, found, fastest = example_instruction(model), None, [], float("inf")
    for tick in range(ticks):
        images, tool, state = example(model, tick, depth=tick != ticks - 2)
        images = tuple(image._replace(color=in_bytes(image.color)) for image in images)
        started = time.perf_counter()
        view = one_tick(engine.encode_observation(images, tool, step))
        output, carried = engine.forward(state, view, step.summary, carried)
        fastest = min(fastest, 1e3 * (time.perf_counter() - started))
        found += flatten((view, output))
    return [t.clone() for t in found + flatten(carried)], fastest


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest |a - b| over an entry's largest |b|, over all entries; infinite where shapes differ or one is NaN.

    A lone number is a logit, which may be next to zero: below 1 it counts as 1.
    """
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape or not torch.isfinite(a).all():
            return float("inf")
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-3 if b.numel() > 1 else 1.0)))
    return worst


def load(model: VlaPolicy, name: str = "auto", threads: int = 1, checkpoint: Path | None = None,
         precision: str = "auto") -> TorchEngine | ExportedEngine:  # fmt: skip
    """The engine of that name; for "auto" the first of EXPORTED that runs here, is proven and is faster than eager.

    `checkpoint` is the folder whose weights these are; graphs are kept beside them, else in the user's cache. Precision
    "auto" is int8 where that folder brings its ranges, else f32.
    EngineError when a named engine cannot run; "auto" then warns with the reason and goes on without it.
    """
    if name not in NAMES:
        raise EngineError(f"engine {name!r} is none of {', '.join(NAMES)}")
    if precision not in PRECISIONS:
        raise EngineError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    reference = TorchEngine(model)
    if name == "torch":
        return reference
    device = next(model.parameters()).device
    if device.type != "cpu":
        if name == "auto":
            return reference
        raise EngineError(f"engine {name} is for the CPU and the policy is on {device}; set engine to auto or torch")
    ranges = _ranges(model, checkpoint, precision)
    wanted, eager_ms = run_ticks(reference, model, PROOF_TICKS)
    reasons = []
    for candidate in EXPORTED if name == "auto" else (name,):
        for kind in _kinds(candidate, precision, ranges):
            try:
                engine = _prove(candidate, model, wanted, threads, checkpoint, kind, ranges)
            except EngineError as error:
                reasons.append(str(error))
                continue
            if reasons:
                log.warning("policy engine is %s %s because: %s", candidate, kind, "; ".join(reasons))
            return _faster(engine, reference, model, eager_ms) if name == "auto" else engine
    if name != "auto":
        raise EngineError("; ".join(reasons))
    log.warning("policy runs in plain torch, several times slower than it could: %s", "; ".join(reasons))
    return reference


def _kinds(name: str, precision: str, ranges: quantize.Ranges | None) -> tuple[str, ...]:
    """The precisions to try in this engine, best first."""
    if precision != "auto":
        return (precision,)
    return ("int8", "f32") if ranges and name == "openvino" and graphs.exact_int8() else ("f32",)


def _ranges(model: VlaPolicy, checkpoint: Path | None, precision: str) -> quantize.Ranges | None:
    if precision not in ("auto", "int8"):
        return None
    try:
        ranges = quantize.load(checkpoint, model) if checkpoint is not None else None
    except ValueError as error:
        if precision == "int8":
            raise EngineError(str(error)) from None
        log.warning("policy is not run in 8 bits: %s", error)
        return None
    if ranges is None and precision == "int8":
        raise EngineError(f"precision int8 needs {quantize.FILE} in the checkpoint folder: "
                          "python -m vla_nodes engine --calibrate writes it")  # fmt: skip
    return ranges


def _faster(engine: ExportedEngine, reference: TorchEngine, model: VlaPolicy, eager_ms: float) -> Engine:
    """The engine, unless eager torch is faster on this machine."""
    ms = run_ticks(engine, model, TIMED_TICKS)[1]
    if ms > eager_ms:
        log.warning("policy runs in plain torch (%.1f ms a tick): %s needs %.1f ms here", eager_ms, engine.name, ms)
        return reference
    log.info("policy engine: %s %s, %.1f ms a tick, within %.1e of torch (%.1f ms)",
             engine.name, engine.precision, ms, engine.error, eager_ms)  # fmt: skip
    return engine


def why_not(name: str, model: VlaPolicy) -> str:
    """ "" when this engine can be tried here, else why not and the remedy."""
    if not graphs.version(name):
        return f"{name} is not installed (pip install {name})"
    if model.config.mixer == "attention":
        return f"{name}: the transformer twin's growing cache is not exported, only torch runs it"
    return ""


def _prove(name: str, model: VlaPolicy, wanted: list[Tensor], threads: int, checkpoint: Path | None, precision: str,
           ranges: quantize.Ranges | None) -> ExportedEngine:  # fmt: skip
    """Builds or reads the graphs and compares; cached graphs that fail are exported anew once."""
    if reason := why_not(name, model):
        raise EngineError(reason)
    if precision == "int8" and not graphs.exact_int8():
        raise EngineError("precision int8 needs a processor with VNNI (or Arm's dot product): older ones add 8-bit "
                          "products in 16 bits, which overflow")  # fmt: skip
    for fresh in (False, True):
        try:
            engine = _open(name, model, threads, checkpoint, precision, ranges, fresh)
            engine.error = difference(run_ticks(engine, model, PROOF_TICKS)[0], wanted)
        except Exception as error:  # these libraries raise bare RuntimeError and more for anything
            problem = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        else:
            if engine.error <= TOLERANCE[precision]:
                return engine
            problem = f"its outputs differ from torch by {engine.error:.1e}, allowed are {TOLERANCE[precision]:.0e}"
        if not fresh:
            log.warning("engine %s: cached graph unusable (%s), exporting anew", name, problem)
    raise EngineError(f"engine {name} {precision} cannot run this policy: {problem}; set engine to torch or another")


def _open(name: str, model: VlaPolicy, threads: int, checkpoint: Path | None, precision: str,
          ranges: quantize.Ranges | None, fresh: bool) -> ExportedEngine:  # fmt: skip
    ranges = ranges if precision == "int8" else None
    folder = graphs.folder_for(name, model, checkpoint, ranges)
    arguments, outputs = structure(model)
    if fresh or not graphs.complete(name, folder):
        started = time.perf_counter()
        exported = quantize.quantised(model, ranges) if ranges else model
        folder = graphs.write(name, folder, parts(exported, arguments), anew=fresh)
        log.info("exported the policy to %s in %.1f s: %s", name, time.perf_counter() - started, folder)
    vision = graphs.open_graph(name, folder / "vision", threads, precision)
    core = graphs.open_graph(name, folder / "core", core_threads(model, threads), precision)
    return ExportedEngine(name, precision, vision, core, outputs, arguments["core"][-1], model.targets)


def core_threads(model: VlaPolicy, threads: int) -> int:
    """How many of these threads the core is given."""
    return 1 if sum(p.numel() for p in model.core.parameters()) < SMALL_CORE else threads


@torch.no_grad()
def structure(model: VlaPolicy) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Arguments and outputs of both parts, from running one tick: what graphs flatten and unflatten by."""
    images, tool, state = example(model, 0)
    step, engine = example_instruction(model), TorchEngine(model)
    view = engine.encode_observation(images, tool, step)
    core = (state, one_tick(view), step.summary, model.core.init_state(1))
    inputs = (tuple(channels_last(image) for image in images), tool if model.targets else None)
    return ({"vision": (*inputs, in_vision(step, model.targets)), "core": core},
            {"vision": view, "core": engine.forward(*core)})  # fmt: skip


def parts(model: VlaPolicy, arguments: dict[str, tuple]) -> dict[str, tuple[nn.Module, tuple]]:
    """What is exported: by name, a module and an example of its inputs."""
    modules = {
        "vision": VisionPart(model, arguments["vision"]).eval(),
        "core": CorePart(model, arguments["core"]).eval(),
    }
    return {name: (module, tuple(flatten(arguments[name]))) for name, module in modules.items()}

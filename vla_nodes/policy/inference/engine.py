"""Who computes a tick: PyTorch, or a graph exported once per checkpoint to OpenVINO or onnxruntime.

Both parts of a tick, `look` (image to visual tokens) and `think` (tokens and carried state to chunk and new state),
have the same call in every engine. PyTorch eager is the reference: an exported engine is used only after it has carried
a few made-up ticks to the same numbers, in this process, on this machine. States stay values: nested tuples of tensors.

Precision f32 is the model as it is; int8 rounds the vision's heavy convolutions (quantise.py) where the checkpoint
brings the ranges for it. Everything is flattened to plain tensors by structure, so a new field needs no change here.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from vla_nodes.policy.inference import graphs, quantize
from vla_nodes.policy.language import EncodedText
from vla_nodes.policy.mamba.mixers import map_state
from vla_nodes.policy.modeling import (
    CHANGE_WIDTH,
    STATE_WIDTH,
    Prepared,
    Proprioception,
    TickOutput,
    VisualTokens,
    VlaPolicy,
)

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
        self.model.vision.encoder.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def look(self, color: Tensor, depth: Tensor, intrinsics: Tensor, camera_pose: Tensor, tool: Tensor,
             prepared: Prepared) -> VisualTokens:  # fmt: skip
        """As VlaPolicy.look, without what only losses need; color (B, 3, S, S) as bytes, or 0..1."""
        color = color.float() / 255 if color.dtype == torch.uint8 else color
        return self.model.look(color, depth, intrinsics, camera_pose, tool, prepared)[0]

    @torch.no_grad()
    def think(self, body: Proprioception, view: VisualTokens, summary: Tensor, state: tuple | None
              ) -> tuple[TickOutput, tuple]:  # fmt: skip
        """As VlaPolicy.think."""
        return self.model.think(body, view, summary, state)


class Part(nn.Module):
    """A part of a tick with plain tensors in and out, as exporters want it: `arguments` give the structure."""

    def __init__(self, model: VlaPolicy, arguments: tuple) -> None:
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, *tensors):
        return tuple(flatten(self.call(*unflatten(tensors, self.arguments))))


class Look(Part):
    """`VlaPolicy.look` of one camera image (1, S, S, 3) as bytes, in the camera's own order."""

    def call(self, color, *others):
        return self.model.look(color.permute(0, 3, 1, 2).float() / 255, *others)[0]


class Think(Part):
    """`VlaPolicy.think` for one tick, the state of each layer as separate inputs and outputs."""

    def call(self, *arguments):
        return self.model.think(*arguments)


def flatten(state) -> list[Tensor]:
    """The tensors of a state, in order."""
    found: list[Tensor] = []
    map_state(lambda t: found.append(t) or t, state)
    return found


def unflatten(tensors, template) -> tuple:
    """A state of the template's structure with these tensors."""
    rest = iter(tensors)
    return map_state(lambda _: next(rest), template)


class ExportedEngine:
    """A tick of one stream, computed by two compiled graphs (see engine_files.Graph)."""

    def __init__(self, name: str, precision: str, look: graphs.Graph, think: graphs.Graph, outputs: dict,
                 start: tuple) -> None:  # fmt: skip
        self.name, self.precision, self.error = name, precision, float("nan")
        self._look, self._think, self._outputs, self._start = look, think, outputs, start

    def look(self, color: Tensor, depth: Tensor, intrinsics: Tensor, camera_pose: Tensor, tool: Tensor,
             prepared: Prepared) -> VisualTokens:  # fmt: skip
        """As TorchEngine.look, for one image; a color of 0..1 is rounded to bytes."""
        inputs = (in_bytes(color).permute(0, 2, 3, 1), depth, intrinsics, camera_pose, tool, *flatten(prepared))
        return unflatten(self._look(inputs), self._outputs["look"])

    def think(self, body: Proprioception, view: VisualTokens, summary: Tensor, state: tuple | None
              ) -> tuple[TickOutput, tuple]:  # fmt: skip
        """As TorchEngine.think, for one tick of one stream."""
        state = self._start if state is None else state
        return unflatten(self._think(tuple(flatten((body, view, summary, state)))), self._outputs["think"])


def in_bytes(color: Tensor) -> Tensor:
    """An image of 0..1 as the bytes it came from."""
    return color if color.dtype == torch.uint8 else (color * 255).round().to(torch.uint8)


def one_tick(view: VisualTokens) -> VisualTokens:
    """(B, ...) -> (B, 1, ...): what `look` gives as what `think` takes."""
    return map_state(lambda part: part.unsqueeze(1), view)


def example(model: VlaPolicy, seed: int, depth: bool = True) -> tuple[tuple, Proprioception]:
    """Made-up but plausible inputs of one tick: ((look's first five), body). Deterministic in `seed`."""
    g = torch.Generator().manual_seed(seed)
    size = model.config.image_size
    coarse = torch.rand(1, 4, size // 16, size // 16, generator=g)  # blobs, as images have
    picture = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    color = (picture[0, :3] * 255).byte().permute(1, 2, 0).contiguous()  # (S, S, 3) as a camera gives it
    color = color.permute(2, 0, 1).unsqueeze(0).float() / 255
    distance = 0.4 + picture[:, 3]
    distance = torch.where(torch.rand(1, size, size, generator=g) < 0.05, 0.0, distance) if depth else 0 * distance
    intrinsics = torch.tensor([[[size * 0.9, 0, size / 2], [0, size * 0.9, size / 2], [0, 0, 1]]])
    pose = torch.tensor([[[0.0, -0.6, 0.8, -0.1], [-1, 0, 0, 0.02], [0, -0.8, -0.6, 0.7], [0, 0, 0, 1]]])  # looks down
    tool = torch.tensor([[0.45, 0.0, 0.2]]) + 0.1 * torch.randn(1, 3, generator=g)
    body = Proprioception(*(0.5 * torch.randn(1, 1, n, generator=g) for n in (STATE_WIDTH, CHANGE_WIDTH)))
    return (color, distance, intrinsics, pose, tool), body


@torch.no_grad()
def example_instruction(model: VlaPolicy, seed: int = 0, words: int = 6) -> Prepared:
    """What the model prepares from random token ids: needs no tokeniser."""
    ids = torch.randint(model.config.language.vocabulary, (1, words), generator=torch.Generator().manual_seed(seed))
    text: EncodedText = model.language(ids, torch.ones_like(ids, dtype=torch.bool))
    return model.prepare(text).at(0)


def run_ticks(engine, model: VlaPolicy, ticks: int) -> tuple[list[Tensor], float]:
    """Carries made-up ticks, the last but one without depth: every output, the last state, the fastest tick in ms."""
    prepared, state, found, fastest = example_instruction(model), None, [], float("inf")
    for tick in range(ticks):
        (color, *others), body = example(model, tick, depth=tick != ticks - 2)
        images = (in_bytes(color), *others)
        started = time.perf_counter()
        view = one_tick(engine.look(*images, prepared))
        output, state = engine.think(body, view, prepared.summary, state)
        fastest = min(fastest, 1e3 * (time.perf_counter() - started))
        found += flatten((view, output))
    return [t.clone() for t in found + flatten(state)], fastest


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


def _faster(engine: ExportedEngine, reference: TorchEngine, model: VlaPolicy, eager_ms: float):
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
    look = graphs.open_graph(name, folder / "look", threads, precision)
    think = graphs.open_graph(name, folder / "think", core_threads(model, threads), precision)
    return ExportedEngine(name, precision, look, think, outputs, arguments["think"][-1])


def core_threads(model: VlaPolicy, threads: int) -> int:
    """How many of these threads the core is given."""
    return 1 if sum(p.numel() for p in model.core.parameters()) < SMALL_CORE else threads


@torch.no_grad()
def structure(model: VlaPolicy) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Arguments and outputs of both parts, from running one tick: what graphs flatten and unflatten by."""
    (color, *images), body = example(model, 0)
    prepared, engine = example_instruction(model), TorchEngine(model)
    view = engine.look(color, *images, prepared)
    think = (body, one_tick(view), prepared.summary, model.core.init_state(1))
    return ({"look": (in_bytes(color).permute(0, 2, 3, 1), *images, prepared), "think": think},
            {"look": view, "think": engine.think(*think)})  # fmt: skip


def parts(model: VlaPolicy, arguments: dict[str, tuple]) -> dict[str, tuple[nn.Module, tuple]]:
    """What is exported: by name, a module and an example of its inputs."""
    modules = {"look": Look(model, arguments["look"]).eval(), "think": Think(model, arguments["think"]).eval()}
    return {name: (module, tuple(flatten(arguments[name]))) for name, module in modules.items()}

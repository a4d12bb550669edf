"""Who computes a tick: PyTorch, or a graph exported once per checkpoint to OpenVINO or onnxruntime.

Both parts of a tick, `look` (image to visual tokens) and `think` (tokens and carried state to chunk and new state),
have the same call in every engine. PyTorch eager is the reference: an exported engine is used only after it has carried
a few made-up ticks to the same numbers, in this process, on this machine. States stay values: nested tuples of tensors.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from . import engine_files
from .language import EncodedText
from .model import CHANGE_WIDTH, STATE_WIDTH, Prepared, Proprioception, TickOutput, VisualTokens, VlaPolicy
from .ssm import map_state

log = logging.getLogger(__name__)
TOLERANCE = {"f32": 1e-3, "bf16": 5e-2}  # largest difference of any output or state, relative to its largest value
PROOF_TICKS = 4
TIMED_TICKS = 15
EXPORTED = ("openvino", "onnxruntime")
NAMES = ("auto", "torch", *EXPORTED)


class EngineError(ValueError):
    """One line: which engine cannot run this policy, why, and what to do."""


class TorchEngine:
    """The model as it is written; the reference for the others."""

    name, precision, error = "torch", "f32", 0.0

    def __init__(self, model: VlaPolicy) -> None:
        self.model = model

    @torch.no_grad()
    def look(self, color: Tensor, depth: Tensor, intrinsics: Tensor, camera_pose: Tensor, tool: Tensor,
             prepared: Prepared) -> VisualTokens:  # fmt: skip
        """As VlaPolicy.look, without what only losses need."""
        return self.model.look(color, depth, intrinsics, camera_pose, tool, prepared)[0]

    @torch.no_grad()
    def think(self, body: Proprioception, view: VisualTokens, summary: Tensor, state: tuple | None
              ) -> tuple[TickOutput, tuple]:  # fmt: skip
        """As VlaPolicy.think."""
        return self.model.think(body, view, summary, state)


class Look(nn.Module):
    """`VlaPolicy.look` with tensors only, as exporters want it."""

    def __init__(self, model: VlaPolicy) -> None:
        super().__init__()
        self.model = model

    def forward(self, color, depth, intrinsics, camera_pose, tool, queries, summary):
        return tuple(self.model.look(color, depth, intrinsics, camera_pose, tool, Prepared(queries, summary))[0])


class Think(nn.Module):
    """`VlaPolicy.think` for one tick, the state of each layer as separate inputs and outputs."""

    def __init__(self, model: VlaPolicy) -> None:
        super().__init__()
        self.model = model
        self.template = model.core.init_state(1)

    def forward(self, body, change, features, points, mass, spread, tool, summary, *carried):
        view = VisualTokens(features, points, mass, spread, tool, mass[..., 0])  # grounding passes by the core
        output, state = self.model.think(Proprioception(body, change), view, summary, unflatten(carried, self.template))
        return (output.actions, output.primitive, *flatten(state))


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

    def __init__(self, name: str, precision: str, look: engine_files.Graph, think: engine_files.Graph, start: tuple
                 ) -> None:  # fmt: skip
        self.name, self.precision, self.error = name, precision, float("nan")
        self._look, self._think, self._start = look, think, start

    def look(self, color: Tensor, depth: Tensor, intrinsics: Tensor, camera_pose: Tensor, tool: Tensor,
             prepared: Prepared) -> VisualTokens:  # fmt: skip
        """As TorchEngine.look, for one image."""
        return VisualTokens(*self._look((color, depth, intrinsics, camera_pose, tool, *prepared)))

    def think(self, body: Proprioception, view: VisualTokens, summary: Tensor, state: tuple | None
              ) -> tuple[TickOutput, tuple]:  # fmt: skip
        """As TorchEngine.think, for one tick of one stream."""
        carried = flatten(self._start if state is None else state)
        actions, primitive, *after = self._think((*body, *view[:5], summary, *carried))
        return TickOutput(actions, primitive, view.grounding, view.points[..., 0, :]), unflatten(after, self._start)


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
        images, body = example(model, tick, depth=tick != ticks - 2)
        started = time.perf_counter()
        view = VisualTokens(*(part.unsqueeze(1) for part in engine.look(*images, prepared)))
        output, state = engine.think(body, view, prepared.summary, state)
        fastest = min(fastest, 1e3 * (time.perf_counter() - started))
        found += [*view, *output]
    return [t.clone() for t in found + flatten(state)], fastest


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest |a - b| over an entry's largest |b|, over all entries; infinite where shapes differ or one is NaN."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape or not torch.isfinite(a).all():
            return float("inf")
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)))
    return worst


def load(model: VlaPolicy, name: str = "auto", threads: int = 1, checkpoint: Path | None = None, precision: str = "f32"
         ) -> TorchEngine | ExportedEngine:  # fmt: skip
    """The engine of that name, or for "auto" the fastest of those that can run here and were proven equal to eager.

    `checkpoint` is the folder whose weights these are; graphs are kept beside them, else in the user's cache.
    EngineError when a named engine cannot run; "auto" then warns with the reason and goes on without it.
    """
    if name not in NAMES:
        raise EngineError(f"engine {name!r} is none of {', '.join(NAMES)}")
    if precision not in TOLERANCE:
        raise EngineError(f"precision {precision!r} is none of {', '.join(TOLERANCE)}")
    reference = TorchEngine(model)
    if name == "torch":
        return reference
    device = next(model.parameters()).device
    if device.type != "cpu":
        if name == "auto":
            return reference
        raise EngineError(f"engine {name} is for the CPU and the policy is on {device}; set engine to auto or torch")
    wanted, eager_ms = run_ticks(reference, model, PROOF_TICKS)
    proven, reasons = [], []
    for candidate in EXPORTED if name == "auto" else (name,):
        try:
            proven.append(_prove(candidate, model, wanted, threads, checkpoint, precision))
        except EngineError as error:
            if name != "auto":
                raise
            reasons.append(str(error))
    if not proven:
        log.warning("policy runs in plain torch, several times slower than it could: %s", "; ".join(reasons))
        return reference
    for reason in reasons:
        log.info("engine left out: %s", reason)
    timed = [(run_ticks(engine, model, TIMED_TICKS)[1], i) for i, engine in enumerate(proven)]
    fastest_ms, chosen = min(timed)
    if fastest_ms > eager_ms:
        log.warning("policy runs in plain torch (%.1f ms a tick): %s needs %.1f ms here",
                    eager_ms, proven[chosen].name, fastest_ms)  # fmt: skip
        return reference
    log.info("policy engine: %s %s, %.1f ms a tick, equal to torch (%.1f ms) within %.1e of the largest value",
             proven[chosen].name, precision, fastest_ms, eager_ms, proven[chosen].error)  # fmt: skip
    return proven[chosen]


def why_not(name: str, model: VlaPolicy) -> str:
    """"" when this engine can be tried here, else why not and the remedy."""
    if not engine_files.version(name):
        return f"{name} is not installed (pip install {name})"
    if model.config.mixer == "attention":
        return f"{name}: the transformer twin's growing cache is not exported, only torch runs it"
    return ""


def _prove(name: str, model: VlaPolicy, wanted: list[Tensor], threads: int, checkpoint: Path | None, precision: str
           ) -> ExportedEngine:  # fmt: skip
    """Builds or reads the graphs and compares; cached graphs that fail are exported anew once."""
    if reason := why_not(name, model):
        raise EngineError(reason)
    for fresh in (False, True):
        try:
            engine = _open(name, model, threads, checkpoint, precision, fresh)
            engine.error = difference(run_ticks(engine, model, PROOF_TICKS)[0], wanted)
        except Exception as error:  # these libraries raise bare RuntimeError and more for anything
            problem = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        else:
            if engine.error <= TOLERANCE[precision]:
                return engine
            problem = f"its outputs differ from torch by {engine.error:.1e}, allowed are {TOLERANCE[precision]:.0e}"
        if not fresh:
            log.warning("engine %s: cached graph unusable (%s), exporting anew", name, problem)
    raise EngineError(f"engine {name} cannot run this policy: {problem}; set engine to torch, or to another one")


def _open(name: str, model: VlaPolicy, threads: int, checkpoint: Path | None, precision: str, fresh: bool
          ) -> ExportedEngine:  # fmt: skip
    folder = engine_files.folder_for(name, model, checkpoint)
    if fresh or not engine_files.complete(name, folder):
        started = time.perf_counter()
        folder = engine_files.write(name, folder, parts(model), anew=fresh)
        log.info("exported the policy to %s in %.1f s: %s", name, time.perf_counter() - started, folder)
    look, think = (engine_files.open_graph(name, folder / part, threads, precision) for part in ("look", "think"))
    return ExportedEngine(name, precision, look, think, model.core.init_state(1))


@torch.no_grad()
def parts(model: VlaPolicy) -> dict[str, tuple[nn.Module, tuple]]:
    """What is exported: by name, a module and an example of its inputs."""
    images, body = example(model, 0)
    prepared = example_instruction(model)
    view = VisualTokens(*(part.unsqueeze(1) for part in TorchEngine(model).look(*images, prepared)))
    think = (*body, *view[:5], prepared.summary, *flatten(model.core.init_state(1)))
    return {"look": (Look(model).eval(), (*images, *prepared)), "think": (Think(model).eval(), think)}

"""What the benchmark times: contenders of one preset, histories of a given length, the machine's own limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import engine as engines
from . import engine_files
from .attention import KVState, _Buffer
from .model import VisualTokens, VlaPolicy
from .runtime import Observation, PolicyRuntime
from .ssm import SequenceCore

RUN_FLOP = {"cpu": 1e12, "cuda": 1e15}  # a history that costs more to run through the core is made up instead


@dataclass
class Contender:
    """One way of computing a tick. Times in ms by part; `core` feeds one tick's tokens from the current state."""

    name: str
    model: VlaPolicy
    runtime: PolicyRuntime
    core: Callable[[Tensor, tuple], tuple]
    error: float = 0.0
    times: dict[str, list[float]] = field(default_factory=dict)

    def note(self, part: str, ms: float) -> None:
        self.times.setdefault(part, []).append(ms)


class CoreOnly(nn.Module):
    """A core with its state as separate tensors, for exporters."""

    def __init__(self, core: SequenceCore) -> None:
        super().__init__()
        self.core, self.template = core, core.init_state(1)

    def forward(self, tokens, *carried):
        out, state = self.core(tokens, engines.unflatten(carried, self.template))
        return (out, *engines.flatten(state))


def torch_core(model: VlaPolicy) -> Callable[[Tensor, tuple], tuple]:
    return torch.no_grad()(lambda tokens, state: model.core(tokens, state))


def exported_core(name: str, model: VlaPolicy, threads: int, precision: str, folder: Path
                  ) -> Callable[[Tensor, tuple], tuple]:  # fmt: skip
    """The core alone as a graph of this engine (the engine itself holds it inside `think`)."""
    start = model.core.init_state(1)
    inputs = (torch.randn(1, model.tokens, model.config.d_model), *engines.flatten(start))
    engine_files.EXPORTERS[name](CoreOnly(model.core).eval(), inputs, folder / f"core-{name}")
    graph = engine_files.open_graph(name, folder / f"core-{name}", threads, precision)

    def call(tokens: Tensor, state: tuple) -> tuple:
        out, *after = graph((tokens, *engines.flatten(state)))
        return out, engines.unflatten(after, start)

    return call


def transformers_core(model: VlaPolicy) -> Callable[[Tensor, object], tuple]:
    """The same Mamba-2 blocks in `transformers`, eager. It continues a cache by single tokens only."""
    import transformers

    transformers.logging.set_verbosity_error()  # its advice to install CUDA kernels
    c = model.config
    theirs = transformers.Mamba2Model(transformers.Mamba2Config(
        vocab_size=8, hidden_size=c.d_model, num_hidden_layers=c.n_layer, state_size=c.d_state, expand=c.expand,
        head_dim=c.headdim, num_heads=c.expand * c.d_model // c.headdim, n_groups=1, chunk_size=32)).eval()  # fmt: skip
    missing, unknown = theirs.load_state_dict(model.core.state_dict(), strict=False)
    if unknown or [name for name in missing if "embeddings" not in name]:
        raise ValueError(f"transformers' Mamba-2 has other parameters: {missing} {unknown}")

    @torch.no_grad()
    def call(tokens: Tensor, cache) -> tuple:
        for t in range(tokens.shape[1]):
            out = theirs(inputs_embeds=tokens[:, t : t + 1], cache_params=cache, use_cache=True)
            cache = out.cache_params
        return out.last_hidden_state, cache

    return call


@torch.no_grad()
def history(model: VlaPolicy, ticks: int, device: str) -> tuple[tuple, str]:
    """A core's state after `ticks` ticks of random tokens, and whether it was "run" or "made up" (same sizes)."""
    weight = next(model.core.parameters())
    tokens = ticks * model.tokens
    generator = torch.Generator().manual_seed(ticks)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(weight)

    if model.config.mixer == "attention":  # running it costs ticks squared; its time depends on the length alone
        state = []
        for start in model.core.init_state(1, weight.device, weight.dtype):
            shape = (*start.keys.shape[:2], tokens, start.keys.shape[3])
            room = tokens + 4096  # so that no tick of the measurement moves to a larger buffer
            keys, values = (weight.new_zeros(*shape[:2], room, shape[3]) for _ in "kv")
            for buffer in (keys, values):
                buffer[:, :, :tokens].normal_()
            state.append(KVState(_Buffer(keys, values, tokens), tokens))
        return tuple(state), "made up"
    cost = 2.0 * tokens * sum(p.numel() for p in model.core.parameters())
    state = model.core.init_state(1, weight.device, weight.dtype)
    if cost > RUN_FLOP[device]:
        made = [torch.randn(t.shape, generator=generator).to(t) for t in engines.flatten(state)]
        return engines.unflatten(made, state), "made up"
    for begin in range(0, tokens, 2048):
        _, state = model.core(noise(1, min(2048, tokens - begin), model.config.d_model), state)
    return state, "run"


def observation(tick: int, size: int, joints: int) -> Observation:
    """Numpy inputs as a node hands them over, a new image every tick."""
    g = np.random.default_rng(tick)
    pose, camera = np.eye(4), np.eye(4)
    pose[:3, 3] = 0.45, 0.0, 0.2
    camera[:3, :] = [[0, -0.6, 0.8, -0.1], [-1, 0, 0, 0.02], [0, -0.8, -0.6, 0.7]]
    return Observation(
        0.1 * tick, g.integers(0, 256, (size, size, 3), dtype=np.uint8),
        g.uniform(0.3, 1.5, (size, size)).astype(np.float32),
        np.array([[0.9 * size, 0, size / 2], [0, 0.9 * size, size / 2], [0, 0, 1]]), camera,
        g.normal(0, 0.5, joints), np.zeros(joints), 1.0, pose)  # fmt: skip


class Clock:
    """Wall time of a call in ms, waiting for the GPU where there is one."""

    def __init__(self, device: str) -> None:
        self.wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def __call__(self, function, *args):
        self.wait()
        started = time.perf_counter()
        result = function(*args)
        self.wait()
        return result, 1e3 * (time.perf_counter() - started)


@torch.no_grad()
def time_round(contender: Contender, clock: Clock, tick: int, state: tuple, device: str) -> tuple:
    """One tick of everything, noted in the contender; returns the advanced state."""
    model, engine, runtime = contender.model, contender.runtime.engine, contender.runtime
    prepared = runtime._prepared
    images, body = engines.example(model, tick)
    images, body = tuple(x.to(device) for x in images), type(body)(*(x.to(device) for x in body))
    seen = observation(tick, model.config.image_size, model.config.joints)
    runtime._state = state
    _, ms = clock(runtime.step, seen)
    contender.note("tick", ms)
    state = runtime._state
    view, ms = clock(engine.look, *images, prepared)
    contender.note("vision", ms)
    view = VisualTokens(*(part.unsqueeze(1) for part in view))
    (_, state), ms = clock(engine.think, body, view, prepared.summary, state)
    contender.note("think", ms)
    tokens = torch.randn(1, model.tokens, model.config.d_model).to(next(model.core.parameters()))
    (_, state), ms = clock(contender.core, tokens, state)
    contender.note("core", ms)
    return state


def machine_limits(device: str, threads: int, core_bytes: int) -> dict[str, float]:
    """Measured GB/s of reading a buffer as large as the core, and float32 GFLOP/s of a large product."""
    where = torch.device(device)
    clock = Clock(device)
    many = max(1, (8 << 20) // max(core_bytes, 1))
    buffer = torch.ones(max(1 << 16, core_bytes // 4), device=where)
    reads = [clock(lambda: [buffer.sum() for _ in range(many)])[1] for _ in range(8)]
    n = 4096 if device == "cuda" else 1024
    a = torch.randn(n, n, device=where, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    products = [clock(torch.mm, a, a)[1] for _ in range(6)]
    return {"read_gb_s": many * buffer.numel() * 4 / min(reads) / 1e6, "gflop_s": 2 * n**3 / min(products) / 1e6}


def state_bytes(state) -> int:
    return sum(t.numel() * t.element_size() for t in engines.flatten(state))

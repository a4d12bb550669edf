"""What the benchmark times: contenders of one preset, histories of a given length, the machine's own limits."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vla_nodes import cli
from vla_nodes.policy.configuration import PolicyConfig
from vla_nodes.policy.contract import Contract
from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.inference import graphs
from vla_nodes.policy.mamba import mixers
from vla_nodes.policy.mamba.attention import KVState, TransformerBlock, _Buffer
from vla_nodes.policy.mamba.mixers import SequenceCore
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.policy.processing import CameraImage, Observation
from vla_nodes.policy.runtime import PolicyRuntime

RUN_FLOP = {"cpu": 1e12, "cuda": 1e15}  # a history that costs more to run through the core is made up instead
Core = Callable[[Tensor, Any], tuple]  # tokens and a state of its own kind, None to begin -> outputs and state
T = TypeVar("T")


@dataclass
class Contender:
    """One way of computing a tick; `core` feeds one tick's tokens from the current state."""

    name: str
    model: VlaPolicy
    runtime: PolicyRuntime
    core: Core
    error: float = 0.0


@dataclass
class Run:
    """A contender at one history length, with its own carried state. Times in ms by part."""

    contender: Contender
    length: int
    state: tuple
    filled: str  # how the history came about, see `history`
    times: dict[str, list[float]] = field(default_factory=dict)

    def note(self, part: str, ms: float) -> None:
        self.times.setdefault(part, []).append(ms)


class CoreOnly(nn.Module):
    """A core with its state as separate tensors, for exporters."""

    def __init__(self, core: SequenceCore) -> None:
        super().__init__()
        self.core, self.template = core, core.init_state(1)

    def forward(self, tokens: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        out, state = self.core(tokens, engines.unflatten(carried, self.template))
        return (out, *engines.flatten(state))


def torch_core(model: VlaPolicy) -> Core:
    return torch.no_grad()(lambda tokens, state: model.core(tokens, state))


def exported_core(name: str, model: VlaPolicy, threads: int, folder: Path) -> Core:
    """The core alone as a graph of this engine, in f32, on as many threads as inside of the engine."""
    start = model.core.init_state(1)
    inputs = (torch.randn(1, model.tokens, model.config.d_model), *engines.flatten(start))
    graphs.EXPORTERS[name](CoreOnly(model.core).eval(), inputs, folder / f"core-{name}")
    graph = graphs.open_graph(name, folder / f"core-{name}", engines.core_threads(model, threads), "f32")

    def call(tokens: Tensor, state: tuple) -> tuple:
        out, *after = graph((tokens, *engines.flatten(state)))
        return out, engines.unflatten(after, start)

    return call


def transformers_core(model: VlaPolicy) -> Core:
    """The same Mamba-2 blocks in `transformers`, eager. It continues a cache by single tokens only."""
    import transformers

    transformers.logging.set_verbosity_error()  # transformers advises on every start to install CUDA kernels
    c = model.config
    theirs = transformers.Mamba2Model(transformers.Mamba2Config(
        vocab_size=8, hidden_size=c.d_model, num_hidden_layers=c.n_layer, state_size=c.d_state, expand=c.expand,
        head_dim=c.headdim, num_heads=c.expand * c.d_model // c.headdim, n_groups=1, chunk_size=32)).eval()  # fmt: skip
    missing, unknown = theirs.load_state_dict(model.core.state_dict(), strict=False)
    if unknown or [name for name in missing if "embeddings" not in name]:
        raise ValueError(f"transformers' Mamba-2 has other parameters: {missing} {unknown}")

    @torch.no_grad()
    def call(tokens: Tensor, cache: Any) -> tuple:
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

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    if model.config.mixer == "attention":  # running it costs ticks squared; its time depends on the length alone
        caches = []
        for start in model.core.init_state(1, weight.device, weight.dtype):
            shape = (*start.keys.shape[:2], tokens, start.keys.shape[3])
            room = tokens + 4096  # so that no tick of the measurement moves to a larger buffer
            keys, values = (weight.new_zeros(*shape[:2], room, shape[3]) for _ in "kv")
            for buffer in (keys, values):
                buffer[:, :, :tokens].normal_()
            caches.append(KVState(_Buffer(keys, values, tokens), tokens))
        return tuple(caches), "made up"
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
    image = CameraImage(
        g.integers(0, 256, (size, size, 3), dtype=np.uint8), g.uniform(0.3, 1.5, (size, size)).astype(np.float32),
        np.array([[0.9 * size, 0, size / 2], [0, 0.9 * size, size / 2], [0, 0, 1]]), camera)  # fmt: skip
    return Observation(0.1 * tick, {"camera": image}, g.normal(0, 0.5, joints), np.zeros(joints), np.ones(1), pose)


class Clock:
    """Wall time of a call in ms, waiting for the GPU where there is one."""

    def __init__(self, device: str) -> None:
        self.wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def __call__(self, function: Callable[..., T], *args: Any) -> tuple[T, float]:
        self.wait()
        started = time.perf_counter()
        result = function(*args)
        self.wait()
        return result, 1e3 * (time.perf_counter() - started)


@torch.no_grad()
def time_round(run: Run, clock: Clock, tick: int, device: str) -> None:
    """One tick of everything, noted in the run, whose state it advances."""
    model, runtime = run.contender.model, run.contender.runtime
    assert runtime._asked is not None  # `build` follows an instruction
    engine, prepared = runtime.engine, runtime._asked.at(0)
    images, tool, own = mixers.map_state(lambda t: t.to(device), engines.example(model, tick))
    images = tuple(image._replace(color=engines.in_bytes(image.color)) for image in images)
    seen = observation(tick, model.config.image_size, len(model.contract.robot.joints))
    runtime._carried = run.state
    output, ms = clock(runtime.step, seen)
    if not output.timings:
        raise RuntimeError(f"the tick that was to be timed did not run: {output.hold_reason}")
    run.note("tick", ms)
    view, ms = clock(engine.encode_observation, images, tool, prepared)
    run.note("vision", ms)
    (_, state), ms = clock(engine.forward, own, engines.one_tick(view), prepared.summary, runtime._carried)
    run.note("core and head", ms)
    tokens = torch.randn(1, model.tokens, model.config.d_model).to(next(model.core.parameters()))
    (_, run.state), ms = clock(run.contender.core, tokens, state)
    run.note("core", ms)


class TwinWindow(nn.Module):
    """The twin's core with a bounded cache as explicit inputs: the last C tokens' keys and values of every layer.

    Gives the new tokens' own keys and values, which the caller writes over the oldest: no cache is ever copied.
    """

    def __init__(self, core: SequenceCore) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, position: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """x (1, L, D), the first at `position`; keys and values (1, H, C, width) of each layer, keys rotated."""
        new, length = [], x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        for i, block in enumerate(self.core.layers):
            assert isinstance(block, TransformerBlock)
            keys, values = cache[2 * i], cache[2 * i + 1]
            q, k, v = block.mixer.project(block.norm(x), position)
            q = q * block.mixer.headdim**-0.5
            own = (q @ k.transpose(-1, -2)).masked_fill(future, float("-inf"))
            weights = torch.cat([q @ keys.transpose(-1, -2), own], -1).softmax(-1)
            y = weights[..., : keys.shape[2]] @ values + weights[..., keys.shape[2] :] @ v
            x = x + block.mixer.out_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
            new += [k, v]
        return (self.core.norm_f(x), *new)


class WindowedTwin:
    """TwinWindow in OpenVINO, as generous to the transformer as can be: memory never grows, nothing is copied."""

    def __init__(self, model: VlaPolicy, threads: int, lengths: list[int]) -> None:
        self.model, self.threads = model, threads
        self.calls: dict[int, Core] = {}
        for length in lengths:
            if not too_long(model, length, "cpu"):
                self.calls[length] = self._build(length)

    def at(self, length: int) -> Core:
        return self.calls[length]

    def _build(self, length: int) -> Core:
        core, tokens, width = self.model.core, self.model.tokens, self.model.config.d_model
        (first, *_) = core.layers
        assert isinstance(first, TransformerBlock)
        attention = first.mixer
        shape = (1, attention.heads, length * tokens, attention.headdim)
        cache = [torch.randn(shape) for _ in range(2 * len(core.layers))]
        with tempfile.TemporaryDirectory(prefix="vla_nodes_bench_") as scratch:
            inputs = (torch.randn(1, tokens, width), torch.tensor([0.0]), *cache)
            graphs.EXPORTERS["openvino"](TwinWindow(core).eval(), inputs, Path(scratch) / "twin")
            graph = graphs.open_graph("openvino", Path(scratch) / "twin", self.threads, "f32")
        ticks = 0

        def call(tokens_: Tensor, _: None) -> tuple:
            nonlocal ticks
            out, *new = graph((tokens_, torch.tensor([float((length + ticks) * tokens)]), *cache))
            begin = ticks % length * tokens
            for kept, fresh in zip(cache, new, strict=True):
                kept[:, :, begin : begin + tokens] = fresh
            ticks += 1
            return out, None

        return call


def cache_bytes(model: VlaPolicy, length: int) -> int:
    """Of an attention core's keys and values after so many ticks; 0 for a core whose state does not grow."""
    if model.config.mixer != "attention":
        return 0
    element = next(model.core.parameters()).element_size()
    return 2 * len(model.core.layers) * length * model.tokens * model.config.d_model * element


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def too_long(model: VlaPolicy, length: int, device: str) -> str:
    """ "" when a history of this length fits the memory, else one line."""
    need, free = cache_bytes(model, length), free_bytes(device)
    return f"its cache needs {need >> 20} MiB and {free >> 20} are free" if need > 0.4 * free else ""


def need_memory(config: PolicyConfig, contract: Contract, args: cli.Options) -> None:
    """MemoryError before anything is allocated that would not fit."""
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in VlaPolicy(config, contract).parameters())
    copies = 1 + (not args.no_twin) + (args.device == "cpu" and args.engine != ["none"])
    need, free = copies * weights, free_bytes(args.device)
    if need > 0.9 * free:
        raise MemoryError(f"{config.preset} needs {need >> 20} MiB on {args.device} and {free >> 20} are free; "
                          "try --no-twin, --engine none or a smaller preset")  # fmt: skip


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


def state_bytes(state: tuple) -> int:
    return sum(t.numel() * t.element_size() for t in engines.flatten(state))

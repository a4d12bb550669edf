"""``python -m vla_nodes bench``: ms per control tick and memory, the SSM against its transformer twin, interleaved.

A tick is everything from a 224x224 RGB-D image to an action chunk, through the runtime that the nodes use. Contenders
take turns tick by tick, so a busy machine slows all alike. Weights are random unless --checkpoint gives trained ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from . import bench_parts as parts
from . import checkpoint as checkpoints
from . import engine as engines
from . import ssm_kernels
from .config import PRESETS, preset
from .model import VlaPolicy
from .runtime import PolicyRuntime

WARM_UP = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_nodes bench", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", choices=PRESETS, default="nano", help="sizes, with random weights (default nano)")
    source.add_argument("--checkpoint", type=Path, help="a checkpoint folder instead; its twin has random weights")
    parser.add_argument("--count", action="store_true", help="only build all presets without memory and count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads")
    parser.add_argument("--ticks", type=int, default=50, help="timed ticks at each history length")
    parser.add_argument("--history", default="10,1000,10000", help="ticks already carried, separated by commas")
    parser.add_argument("--engines", default="auto", help="auto, none, or of openvino,onnxruntime (CPU)")
    parser.add_argument("--precision", choices=tuple(engines.TOLERANCE), default="f32", help="of exported engines")
    parser.add_argument("--dtype", choices=("f32", "bf16"), help="of the core in torch (default bf16 on cuda)")
    parser.add_argument("--no-twin", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args(argv)
    if args.count:
        return count()
    try:
        report = measure(args)
    except (ValueError, MemoryError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{report['preset']}-{args.device}"
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    written = [args.out / f"{name}.json"]
    try:
        written.append(plot(report, args.out / f"{name}.png"))
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    print("wrote " + " and ".join(map(str, written)))
    return 0


def count() -> int:
    print(f"{'preset':12} {'core':10} {'total':>14} {'of which core':>14} {'vision':>12} {'language':>11}")
    for name in PRESETS:
        for mixer in (None, "attention"):
            config = preset(name, mixer)
            with torch.device("meta"):
                model = VlaPolicy(config)
            sizes = [size(part) for part in (model, model.core, model.vision, model.language)]
            print(f"{name:12} {config.mixer:10} {sizes[0]:14,} {sizes[1]:14,} {sizes[2]:12,} {sizes[3]:11,}")
    return 0


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- measuring -------------------------------------------------------------------------------------------------------
def measure(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    lengths = [int(n) for n in args.history.split(",")]
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype or ("bf16" if args.device == "cuda" else "f32")]
    with tempfile.TemporaryDirectory(prefix="vla_nodes_bench_") as scratch:
        contenders, notes, core_only = build(args, dtype, Path(scratch))
        clock, results = parts.Clock(args.device), []
        limits = parts.machine_limits(args.device, args.threads, core_bytes(contenders[0].model))
        for length in lengths:
            results += at_history(args, contenders, core_only, clock, length, limits)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    first = contenders[0].model
    return {
        "preset": first.config.preset, "device": args.device, "processor": processor(args.device),
        "threads": args.threads, "core_dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
        "kernels": ssm_kernels.why_unavailable() or "mamba_ssm", "tokens_per_tick": first.tokens, "ticks": args.ticks,
        "limits": limits, "peak_memory_mb": memory, "language_ms": language_ms(first, clock), "notes": notes,
        "parameters": {c.name: size(c.model) for c in contenders}, "results": results,
        "core_parameters": {c.name: size(c.model.core) for c in contenders}}  # fmt: skip


def core_bytes(model: VlaPolicy) -> int:
    return sum(p.numel() * p.element_size() for p in model.core.parameters())


def build(args, dtype, scratch: Path) -> tuple[list[parts.Contender], list[str], dict]:
    """Contenders, what had to be left out and why, and cores timed without a policy around them."""
    notes: list[str] = []
    if args.checkpoint:
        model, robot = checkpoints.load(args.checkpoint)
        config = model.config
    else:
        config = preset(args.preset)
        need_memory(config, args)
        model = VlaPolicy(config).eval()
        robot = checkpoints.CheckpointConfig(config, tuple(f"joint{i}" for i in range(config.joints)), "finger",
                                             "ee_delta", 0.05, 0.1, "camera", (0.1, 3.0))  # fmt: skip
    model.requires_grad_(False)

    def contender(name: str, model: VlaPolicy, engine, core) -> parts.Contender:
        runtime = PolicyRuntime(model, robot, args.device, engine)
        prepared = engines.example_instruction(model)
        runtime._prepared = type(prepared)(*(t.to(args.device) for t in prepared))
        runtime._decided = True
        return parts.Contender(name, model, runtime, core, engine.error)

    found, core_only = [], {}
    wanted = engines.EXPORTED if args.engines == "auto" else [n for n in args.engines.split(",") if n != "none"]
    for name in wanted if args.device == "cpu" and dtype == torch.float32 else ():
        try:
            engine = engines.load(model, name, args.threads, scratch, args.precision)
            core = parts.exported_core(name, model, args.threads, args.precision, scratch)
            found.append(contender(f"{config.mixer} {name} {args.precision}", model, engine, core))
        except ValueError as error:
            notes.append(str(error))
    if args.device == "cpu" and config.mixer == "mamba2" and dtype == torch.float32:
        try:
            core_only["transformers eager"] = parts.transformers_core(model)
        except ImportError:
            notes.append("transformers is not installed: its eager core is not compared")
    if (args.device, dtype) != ("cpu", torch.float32):
        model.to(args.device).core.to(dtype)
    plain = contender(f"{config.mixer} torch", model, engines.TorchEngine(model), parts.torch_core(model))
    contenders = [plain, *found]
    if not args.no_twin and config.mixer != "attention":
        twin = VlaPolicy(replace(config, mixer="attention", twin_of=config.mixer)).eval()
        twin.requires_grad_(False).to(args.device).core.to(dtype)
        contenders.append(contender("transformer twin torch", twin, engines.TorchEngine(twin), parts.torch_core(twin)))
    return contenders, notes, core_only


def need_memory(config, args) -> None:
    """MemoryError before anything is allocated that would not fit."""
    with torch.device("meta"):
        need = 4 * size(VlaPolicy(config)) * (1 if args.no_twin else 2)
    if args.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        need = int(need * (1 if args.engines == "none" else 2))
    if need > 0.9 * free:
        raise MemoryError(f"{config.preset} needs {need >> 20} MiB and {free >> 20} are free; try --no-twin, "
                          "--engines none or a smaller preset")  # fmt: skip


def at_history(args, contenders, core_only, clock, length: int, limits: dict) -> list[dict]:
    """All contenders at one history length, taking turns."""
    states, filled = {}, {}
    for c in contenders:
        c.times.clear()
        same = next((o for o in contenders if o.model is c.model and o.name in states), None)
        states[c.name], filled[c.name] = (
            (states[same.name], filled[same.name]) if same else parts.history(c.model, length, args.device)
        )
    caches: dict = dict.fromkeys(core_only)
    times: dict[str, list[float]] = {name: [] for name in core_only}
    for tick in range(-WARM_UP, args.ticks):
        if tick == 0:
            for c in contenders:
                c.times.clear()
            times = {name: [] for name in core_only}
        for c in contenders:
            states[c.name] = parts.time_round(c, clock, abs(tick), states[c.name], args.device)
        for name, call in core_only.items():
            model = contenders[0].model
            (_, caches[name]), ms = clock(call, torch.randn(1, model.tokens, model.config.d_model), caches[name])
            times[name].append(ms)
    rows = []
    for c in contenders:
        both = zip(c.times["think"], c.times["core"], strict=True)
        c.times["head"] = [max(0.0, whole - core) for whole, core in both]
        row = {"name": c.name, "history": length, "filled": filled[c.name], "error_to_torch": c.error,
               "state_mb": parts.state_bytes(states[c.name]) / 1e6,
               "core_weights_mb": core_bytes(c.model) / 1e6} | {k: summary(v) for k, v in c.times.items()}  # fmt: skip
        moved = core_bytes(c.model) + parts.state_bytes(states[c.name]) * (1 if "twin" in c.name else 2)
        row["bandwidth_share"] = moved / row["core"]["p50"] / 1e6 / limits["read_gb_s"]
        flop = 2 * size(c.model.core) * c.model.tokens
        row["peak_share"] = flop / row["core"]["p50"] / 1e6 / limits["gflop_s"]
        rows.append(row)
    return rows + [{"name": name, "history": length, "core": summary(values)} for name, values in times.items()]


def language_ms(model: VlaPolicy, clock) -> float:
    """Encoding one instruction of 12 tokens; done once per instruction, not per tick."""
    device = next(model.parameters()).device
    ids = torch.randint(model.config.language.vocabulary, (1, 12)).to(device)
    encode = torch.no_grad()(lambda: model.prepare(model.language(ids, torch.ones_like(ids, dtype=torch.bool))))
    return quantile([clock(encode)[1] for _ in range(10)], 0.5)


def summary(values: list[float]) -> dict[str, float]:
    return {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99), "least": min(values)}


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# -- showing ---------------------------------------------------------------------------------------------------------
def table(report: dict) -> str:
    sizes = report["parameters"]
    lines = [
        f"{report['preset']} on {report['processor']}, {report['device']}, {report['threads']} threads, core in "
        f"{report['core_dtype']}, {report['tokens_per_tick']} tokens a tick, {report['ticks']} ticks a row, in turns",
        f"this machine reads {report['limits']['read_gb_s']:.1f} GB/s at the core's size and computes "
        f"{report['limits']['gflop_s']:.0f} GFLOP/s; peak memory of the whole run {report['peak_memory_mb']:.0f} MB; "
        f"language {report['language_ms']:.1f} ms once per instruction",
        f"{'':26} {'params':>8} {'history':>8} {'tick p50':>9} {'p99':>7} {'vision':>7} {'core':>7} {'head':>6} "
        f"{'core p99':>8} {'state MB':>9} {'of GB/s':>8} {'of peak':>8} {'error':>8}"]  # fmt: skip
    for row in report["results"]:
        name, core = row["name"], row["core"]
        if "tick" not in row:
            lines.append(f"{name:26} {'':8} {row['history']:8} {'':25} {core['p50']:7.2f} {'':6} {core['p99']:8.2f}")
            continue
        lines.append(
            f"{name:26} {sizes[name] / 1e6:7.1f}M {row['history']:8} {row['tick']['p50']:9.2f} "
            f"{row['tick']['p99']:7.2f} {row['vision']['p50']:7.2f} {core['p50']:7.2f} {row['head']['p50']:6.2f} "
            f"{core['p99']:8.2f} {row['state_mb']:9.2f} {100 * row['bandwidth_share']:7.0f}% "
            f"{100 * row['peak_share']:7.0f}% {row['error_to_torch']:8.0e}")  # fmt: skip
    rows = [row for row in report["results"] if "filled" in row]
    filled = dict.fromkeys(f"{row['name']} {row['history']}: {row['filled']}" for row in rows)
    lines += ["ms throughout; head = token embedding and action head; error = largest to torch, of the largest value",
              "history at the start of a row, run through the core or made up at that length: " + ", ".join(filled)]
    return "\n".join(lines + [f"left out: {note}" for note in report["notes"]])


def plot(report: dict, path: Path) -> Path:
    """Left: ms per tick over history. Right: where the time of a tick goes, at the shortest history."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in report["results"] if "tick" in r]
    names = list(dict.fromkeys(r["name"] for r in rows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 2))
    for name in names:
        own = [r for r in rows if r["name"] == name]
        left.plot([r["history"] for r in own], [r["tick"]["p50"] for r in own], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="ticks of history already carried", ylabel="ms per tick, p50",
             title=f"{report['preset']}, image to chunk, {report['device']}, {report['threads']} threads")  # fmt: skip
    left.grid(alpha=0.3, which="both")
    left.legend()
    shortest = min(r["history"] for r in rows)
    first = {r["name"]: r for r in rows if r["history"] == shortest}
    bottom = [0.0] * len(names)
    for part in ("vision", "core", "head"):
        heights = [first[name][part]["p50"] for name in names]
        right.bar(names, heights, bottom=bottom, label=part)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    right.set(ylabel="ms", title=f"after {shortest} ticks")
    right.tick_params(axis="x", rotation=15, labelsize=8)
    right.legend()
    figure.suptitle(report["processor"], fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())

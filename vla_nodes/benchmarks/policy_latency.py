"""ms per control tick and memory: the SSM against its transformer twin, interleaved."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from vla_nodes import cli
from vla_nodes.benchmarks import contenders as parts
from vla_nodes.benchmarks import latency_plot
from vla_nodes.policy import checkpoint as checkpoints
from vla_nodes.policy.configuration import PRESETS, preset
from vla_nodes.policy.contract import Contract
from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.inference import graphs, quantize
from vla_nodes.policy.mamba import kernels, mixers
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.policy.runtime import PolicyRuntime
from vla_nodes.progress import progress
from vla_nodes.share import SHIPPED_CHECKPOINT, share_path

WARM_UP = 3


def bench(args: cli.Options) -> int:
    """The command."""
    if args.count:
        return count()
    if args.checkpoint and args.given("preset"):
        raise click.UsageError("give a --preset or a --checkpoint, not both")
    report = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{report['preset']}-{args.device}"
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(latency_plot.table(report))
    written = [args.out / f"{name}.json"]
    try:
        written.append(latency_plot.plot(report, args.out / f"{name}.png"))
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    print("wrote " + " and ".join(map(str, written)))
    return cli.ExitStatus.DONE


def made_for() -> Contract:
    """What a preset of random weights is measured with: the robot, camera and chunks of the shipped policy."""
    return checkpoints.read_config(share_path(SHIPPED_CHECKPOINT)).contract


def count() -> int:
    print(f"{'preset':12} {'core':10} {'total':>14} {'of which core':>14} {'vision':>12} {'language':>11}")
    for name in PRESETS:
        for mixer in (None, "attention"):
            config = preset(name, mixer)
            with torch.device("meta"):
                model = VlaPolicy(config, made_for())
            sizes = [size(part) for part in (model, model.core, model.vision, model.language)]
            print(f"{name:12} {config.mixer:10} {sizes[0]:14,} {sizes[1]:14,} {sizes[2]:12,} {sizes[3]:11,}")
    return cli.ExitStatus.DONE


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- measuring -------------------------------------------------------------------------------------------------------
def measure(args: cli.Options) -> dict:
    lengths, precisions = check(args)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype or ("bf16" if args.device == "cuda" else "f32")]
    with tempfile.TemporaryDirectory(prefix="vla_nodes_bench_") as scratch:
        say("building")
        contenders, notes, core_only = build(args, precisions, dtype, Path(scratch), lengths)
        clock = parts.Clock(args.device)
        limits = parts.machine_limits(args.device, args.threads, core_bytes(contenders[0].model))
        results = at_histories(args, contenders, core_only, clock, lengths, limits, notes)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    first = contenders[0].model
    return {
        "preset": first.config.preset, "device": args.device, "processor": processor(args.device),
        "threads": args.threads, "core_dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
        "engines": {name: graphs.version(name) for name in engines.EXPORTED},
        "kernels": kernels.why_unavailable() or "mamba_ssm", "tokens_per_tick": first.tokens, "ticks": args.ticks,
        "limits": limits, "peak_memory_mb": memory, "language": language_ms(first, clock), "notes": notes,
        "parameters": {c.name: size(c.model) for c in contenders}, "results": results,
        "core_parameters": {c.name: size(c.model.core) for c in contenders},
        "ratios": ratios(results)}  # fmt: skip


def check(args: cli.Options) -> tuple[list[int], list[str]]:
    """The history lengths and precisions asked for. ValueError says what is wrong before anything is built."""
    lengths = sorted(set(args.history))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, and this machine has none that torch can use; take --device cpu")
    precisions = args.precision
    if precisions == ["auto"]:
        ranges = args.checkpoint and (args.checkpoint / quantize.FILE).is_file() and graphs.exact_int8()
        precisions = ["f32", "int8"] if ranges else ["f32"]
    if len(args.engine) > 1 and {"auto", "all", "none"} & set(args.engine):
        raise ValueError("--engine: auto, all and none stand alone")
    if "auto" in precisions:
        raise ValueError("--precision: auto stands alone")
    return lengths, precisions


def chosen_engines(args: cli.Options) -> list[str]:
    installed = [name for name in engines.EXPORTED if graphs.version(name)]
    every = {"auto": installed[:1], "all": list(engines.EXPORTED), "none": []}
    return every.get(args.engine[0], args.engine)


def say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def core_bytes(model: VlaPolicy) -> int:
    return sum(p.numel() * p.element_size() for p in model.core.parameters())


def build(args: cli.Options, precisions: list[str], dtype: torch.dtype, scratch: Path, lengths: list[int]
          ) -> tuple[list[parts.Contender], list[str], dict[str, parts.Core | parts.WindowedTwin]]:  # fmt: skip
    """Contenders, what had to be left out and why, and cores timed without a policy around them."""
    notes: list[str] = []
    if args.checkpoint:
        robot = checkpoints.read_config(args.checkpoint)
        config = robot.policy
        parts.need_memory(config, robot.contract, args)
        model, robot = checkpoints.load(args.checkpoint)
    else:
        config = preset(args.preset)
        robot = checkpoints.CheckpointConfig(config, made_for())
        parts.need_memory(config, robot.contract, args)
        model = VlaPolicy(config, robot.contract).eval()
    model.requires_grad_(False)
    folder = args.checkpoint or scratch
    if "int8" in precisions and not args.checkpoint:  # random weights need no camera frames
        frames = ((*engines.example(model, i)[:2], engines.example_instruction(model)) for i in range(4))
        quantize.save(scratch, model, quantize.calibrate(model, frames), {"frames": "made up, for timing only"})

    def contender(name: str, model: VlaPolicy, engine: engines.Engine, core: parts.Core) -> parts.Contender:
        runtime = PolicyRuntime(model, robot, args.device, engine)
        runtime.follow(mixers.map_state(lambda t: t.to(args.device), engines.example_instruction(model)))
        return parts.Contender(name, model, runtime, core, engine.error)

    found: list[parts.Contender] = []
    core_only: dict[str, parts.Core | parts.WindowedTwin] = {}
    fast = chosen_engines(args) if args.device == "cpu" and dtype == torch.float32 else []
    for name in fast:
        core = None
        for precision in precisions:
            try:
                say(f"exporting to {name} {precision}")
                engine = engines.load(model, name, args.threads, folder, precision)
                core = core or parts.exported_core(name, model, args.threads, scratch)
                found.append(contender(f"{config.mixer} {name} {precision}", model, engine, core))
            except ValueError as error:
                notes.append(str(error))
    if args.device == "cpu" and config.mixer == "mamba2" and dtype == torch.float32:
        try:
            core_only["mamba2 huggingface"] = parts.transformers_core(model)
        except ImportError:
            notes.append("transformers is not installed: its eager core is not compared")
    if (args.device, dtype) != ("cpu", torch.float32):
        model.to(args.device).core.to(dtype)
    plain = contender(f"{config.mixer} torch", model, engines.TorchEngine(model), parts.torch_core(model))
    contenders = [plain, *found]
    if not args.no_twin and config.mixer != "attention":
        twin = VlaPolicy(replace(config, mixer="attention", twin_of=config.mixer), robot.contract).eval()
        twin.requires_grad_(False).to(args.device).core.to(dtype)
        contenders.append(contender("transformer torch", twin, engines.TorchEngine(twin), parts.torch_core(twin)))
        if "openvino" in fast:
            say("exporting the transformer's core to openvino")
            core_only["transformer openvino f32"] = parts.WindowedTwin(twin, args.threads, lengths)
    return contenders, notes, core_only


def at_histories(args: cli.Options, contenders: list[parts.Contender],
                 core_only: dict[str, parts.Core | parts.WindowedTwin], clock: parts.Clock, lengths: list[int],
                 limits: dict[str, float], notes: list[str]) -> list[dict[str, Any]]:  # fmt: skip
    """All contenders at all history lengths, taking turns; a row of results for each pair."""
    runs: dict[tuple[str, int], parts.Run] = {}
    for length in lengths:
        say(f"carrying a history of {length} ticks")
        for c in contenders:
            same = next((o for o in contenders if o.model is c.model and (o.name, length) in runs), None)
            if same is None and (reason := parts.too_long(c.model, length, args.device)):
                notes.append(f"{c.name} after {length} ticks: {reason}")
                continue
            state, filled = (
                (runs[same.name, length].state, runs[same.name, length].filled) if same
                else parts.history(c.model, length, args.device)
            )  # fmt: skip
            runs[c.name, length] = parts.Run(c, length, state, filled)
    alone: dict[tuple[str, int], list[float]] = {
        (name, length): [] for name, call in core_only.items() for length in lengths
        if not isinstance(call, parts.WindowedTwin) or length in call.calls
    }  # fmt: skip
    states: dict[tuple[str, int], Any] = dict.fromkeys(alone)
    rounds, order = args.ticks + WARM_UP, list(runs)
    for tick in progress(range(rounds), unit="ticks of each", label="timing"):
        if tick == WARM_UP:
            for run in runs.values():
                run.times.clear()
            for times in alone.values():
                times.clear()
        order = order[1:] + order[:1]  # nobody always follows the same one
        for key in order:
            parts.time_round(runs[key], clock, tick, args.device)
        for (name, length), times in alone.items():
            model = contenders[0].model
            tokens = torch.randn(1, model.tokens, model.config.d_model)
            call = core_only[name]
            at = call.at(length) if isinstance(call, parts.WindowedTwin) else call
            (_, states[name, length]), ms = clock(at, tokens, states[name, length])
            times.append(ms)
    rows = [row_of(run, limits) for run in runs.values()]
    rows += [{"name": n, "history": length, "core": summary(ms)} for (n, length), ms in alone.items()]
    return sorted(rows, key=lambda row: lengths.index(row["history"]))


def row_of(run: parts.Run, limits: dict[str, float]) -> dict[str, Any]:
    c, times = run.contender, run.times
    times["head"] = [max(0.0, whole - core) for whole, core in zip(times["core and head"], times["core"], strict=True)]
    weights, state = core_bytes(c.model), parts.state_bytes(run.state)
    moved = weights + state * (1 if c.model.config.mixer == "attention" else 2)
    flop = 2 * size(c.model.core) * c.model.tokens
    row: dict[str, Any] = {
        "name": c.name,
        "history": run.length,
        "filled": run.filled,
        "error_to_torch": c.error,
        "state_mb": state / 1e6,
        "core_weights_mb": weights / 1e6,
    }
    row |= {part: summary(ms) for part, ms in times.items()}
    row["bandwidth_share"] = moved / row["core"]["p50"] / 1e6 / limits["read_gb_s"]
    row["peak_share"] = flop / row["core"]["p50"] / 1e6 / limits["gflop_s"]
    return row


def ratios(rows: list[dict]) -> dict[str, float]:
    """From medians of one run: growth over history, and the fast core against eager ones."""
    found: dict[str, float] = {}
    for part in ("tick", "core"):
        for name in dict.fromkeys(row["name"] for row in rows if part in row):
            own = {row["history"]: row[part]["p50"] for row in rows if row["name"] == name and part in row}
            if len(own) > 1:
                found[f"{part} of {name}, {max(own)} ticks to {min(own)}"] = own[max(own)] / own[min(own)]
    first = {row["name"]: row["core"]["p50"] for row in rows if row["history"] == rows[0]["history"]}
    mixer = rows[0]["name"].split()[0]
    fast = [name for name in first if name.startswith(mixer) and any(e in name for e in engines.EXPORTED)]
    for eager in (f"{mixer} torch", f"{mixer} huggingface"):
        for name in fast if eager in first else ():
            found[f"core of {eager} to {name}"] = first[eager] / first[name]
    return found


def language_ms(model: VlaPolicy, clock: parts.Clock) -> dict[str, float]:
    """Encoding one instruction of 12 tokens; done once per instruction, not per tick."""
    device = next(model.parameters()).device
    ids = torch.randint(model.config.language.vocabulary, (1, 12)).to(device)
    encode = torch.no_grad()(
        lambda: model.encode_instruction(model.language(ids, torch.ones_like(ids, dtype=torch.bool)))
    )
    return summary([clock(encode)[1] for _ in range(12)][2:])


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


command = cli.Command(
    "bench",
    """
    ms per control tick and memory, the SSM against its transformer twin, interleaved.

    A tick is everything from a 224x224 RGB-D image to an action chunk, through the runtime that the nodes use.
    Contenders and history lengths take turns tick by tick, so a busy or throttled machine slows all alike and ratios
    hold. Weights are random unless --checkpoint gives trained ones: times do not depend on them.
    """,
    bench,
    *cli.section(
        "Contenders",
        cli.option("--preset", type=click.Choice(list(PRESETS)), default="nano", help="sizes, with random weights"),
        cli.checkpoint("a checkpoint folder in place of a preset; its twin has random weights", default=None),
        cli.option("--engine", type=cli.Several(choices=(*engines.EXPORTED, "auto", "all", "none")), default="auto",
                   metavar="NAME,NAME", help=f"CPU engines beside eager torch: {', '.join(engines.EXPORTED)}, all, "
                   "none, or auto, the best one installed"),
        cli.option("--precision", type=cli.Several(choices=engines.PRECISIONS), metavar="NAME,NAME", default="auto",
                   help="of exported engines, each a contender: f32, int8, bf16, or auto, f32 and int8 where the "
                   "checkpoint brings its ranges"),
        cli.option("--dtype", type=click.Choice(("f32", "bf16")), help="of the core in torch; f32, on cuda bf16"),
        cli.flag("--no-twin", "without the transformer of the same size"),
    ),
    *cli.section(
        "How",
        cli.option("--device", type=click.Choice(("cpu", "cuda")), help="where torch computes",
                   default="cuda" if torch.cuda.is_available() else "cpu", show_default="cuda if there is one"),
        cli.count("--threads", "CPU threads", min(2, os.cpu_count() or 1)),
        cli.count("--ticks", "timed ticks at each history length", 50, least=2),
        cli.option("--history", type=cli.Several(int, least=1), metavar="N,N", default="10,1000,10000",
                   help="ticks already carried when timing starts"),
        cli.out("folder for the report and the plot", default="out/bench"),
        cli.flag("--count", "only count the parameters of all presets"),
    ),
    examples="""
    python -m vla_nodes bench --checkpoint work/nano --threads 2
    python -m vla_nodes bench --preset mamba1-370m --engine none --history 10,1000
    """,
    errors=(ValueError, OSError, MemoryError, torch.cuda.OutOfMemoryError),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    sys.exit(main())

"""A checkpoint's fast CPU graphs: made, proven and timed before the robot needs them; ranges for 8 bits measured."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from vla_nodes import cli
from vla_nodes.envs import base as envs
from vla_nodes.policy import checkpoint as checkpoints
from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.inference import graphs, quantize
from vla_nodes.policy.modeling import VisualTokens, VlaPolicy
from vla_nodes.policy.processing import Observation
from vla_nodes.policy.runtime import PolicyOutput, PolicyRuntime
from vla_nodes.progress import progress, say
from vla_nodes.share import SHIPPED_CHECKPOINT, share_path

FIRST_SEED = 500_000  # of the episodes; training and evaluation use others
EVERY = 5  # of the ticks are calibrated on: neighbours look alike
BLIND = 4  # of these, every so many once more without depth
Episode = tuple[str, list[Observation]]


class Recorder(engines.TorchEngine):
    """Eager PyTorch that keeps the inputs of every so many observations."""

    def __init__(self, model: VlaPolicy) -> None:
        super().__init__(model)
        self.frames: list[tuple] = []
        self._ticks = 0

    def encode_observation(self, *inputs: Any) -> VisualTokens:
        if self._ticks % EVERY == 0:
            self.frames.append(inputs)
        self._ticks += 1
        return super().encode_observation(*inputs)


def blind(frame: tuple) -> tuple:
    """The inputs of an observation of the same images without depth."""
    images, *others = frame
    return tuple(image._replace(depth=torch.zeros_like(image.depth)) for image in images), *others


def drive(
    model: VlaPolicy, config: checkpoints.CheckpointConfig, count: int, name: str, first_seed: int = FIRST_SEED
) -> list[Episode]:
    """What the policy saw while it drove in an environment, episode by episode."""
    from vla_nodes.evaluation import closed_loop_episode  # here: it needs none of it without --calibrate

    runtime, env = PolicyRuntime(model, config), envs.make(name)
    episodes: list[Episode] = []
    step = runtime.step

    def recorded(observation: Observation) -> PolicyOutput:
        episodes[-1][1].append(copy.deepcopy(observation))
        return step(observation)

    runtime.step = recorded  # type: ignore[method-assign]
    driver, suite = closed_loop_episode.PolicyDriver(runtime), env.suites.varied or env.suites.default
    seeds = range(first_seed, first_seed + count)
    jobs = [(member, seed) for seed in seeds for member in env.suites.members(suite)][:count]
    for name, seed in progress(jobs, unit="episodes"):
        start = env.reset(name, seed)
        episodes.append((start.instruction, []))
        result, _ = closed_loop_episode.run(driver, env, start, name, seed)
        say(f'  seed {seed}: "{start.instruction}": {len(episodes[-1][1])} ticks, {result.reason or "done"}')
    env.close()
    return episodes


def replay(
    model: VlaPolicy, config: checkpoints.CheckpointConfig, engine: engines.Engine, episodes: list[Episode]
) -> list:
    """The outputs of this engine for every tick of the episodes."""
    runtime = PolicyRuntime(model, config, engine=engine)
    outputs = []
    for text, observations in progress(episodes, unit="episodes", label=f"through {engine.name} {engine.precision}"):
        runtime.set_instruction(text)
        outputs += [runtime.step(observation) for observation in observations]
    return outputs


def compare(found: list, wanted: list) -> dict[str, dict[str, float]]:
    """Median, 95th percentile and maximum of what differs, over the ticks in which both act."""
    both = [(a, b) for a, b in zip(found, wanted, strict=True) if a.actions is not None and b.actions is not None]
    if not both:
        raise ValueError("the policy acts in no tick of these episodes")
    off = np.stack([a.actions - b.actions for a, b in both])
    measures = {
        "target, mm": np.array([1e3 * np.linalg.norm(a.target - b.target) for a, b in both]),
        "translation of a row, mm": 1e3 * np.linalg.norm(off[..., :3], axis=-1),
        "end of a chunk, mm": 1e3 * np.linalg.norm(off[..., :3].sum(1), axis=-1),
        "rotation of a row, rad": np.linalg.norm(off[..., 3:6], axis=-1),
        "gripper opening, 0..1": np.abs(off[..., 6]),
        "grounding, 0..1": np.array([abs(a.feasibility - b.feasibility) for a, b in both]),
    }
    table = {
        name: {"p50": float(np.median(v)), "p95": float(np.quantile(v, 0.95)), "max": float(v.max())}
        for name, v in measures.items()
    }
    other = sum((a.actions is None) != (b.actions is None) for a, b in zip(found, wanted, strict=True))
    return table | {"ticks in which only one acts": {"count": other, "of": len(found)}}


def difference_table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"  {'':26} {'p50':>10} {'p95':>10} {'max':>10}"]
    for name, row in rows.items():
        lines.append(f"  {name:30} {row['count']} of {row['of']}" if "count" in row else
                     f"  {name:26} {row['p50']:10.4f} {row['p95']:10.4f} {row['max']:10.4f}")  # fmt: skip
    return "\n".join(lines)


def calibrate(
    folder: Path, model: VlaPolicy, config: checkpoints.CheckpointConfig, count: int, threads: int, env: str
) -> None:
    """Writes int8.json into the folder and prints what 8 bits change. EngineError when OpenVINO is not there."""
    if reason := engines.why_not("openvino", model):
        raise engines.EngineError(reason)
    print(f"driving {count} episodes in the simulator")
    episodes = drive(model, config, count, env)
    learned, held_out = episodes[: count // 2], episodes[count // 2 :]
    recorder = Recorder(model)
    wanted = replay(model, config, engines.TorchEngine(model), held_out)
    replay(model, config, recorder, learned)
    frames = recorder.frames + [blind(frame) for frame in recorder.frames[::BLIND]]
    ranges = quantize.calibrate(model, frames)
    about: dict = {"calibrated on": f"{len(frames)} frames of {len(learned)} simulated episodes, "
                                    f"{len(frames) - len(recorder.frames)} of them without depth"}  # fmt: skip
    path = quantize.save(folder, model, ranges, about)
    for precision in ("f32", "int8"):
        engine = engines.load(model, "openvino", threads, folder, precision)
        rows = compare(replay(model, config, engine, held_out), wanted)
        about[f"{precision} against torch, {len(wanted)} ticks of {len(held_out)} other episodes"] = rows
        print(f"openvino {precision} against torch, {len(wanted)} ticks of {len(held_out)} held-out episodes:")
        print(difference_table(rows))
    quantize.save(folder, model, ranges, about)
    print(f"wrote {path}")


def prepare(args: cli.Options) -> int:
    """The command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vla_nodes").setLevel(logging.INFO)
    folder = args.checkpoint or share_path(SHIPPED_CHECKPOINT)
    torch.set_num_threads(args.threads)
    model, config = checkpoints.load(folder)
    if args.calibrate:
        calibrate(folder, model, config, args.episodes, args.threads, args.env)
    started = time.perf_counter()
    engine = engines.load(model, args.engine, args.threads, folder, args.precision)
    seconds = time.perf_counter() - started
    _, ms = engines.run_ticks(engine, model, engines.TIMED_TICKS)
    version = graphs.version(engine.name) if engine.name != "torch" else torch.__version__
    print(
        f"{folder}: {engine.name} {version} {engine.precision}, ready in {seconds:.1f} s, "
        f"{ms:.1f} ms a tick (fastest of {engines.TIMED_TICKS}), off torch by {engine.error:.1e} at most"
    )
    return 0


command = cli.Command(
    "engine",
    """
    A checkpoint's fast CPU graphs, made, proven and timed before the robot needs them.

    Without it the first start with a new checkpoint does the same. With --calibrate it drives episodes in the
    simulator, measures on the first half of them the ranges that 8-bit convolutions need (int8.json in the checkpoint
    folder), and on the second half, carrying the state through every tick, what 8 bits change in millimetres.
    """,
    prepare,
    cli.checkpoint(),
    cli.engine(engines.NAMES, "what computes the policy; auto chooses as policy_node does"),
    cli.option("--precision", type=click.Choice(engines.PRECISIONS), default="auto",
               help="auto is int8 where the checkpoint brings its ranges, else f32"),
    cli.count("--threads", "CPU threads; policy_node takes one", 1),
    *cli.section(
        "Calibration",
        cli.flag("--calibrate", "measure the ranges for 8 bits first (needs MuJoCo)"),
        cli.option("--env", type=click.Choice(envs.NAMES), default=envs.DEFAULT, help="environment to calibrate in"),
        cli.count("--episodes", "simulated episodes, half of them to calibrate on", 12, least=2),
    ),
    examples="""
    python -m vla_nodes engine --checkpoint work/nano
    python -m vla_nodes engine --checkpoint work/nano --calibrate
    """,
    errors=(ValueError, OSError),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

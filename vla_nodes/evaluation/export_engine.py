"""``python -m vla_nodes engine``: a checkpoint's fast CPU graphs, made, proven and timed before the robot needs them.

Without it the first start with a new checkpoint does the same. With --calibrate it drives episodes in the simulator,
measures on the first half of them the ranges that 8-bit convolutions need (int8.json in the checkpoint folder), and on
the second half, carrying the state through every tick, what 8 bits change in millimetres.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vla_nodes.envs import base as envs
from vla_nodes.policy import checkpoint as checkpoints
from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.inference import graphs, quantize
from vla_nodes.policy.runtime import Observation, PolicyRuntime
from vla_nodes.share import share_path

SHIPPED = "resource/checkpoints/nano"
FIRST_SEED = 500_000  # of the episodes; training and evaluation use others
EVERY = 5  # of the ticks are calibrated on: neighbours look alike
BLIND = 4  # of these, every so many once more without depth
Episode = tuple[str, list[Observation]]


class Recorder(engines.TorchEngine):
    """Eager PyTorch that keeps the inputs of every so many looks."""

    def __init__(self, model) -> None:
        super().__init__(model)
        self.frames: list[tuple] = []
        self._ticks = 0

    def look(self, *inputs):
        if self._ticks % EVERY == 0:
            self.frames.append(inputs)
        self._ticks += 1
        return super().look(*inputs)


def blind(frame: tuple) -> tuple:
    """The inputs of a look at the same image without depth."""
    color, depth, *others = frame
    return color, torch.zeros_like(depth), *others


def drive(model, config, count: int, name: str, first_seed: int = FIRST_SEED) -> list[Episode]:
    """What the policy saw while it drove in an environment, episode by episode."""
    from vla_nodes.evaluation import closed_loop_episode  # here: it needs none of it without --calibrate

    runtime, env = PolicyRuntime(model, config), envs.make(name)
    episodes: list[Episode] = []
    step = runtime.step

    def recorded(observation: Observation):
        episodes[-1][1].append(copy.deepcopy(observation))
        return step(observation)

    runtime.step = recorded  # type: ignore[method-assign]
    driver, suite = closed_loop_episode.PolicyDriver(runtime), env.suites.varied or env.suites.default
    for name, seed in [(member, seed) for seed in range(first_seed, first_seed + count)
                       for member in env.suites.members(suite)][:count]:  # fmt: skip
        start = env.reset(name, seed)
        episodes.append((start.instruction, []))
        result, _ = closed_loop_episode.run(driver, env, start, name, seed)
        print(f'  seed {seed}: "{start.instruction}": {len(episodes[-1][1])} ticks, {result.reason or "done"}',
              flush=True)  # fmt: skip
    env.close()
    return episodes


def replay(model, config, engine, episodes: list[Episode]) -> list:
    """The outputs of this engine for every tick of the episodes."""
    runtime = PolicyRuntime(model, config, engine=engine)
    outputs = []
    for text, observations in episodes:
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
        "grounding, 0..1": np.array([abs(a.grounding - b.grounding) for a, b in both]),
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


def calibrate(folder: Path, model, config, count: int, threads: int, env: str) -> None:
    """Writes int8.json into the folder and prints what 8 bits change. EngineError when OpenVINO is not there."""
    if reason := engines.why_not("openvino", model):
        raise engines.EngineError(reason)
    if count < 2:
        raise ValueError("--episodes must be at least 2: one half is calibrated on, the other compared")
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_nodes engine", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, help=f"checkpoint folder (default: the shipped {SHIPPED})")
    parser.add_argument("--engine", choices=engines.NAMES, default="auto", help="default auto, as policy_node chooses")
    parser.add_argument("--precision", choices=engines.PRECISIONS, default="auto", help="default auto: int8 where the "
                        "checkpoint brings its ranges, else f32")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1, as policy_node)")
    parser.add_argument("--calibrate", action="store_true", help="measure the ranges for 8 bits first (needs MuJoCo)")
    parser.add_argument(
        "--env", choices=envs.NAMES, default=envs.DEFAULT, help="environment to calibrate in (default %(default)s)"
    )
    parser.add_argument("--episodes", type=int, default=12, help="simulated episodes to calibrate on (default 12)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vla_nodes").setLevel(logging.INFO)
    folder = args.checkpoint or share_path(SHIPPED)
    torch.set_num_threads(max(1, args.threads))
    try:
        model, config = checkpoints.load(folder)
        if args.calibrate:
            calibrate(folder, model, config, args.episodes, args.threads, args.env)
        started = time.perf_counter()
        engine = engines.load(model, args.engine, args.threads, folder, args.precision)
    except (ValueError, OSError) as error:
        print(f"engine: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    _, ms = engines.run_ticks(engine, model, engines.TIMED_TICKS)
    version = graphs.version(engine.name) if engine.name != "torch" else torch.__version__
    print(
        f"{folder}: {engine.name} {version} {engine.precision}, ready in {seconds:.1f} s, "
        f"{ms:.1f} ms a tick (fastest of {engines.TIMED_TICKS}), off torch by {engine.error:.1e} at most"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

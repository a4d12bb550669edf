"""``python -m vla_nodes train``: one command for both stages, for the whole recipe, and for fine-tuning.

    train ground.yaml             stage 1: language meets vision, on still scenes
    train words.yaml              stage 1, from words alone: many wordings for the same
    train offset.yaml, judge.yaml the small parts of stage 1, each by itself
    train act.yaml                stage 2: action chunks, from demonstrations
    train recipe.yaml             all of it: scenes, demonstrations, both stages, checkpoint, evaluation
    train --data DIR              fine-tune the shipped policy on episodes of your own, made from bags

A name is a file, or one of the shipped configurations in config/train. The same command again goes on where the last
one ended, however it ended. On several GPUs it starts one process for each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from vla_nodes.datasets.episode import DataError
from vla_nodes.policy.checkpoint import CheckpointError
from vla_nodes.training import config as reading
from vla_nodes.training.config import (
    ActSettings,
    GroundSettings,
    PartSettings,
    Settings,
    SettingsError,
    WordsSettings,
)
from vla_nodes.training.state import WEIGHTS, StateError

FINE_TUNE = "finetune.yaml"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m vla_nodes train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="YAML file, or the name of one in config/train")
    parser.add_argument("--data", nargs="+", help="folders of episodes")
    parser.add_argument("--out", help="folder of the run")
    parser.add_argument("--minutes", type=float, help="time to train (data and cache come on top)")
    parser.add_argument("--steps", type=int, help="steps to train, should they end first")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the YAML file")
    parser.add_argument("--show", action="store_true", help="print the settings and exit")
    args = parser.parse_args(argv)
    if args.config is None and not args.data:
        parser.error("name a configuration (ground.yaml, act.yaml, recipe.yaml), or give --data to fine-tune on")
    try:
        path = reading.find(args.config or FINE_TUNE)
        values = reading.read(path)
        named = {k: getattr(args, k) for k in ("data", "out", "minutes", "steps") if getattr(args, k) is not None}
        values |= dict(map(reading.assignment, args.set)) | named
        if values.get("stage") == "recipe":
            from vla_nodes.training import recipe

            return recipe.run(values, str(path), show=args.show)
        settings = reading.build(values, str(path))
        if args.show:
            print(json.dumps(reading.plain(settings), indent=1))
            return 0
        if (count := processes(settings)) > 1 and "WORLD_SIZE" not in os.environ:
            os.execv(
                sys.executable,
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc-per-node={count}",
                    "-m",
                    "vla_nodes",
                    "train",
                    *argv,
                ],
            )
        return run(settings)
    except (SettingsError, StateError, DataError, CheckpointError, FileNotFoundError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2


def processes(settings: Settings) -> int:
    """How many work together: as asked, or one for each GPU."""
    if settings.processes is not None:
        return settings.processes
    return 1 if settings.device == "cpu" else max(1, torch.cuda.device_count())


def run(settings: Settings) -> int:
    """Train one stage to the end of its budget; 0 when it got there, 130 when it was asked to stop before."""
    from vla_nodes.training import initialize
    from vla_nodes.training import trainer as loops

    accelerator = loops.launch(settings)
    say = print if accelerator.is_main_process else lambda *_: None
    begun = initialize.begin(settings, say)
    score = None
    if isinstance(settings, ActSettings):
        stage = act(begun.model, settings, accelerator, say)
        if settings.score_minutes and accelerator.is_main_process:
            from vla_nodes.training.closed_loop_score import Score

            score = Score(settings, lambda folder: export(begun, folder, settings))
    elif isinstance(settings, PartSettings):
        from vla_nodes.training.stages.heads import PartStage

        with accelerator.main_process_first():  # the others find the examples
            stage = PartStage(begun.model, settings, say)
    elif isinstance(settings, WordsSettings):
        from vla_nodes.training.stages.paraphrase import WordsStage

        stage = WordsStage(begun.model, settings, say)
    else:
        from vla_nodes.training.stages.grounding import GroundStage

        assert isinstance(settings, GroundSettings)
        stage = GroundStage(begun.model, settings)
        say(f"{stage.data['episodes']} episodes to learn from, {stage.data['held out']} held out")
    learnt = sum(p.numel() for _, p in stage.trained)
    say(
        f"{learnt:,} of {sum(p.numel() for p in begun.model.parameters()):,} parameters learn, on "
        f"{accelerator.num_processes} x {accelerator.device.type}, {settings.precision} bit"
    )
    run = loops.Loop(stage, settings, accelerator, score)
    finished = run.run()
    if finished and isinstance(settings, ActSettings) and accelerator.is_main_process:
        with run.averages.applied():
            export(begun, settings.out / "checkpoint", settings, run)
    accelerator.end_training()
    return 0 if finished else 130


def act(model, settings: ActSettings, accelerator, say):
    """Stage 2, its visual tokens made first where they are missing."""
    from vla_nodes.training import token_cache
    from vla_nodes.training.stages.action import ActStage

    model.eval().requires_grad_(False)
    fingerprint = token_cache.made_by(model, settings.seed, settings.depth)
    folder = settings.cache or settings.out / "cache"
    if len({data.resolve().name for data in settings.data}) < len(settings.data):
        raise SettingsError(f"data: two of {', '.join(map(str, settings.data))} have the same last name")
    with accelerator.main_process_first():  # the others find it full
        paths = [
            path
            for data in settings.data
            for path in token_cache.fill(
                model,
                data,
                folder / data.resolve().name,
                settings.seed,
                say,
                fingerprint,
                settings.cache_workers,
                settings.depth,
            )
        ]
    return ActStage(model, settings, paths, say)


def export(begun, folder: Path, settings: Settings, run=None) -> None:
    """The checkpoint folder of a model in training."""
    from vla_nodes.training.export import write

    made = {"settings": reading.plain(settings)}
    if run is not None:
        made |= {"steps": run.step, "minutes": round(run.seconds / 60, 1), "data": run.stage.data}
        made |= {"held out": run.stage.measure(), "began with": begun.config.provenance if begun.config else None}
        print(f"{folder} and {settings.out / WEIGHTS} written")
    write(folder, begun.model, begun.tokenizer, made, settings.depth, begun.config)


if __name__ == "__main__":
    raise SystemExit(main())

"""Train: either stage, the whole recipe, or fine-tuning on episodes of one's own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click
import torch

from vla_nodes import cli
from vla_nodes.datasets.episode import DataError
from vla_nodes.envs.base import EnvError
from vla_nodes.policy.checkpoint import CheckpointError
from vla_nodes.training import config as reading
from vla_nodes.training.config import (
    ActionSettings,
    GroundingSettings,
    HeadSettings,
    ParaphraseSettings,
    Settings,
    SettingsError,
)
from vla_nodes.training.state import WEIGHTS, StateError

FINE_TUNE = "finetune.yaml"


def train(args: cli.Options) -> int:
    """The command."""
    if args.config is None and not args.data:
        raise click.UsageError("name a CONFIG (action.yaml, recipe.yaml, ...), or give --data to fine-tune on")
    path = reading.find(args.config or FINE_TUNE)
    values = reading.read(path)
    named = {name: getattr(args, name) for name in ("out", "minutes", "steps", "seed")}
    values |= dict(map(reading.assignment, args.set)) | {k: v for k, v in named.items() if v is not None}
    if args.data:
        values["data"] = list(args.data)
    if values.get("stage") == "recipe":
        from vla_nodes.training import recipe

        return recipe.run(values, str(path), show=args.show)
    settings = reading.build(values, str(path))
    if args.show:
        print(json.dumps(reading.plain(settings), indent=1))
        return cli.ExitStatus.DONE
    if (count := processes(settings)) > 1 and "WORLD_SIZE" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        os.execv(sys.executable, [sys.executable, *launcher, "-m", "vla_nodes", "train", *args.words()])
    return run(settings)


def processes(settings: Settings) -> int:
    """How many work together: as asked, or one for each GPU."""
    if settings.processes is not None:
        return settings.processes
    return 1 if settings.device == "cpu" else max(1, torch.cuda.device_count())


def run(settings: Settings) -> int:
    """Train one stage: DONE after its last step, else FAILED (ended by --minutes) or INTERRUPTED (by a signal)."""
    from vla_nodes.training import initialize
    from vla_nodes.training import trainer as loops

    accelerator = loops.launch(settings)
    say = print if accelerator.is_main_process else lambda *_: None
    begun = initialize.begin(settings, say)
    score = None
    if isinstance(settings, ActionSettings):
        stage = action(begun.model, settings, accelerator, say)
        if settings.score_minutes and accelerator.is_main_process:
            from vla_nodes.training.closed_loop_score import Score

            score = Score(settings, lambda folder: export(begun, folder, settings))
    elif isinstance(settings, HeadSettings):
        from vla_nodes.training.stages.heads import HeadStage

        with accelerator.main_process_first():  # the others find the examples
            stage = HeadStage(begun.model, settings, say)
    elif isinstance(settings, ParaphraseSettings):
        from vla_nodes.training.stages.paraphrase import ParaphraseStage

        stage = ParaphraseStage(begun.model, settings, say)
    else:
        from vla_nodes.training.stages.grounding import GroundingStage

        assert isinstance(settings, GroundingSettings)
        stage = GroundingStage(begun.model, settings)
        say(f"{stage.data['episodes']} episodes to learn from, {stage.data['held out']} held out")
    learnt = sum(p.numel() for _, p in stage.trained)
    say(
        f"{learnt:,} of {sum(p.numel() for p in begun.model.parameters()):,} parameters learn, on "
        f"{accelerator.num_processes} x {accelerator.device.type}, {settings.precision} bit"
    )
    run = loops.Loop(stage, settings, accelerator, score)
    finished = run.run()
    capped = run.capped
    if (finished or capped) and isinstance(settings, ActionSettings) and accelerator.is_main_process:
        with run.ema.applied():
            export(begun, settings.out / "checkpoint", settings, run)
    accelerator.end_training()
    if capped:
        return cli.ExitStatus.FAILED
    return cli.ExitStatus.DONE if finished else cli.ExitStatus.INTERRUPTED


def action(model, settings: ActionSettings, accelerator, say):
    """Stage 2, its visual tokens made first where they are missing."""
    from vla_nodes.training import token_cache
    from vla_nodes.training.stages.action import ActionStage

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
    return ActionStage(model, settings, paths, say)


def export(begun, folder: Path, settings: Settings, run=None) -> None:
    """The checkpoint folder of a model in training."""
    from vla_nodes.training.export import write

    made = {"settings": reading.plain(settings)}
    if run is not None:
        made |= {"steps": run.step, "minutes": round(run.seconds / 60, 1), "data": run.stage.data}
        made |= {"held out": run.stage.measure(), "began with": begun.config.provenance}
        print(f"{folder} and {settings.out / WEIGHTS} written")
    write(folder, begun.model, begun.tokenizer, made, begun.config)


command = cli.Command(
    "train",
    """
    Train the policy: either stage, the whole recipe, or fine-tuning on episodes of your own.

    The shipped configurations, in config/train:

        perception.yaml           stage 1: what stands where, on static scenes
        grounding.yaml            stage 1: language meets vision
        paraphrase.yaml           stage 1, from sentences alone: many wordings for the same
        placement_head.yaml       stage 1, one small head: where does it go?
        feasibility_head.yaml     stage 1, the other: is all of it there, and can it be done?
        action.yaml               stage 2: action chunks, from demonstrations
        recipe.yaml               all of it: scenes, demonstrations, both stages, checkpoint, evaluation
        finetune.yaml             the shipped policy goes on with --data; this one if no other is named

    The same command again goes on where the last one ended, however it ended, and comes to the same curve: batches and
    learning rate follow from the step alone. With --minutes it stops there, done or not, with status 1. On several GPUs
    it starts one process for each, and a step takes a batch of every process.
    """,
    train,
    cli.argument("[CONFIG]", "YAML file, or the name of one in config/train", required=False),
    cli.option("--data", multiple=True, metavar="DIR", help="folder of episodes (repeatable)"),
    cli.option("--out", metavar="DIR", help="folder of the run"),
    cli.number("--minutes", "a cap [min]: stop after so long, done or not; data and cache come on top"),
    cli.count("--steps", "how long to train; the learning rate falls until the last step"),
    cli.seed("seed of the run", default=None),
    cli.option("--set", multiple=True, metavar="KEY=VALUE", help="any key of the YAML file (repeatable)"),
    cli.flag("--show", "print the settings, or a recipe's commands, and exit"),
    examples="""
    python -m vla_nodes train recipe.yaml --out work
    python -m vla_nodes train grounding.yaml --set start=work/perception/weights.safetensors
    python -m vla_nodes train --data data --data more --out work/mine
    """,
    errors=(SettingsError, StateError, DataError, EnvError, CheckpointError, FileNotFoundError),
)


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

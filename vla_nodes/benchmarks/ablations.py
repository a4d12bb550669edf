"""What each part of the design is worth: variants trained alike and measured in closed loop, as a table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_nodes import cli
from vla_nodes.share import share_path
from vla_nodes.training import config as settings
from vla_nodes.training import recipe
from vla_nodes.training.closed_loop_score import successes
from vla_nodes.training.config import CONFIGS, SettingsError
from vla_nodes.training.state import WEIGHTS

FULL, GROUND = "full", "grounding"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> keys of every ablation, the full design first."""
    found = {path.stem: settings.read(path) for path in sorted(folder.glob("*.yaml")) if "." not in path.stem}
    if FULL not in found:
        raise SettingsError(f"{folder}: no {FULL}.yaml to compare with")
    return {FULL: found.pop(FULL), **found}


def steps_of(name: str, values: dict[str, Any], folder: Path, args: cli.Options) -> list[str]:
    """The commands of one ablation. Eyes are trained once for all ablations that share them."""
    steps, out = [], args.out / name
    pairs = [f"language={args.language}"] if args.language else []
    if values.get("grounded") is not None:
        own = folder / f"{name}.{GROUND}.yaml"
        config, eyes = (own, own.stem) if own.is_file() else (folder.parent / f"{GROUND}.yaml", GROUND)
        weights = args.out / "eyes" / eyes / WEIGHTS
        if eyes == GROUND and args.grounded:
            weights = args.grounded
        elif not args.static_scenes:
            raise SettingsError(f"{name} trains eyes of its own: give --static-scenes, or name others with --only")
        else:
            begun = [f"start={args.grounded}"] if args.grounded else []
            steps.append(_train(config, weights.parent, args.static_scenes, args.eyes_steps, [*pairs, *begun]))
        pairs = [*pairs, f"grounded={weights}", f"cache={args.out}/cache/{eyes}"]
    steps.append(_train(folder / f"{name}.yaml", out, args.data, args.steps, pairs))
    steps.append(shlex.join(["eval", "--checkpoint", str(out / "checkpoint"), "--suite", args.suite, "--episodes",
                             str(args.episodes), "--seed", str(args.seed), "--out", str(out / "eval")]))  # fmt: skip
    return steps


def _train(config: Path, out: Path, data: Sequence[str], steps: int | None, pairs: list[str]) -> str:
    budget = [] if steps is None else ["--steps", str(steps)]
    words = ["train", str(config), "--out", str(out), *budget]
    repeated = [("--data", str(folder)) for folder in data] + [("--set", pair) for pair in pairs]
    return shlex.join([*words, *(word for each in repeated for word in each)])


def table(names: dict[str, dict[str, Any]], out: Path) -> str:
    """Markdown: one row per ablation, with its difference to the full design in points.

    Its last column says how far off the end of a chunk is in demonstrations that are held out.
    """
    from vla_nodes.evaluation.metrics import wilson

    lines = ["| design | success | 95 % interval | difference | end of a chunk |", "| --- | --- | --- | --- | --- |"]
    whole = None
    for name, values in names.items():
        what = values.get("what") or name
        try:
            won, count = successes(out / name / "eval" / "eval.json")
        except ValueError:
            lines.append(f"| {what} | not done | | | |")
            continue
        low, high = wilson(won, count)
        rate = won / max(1, count)
        whole = rate if name == FULL else whole
        change = "" if whole is None or name == FULL else f"{100 * (rate - whole):+.0f} points"
        made = json.loads((out / name / "checkpoint/config.json").read_text())["provenance"]
        end = f"{made['held out']['end mm']:.0f} mm off" if made.get("held out") else ""
        lines.append(f"| {what} | {won}/{count} = {rate:.0%} | {low:.0%} to {high:.0%} | {change} | {end} |")
    return "\n".join(lines)


def compare(args: cli.Options) -> int:
    """The command."""
    folder = share_path(f"{CONFIGS}/ablations")
    names = read(folder)
    if args.only:
        if unknown := sorted(set(args.only) - set(names)):
            raise SettingsError(f"--only: no ablation {', '.join(unknown)}; there are {', '.join(names)}")
        names = {name: names[name] for name in args.only}
    steps: list[str] = []
    for name, values in names.items():
        steps += [step for step in steps_of(name, values, folder, args) if step not in steps]
    escaped = [step.replace("{", "{{").replace("}", "}}") for step in steps]
    status = recipe.run({"out": str(args.out), "steps": escaped}, "ablations", args.show)
    if args.show:
        return status
    text = table(names, args.out)
    print(text)
    (args.out / "table.md").write_text(text + "\n")
    return status


command = cli.Command(
    "ablations",
    """
    What each part of the design is good for, trained alike, measured in closed loop.

    Every NAME.yaml of config/train/ablations says one difference from action.yaml, and NAME.grounding.yaml, where there
    is one, the same of grounding.yaml. Each is trained for the same steps and evaluated on the same episodes; the table
    is printed and written. The same command again goes on where the last one ended.
    """,
    compare,
    cli.option("--data", multiple=True, required=True, metavar="DIR", help="folder of demonstrations (repeatable)"),
    cli.out("folder for everything", required=True),
    cli.option("--only", type=cli.Several(), metavar="NAME,NAME", help="ablations; without it all"),
    cli.flag("--show", "print the commands and exit"),
    *cli.section(
        "Stage 1",
        cli.option("--static-scenes", multiple=True, metavar="DIR", help="folder of pictures for eyes (repeatable)"),
        cli.option("--grounded", type=cli.PATH, metavar="FILE", help="weights of the full design, in place of training "
                   "them; eyes of an ablation's own begin with them"),
        cli.option("--language", type=cli.PATH, metavar="DIR", help="as the key of action.yaml"),
        cli.count("--eyes-steps", "steps of each; without it those of grounding.yaml"),
    ),
    *cli.section(
        "Stage 2",
        cli.count("--steps", "steps of each; without it those of action.yaml"),
    ),
    *cli.section(
        "Evaluation",
        cli.option("--suite", metavar="SUITE", default="all", help="as for eval"),
        cli.count("--episodes", "episodes per suite", 10),
        cli.seed("seed of the first episode"),
    ),
    examples="""
    python -m vla_nodes ablations --data work/data --static-scenes work/scenes --out work/ablations
    python -m vla_nodes ablations --data work/data --static-scenes work/scenes --out work/few --only full --show
    """,
    errors=(SettingsError, FileNotFoundError),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

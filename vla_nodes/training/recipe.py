"""The whole recipe as one command: a list of vla_nodes commands in YAML, each done once, in order.

    stage: recipe
    out: work                    # {out} in the steps
    steps: ["collect --out {out}/data", "train grounding.yaml --out {out}/grounding", ...]

Every step can be stopped and gone on with by itself; those that ended well are noted in {out}/recipe.json and left out
the next time, until the step's words or one before it change.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

from vla_nodes import cli
from vla_nodes.__main__ import COMMANDS
from vla_nodes.training import subprocess_cli
from vla_nodes.training.config import SettingsError

DONE = "recipe.json"
KEYS = {"stage", "out", "steps", "vars"}


def steps_of(values: dict[str, Any], source: str) -> tuple[Path, list[str]]:
    """Folder and commands, with {out} and the ``vars`` filled in. SettingsError names what is wrong."""
    if unknown := sorted(set(values) - KEYS):
        raise SettingsError(f"{source}: unknown key {', '.join(unknown)}; a recipe has {', '.join(sorted(KEYS))}")
    steps, given = values.get("steps"), values.get("vars") or {}
    if not values.get("out") or not isinstance(steps, list) or not all(isinstance(s, str) and s for s in steps):
        raise SettingsError(f"{source}: a recipe needs out, a folder, and steps, a list of commands")
    if not isinstance(given, dict):
        raise SettingsError(f"{source}: vars must be a mapping of names to values")
    words = {**given, "out": shlex.quote(str(values["out"]))}
    filled = []
    for step in steps:
        try:
            filled.append(" ".join(step.format(**words).split()))
        except (LookupError, ValueError) as error:
            raise SettingsError(f"{source}: step {step!r}: no value for {error}") from None
        if filled[-1].split()[0] not in COMMANDS:
            raise SettingsError(f"{source}: {step!r} is no command; there are {', '.join(COMMANDS)}")
    return Path(values["out"]), filled


def run(values: dict[str, Any], source: str, show: bool = False) -> int:
    """0 when every step ended well, else the exit status of the first that did not."""
    out, steps = steps_of(values, source)
    if show:
        print("\n".join(f"{cli.PROGRAM} {step}" for step in steps))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    done = _done(out)
    while len(done) > len(steps) or [row["step"] for row in done] != steps[: len(done)]:
        done.pop()  # the recipe changed from here on
    for index, step in enumerate(steps):
        label = f"[{index + 1}/{len(steps)}] {step}"
        if index < len(done):
            print(f"{label}: done before, in {done[index]['minutes']:.1f} min", flush=True)
            continue
        print(label, flush=True)
        started = time.monotonic()
        if status := _call(shlex.split(step)):
            cli.complain(f"{label}: ended with status {status}: the same command goes on from there", "vla_nodes train")
            return status
        done.append({"step": step, "minutes": round((time.monotonic() - started) / 60, 2)})
        partial = out / f"{DONE}.partial"
        partial.write_text(json.dumps(done, indent=1) + "\n")
        os.replace(partial, out / DONE)
    print(f"{source}: all {len(steps)} steps done in {sum(row['minutes'] for row in done):.1f} min, see {out}")
    return 0


def _done(out: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((out / DONE).read_text()))
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        raise SettingsError(f"{out / DONE}: damaged; delete it (finished steps are quick to repeat)") from None


def _call(arguments: list[str]) -> int:
    """A command in a process of its own, which ends when this one does; a signal to end is passed on."""
    process = subprocess_cli.start(arguments, start_new_session=True)  # or a Ctrl-C would reach it twice

    def pass_on(number: int, frame: Any) -> None:
        process.send_signal(number)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

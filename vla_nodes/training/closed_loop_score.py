"""The closed-loop score beside a training run: now and then the weights of the moment drive the simulated robot.

A child process of low priority runs `python -m vla_nodes eval`; training goes on meanwhile.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

from vla_nodes.training import subprocess_cli
from vla_nodes.training.config import Settings


def successes(path: Path) -> tuple[int, int]:
    """(successes, episodes) of the eval.json that `eval --out` wrote. ValueError when it is something else."""
    try:
        rows = json.loads(path.read_text())["episodes"]
        return sum(bool(row["success"]) for row in rows), len(rows)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: no evaluation ({type(error).__name__}: {error})") from None


class Score:
    """Starts an evaluation every so many minutes and reports it when it is done."""

    def __init__(self, settings: Settings, write) -> None:
        """``write(folder)`` makes a checkpoint of the weights of the moment."""
        self.settings, self.write = settings, write
        self.folder = settings.out / "scored"
        self._child: subprocess.Popen | None = None
        self._step, self._last = 0, None

    def poll(self, loop) -> None:
        """Once a step: costs nothing unless an evaluation begins or has ended."""
        if self._child is not None:
            if self._child.poll() is not None:
                self._report(loop)
            return
        if self._last is None:
            self._last = loop.seconds
        if loop.seconds - self._last > 60 * self.settings.score_minutes:
            self._last = loop.seconds
            self._start(loop)

    @property
    def _json(self) -> Path:
        return self.folder / "eval.json"

    def _start(self, loop) -> None:
        with loop.ema.applied():
            self.write(self.folder / "checkpoint")
        self._json.unlink(missing_ok=True)
        command = ["eval", "--checkpoint", str(self.folder / "checkpoint"),
                   "--episodes", str(self.settings.score_episodes), "--workers", "1", "--engine", "torch",
                   "--out", str(self.folder), *shlex.split(self.settings.score_args)]  # fmt: skip
        self._step = loop.step
        with open(self.folder / "log.txt", "w") as log:
            self._child = subprocess_cli.start(command, nice=10, stdout=log, stderr=log)

    def _report(self, loop) -> None:
        ended, self._child = self._child, None
        try:
            won, count = successes(self._json)
        except ValueError as error:
            loop.progress.say(f"          no closed-loop score (exit {ended.returncode}): {error}; "
                              f"see {self.folder / 'log.txt'}")  # fmt: skip
            return
        loop.progress.scored(loop, {"success": won / max(1, count)},
                             f"closed loop, weights of step {self._step}: {won} of {count} episodes")  # fmt: skip

    def stop(self) -> None:
        """End a child that is still running."""
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(10)
            except subprocess.TimeoutExpired:
                self._child.kill()

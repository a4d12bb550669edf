"""The loop both stages train in: resumable at any moment, the same curve again after a kill.

The batch of step k and every random number of that step follow from (seed, k), never from the timing of threads; the
rest is in the state file. On several processes (Hugging Face accelerate) every rank draws its own batches and the first
one decides about time, measures and writes.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vla_nodes.training import state as states
from vla_nodes.training.config import BUDGET, Settings, SettingsError, plain
from vla_nodes.training.run_log import Progress

Terms = tuple[Tensor, dict[str, Tensor], dict[str, float]]  # total to descend, its terms, what a person wants to know


class Stage(Protocol):
    """What a stage brings to the loop."""

    objective: nn.Module  # called with a batch, returns Terms
    trained: list[tuple[str, nn.Parameter]]
    data: dict[str, Any]  # what the examples are drawn from, for the record

    def batch(self, step: int, rank: int) -> Any:
        """Examples of a step: a function of its arguments and the seed alone. Called from threads."""
        ...

    def measure(self) -> dict[str, float]:
        """On held-out episodes."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """What the next stage needs."""
        ...


def launch(settings: Settings):
    """The accelerator of this process: device, precision and peers."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError:
        raise SettingsError("training needs accelerate: pip install -r requirements/train.txt") from None

    torch.set_num_threads(settings.threads)
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.device == "cuda" and cpu:
        raise SettingsError("device is cuda and this machine has none that torch can use; set device to cpu or auto")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # of the others while the first fills the cache
    precision = "bf16" if settings.precision == "bf16" else "no"
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[patience])


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in dicts, lists and tuples, moved; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(entry, device) for key, entry in value.items()}
    if hasattr(value, "_fields"):  # a NamedTuple
        return type(value)(*(to_device(entry, device) for entry in value))
    if type(value) in (list, tuple):
        return type(value)(to_device(entry, device) for entry in value)
    return value


def on(device: torch.device):
    """Tensors that the losses make lie on ``device``."""
    return nullcontext() if device.type == "cpu" else torch.device(device)


@contextmanager
def feed(make: Callable[[int], Any], start: int, workers: int) -> Iterator[Callable[[], Any]]:
    """``make(start)``, ``make(start + 1)``, ... in this order, prepared ahead by threads (decoding frees the lock)."""
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="batches")
    ahead: deque = deque()
    following = start

    def take() -> Any:
        nonlocal following
        while len(ahead) < max(1, workers) + 3:
            ahead.append(pool.submit(make, following))
            following += 1
        return ahead.popleft().result()

    try:
        yield take
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Ema:
    """Exponential moving averages of parameters: they drive an arm more steadily than the last step's values."""

    def __init__(self, parameters: list[Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        keep = min(self.decay, step / (step + 20))  # the first steps are soon forgotten
        for mean, parameter in zip(self.values, self.parameters, strict=bool(self.decay)):
            mean.lerp_(parameter.to(mean.dtype), 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters are their averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mean, parameter in zip(self.values, self.parameters, strict=bool(self.decay)):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)


class Interrupt:
    """SIGINT and SIGTERM end the loop after the step in hand, with its state saved; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)


class Loop:
    """One run of one stage."""

    def __init__(self, stage: Stage, settings: Settings, accelerator, score=None) -> None:
        self.stage, self.settings, self.accelerator, self.score = stage, settings, accelerator, score
        self.first = accelerator.is_main_process
        self.parameters = [p for _, p in stage.trained]
        stage.objective.to(accelerator.device)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, betas=(0.9, settings.beta2),
                                           weight_decay=settings.weight_decay)  # fmt: skip
        self.ema = Ema(self.parameters, settings.ema_decay)
        self.step, self.seconds, self.finished = 0, 0.0, False
        self.sums: dict[str, list] = {}  # of what is logged every log_steps: [sum, count]
        self.path = settings.out / states.STATE
        self.progress = Progress(settings, self.first)
        if self.path.exists():
            self._restore()
        self.progress.begin(self.step)

    # -- the state on disk ---------------------------------------------------------------------------------------------
    def _restore(self) -> None:
        tensors, header = states.read(self.path)
        old, new = header["settings"], plain(self.settings)
        if differing := sorted(k for k in {*old, *new} if k not in BUDGET and old.get(k) != new.get(k)):
            raise states.StateError(
                f"{self.settings.out} holds a run with other settings ("
                + ", ".join(f"{k}: {old.get(k)} there, {new.get(k)} now" for k in differing)
                + "): choose another out folder, or delete it")  # fmt: skip
        if header["data"] != self.stage.data:
            self.progress.say(f"the data changed since the run was stopped: {header['data']} then, {self.stage.data} "
                              "now; the curve goes on with what is there now")  # fmt: skip
        self.stage.objective.load_state_dict(states.part("model", tensors))
        rows = states.part("optimizer", tensors)
        for name, parameter in self.stage.trained:
            moments = states.part(name, rows)
            if moments:  # the count of steps stays on the CPU, where AdamW keeps it
                self.optimizer.state[parameter] = {
                    k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()
                }
        for mean, (name, _) in zip(self.ema.values, self.stage.trained, strict=bool(self.ema.decay)):
            mean.copy_(tensors[f"ema/{name}"])
        self.step, self.seconds, self.finished = header["step"], header["seconds"], header["finished"]
        self.sums = header["sums"]
        self.progress.say(f"continued at step {self.step}, after {self.seconds / 60:.1f} min, from {self.path}")

    def save(self) -> None:
        """State and weights; on the first process only."""
        if not self.first:
            return
        tensors = states.prefixed("model", self.stage.objective.state_dict())
        for name, parameter in self.stage.trained:
            tensors |= states.prefixed(f"optimizer/{name}", self.optimizer.state.get(parameter, {}))
        if self.ema.decay:
            means = (mean for mean in self.ema.values)
            tensors |= {f"ema/{name}": mean for (name, _), mean in zip(self.stage.trained, means, strict=True)}
        header = {
            "step": self.step,
            "seconds": self.seconds,
            "finished": self.finished,
            "data": self.stage.data,
            "sums": {k: [float(s), n] for k, (s, n) in self.sums.items()},
            "settings": plain(self.settings),
        }
        states.write(self.path, tensors, header)
        with self.ema.applied():
            states.write(self.settings.out / states.WEIGHTS, self.stage.weights(),
                         {k: header[k] for k in ("step", "seconds", "finished", "data", "settings")})  # fmt: skip

    # -- the run -------------------------------------------------------------------------------------------------------
    @property
    def capped(self) -> bool:
        """The minutes are spent and the steps are not."""
        minutes = self.settings.minutes
        return self.step < self.settings.steps and minutes is not None and self.seconds >= 60 * minutes

    def share(self) -> float:
        """Of the steps that are done, 0 to 1."""
        return min(1.0, self.step / self.settings.steps)

    def learning_rate(self) -> float:
        """Warm-up, then half a cosine. A function of the step alone: no clock has a say in the curve."""
        settings = self.settings
        warm = min(1.0, (self.step + 1) / settings.warmup)
        fall = 0.5 * (1 + np.cos(np.pi * self.share()))
        return settings.learning_rate * warm * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * fall)

    def run(self) -> bool:
        """Until the steps are done (True), or a signal or the cap in minutes ends it before (False)."""
        if self.share() >= 1.0:
            self.progress.say(f"finished before, after {self.step} steps; more steps would go on from there")
            self.finished = True
            self.save()
            self.progress.end()
            return True
        self.finished = False
        settings, device = self.settings, self.accelerator.device
        objective = self.accelerator.prepare_model(self.stage.objective)
        started = time.monotonic() - self.seconds
        shown = saved = self.seconds
        measured, shown_step = self.seconds, self.step
        rank = self.accelerator.process_index
        with Interrupt() as interrupt, feed(lambda k: self.stage.batch(k, rank), self.step, settings.workers) as take:
            while self.share() < 1.0 and not self.capped and not self._agreed(interrupt.asked):
                self._descend(objective, to_device(take(), device))
                self.seconds = self._clock(started)
                if self.step % settings.log_steps == 0:
                    self._log()
                if self.first and self.score is not None:
                    self.score.poll(self)
                if self.seconds - shown > settings.show_seconds:
                    self.progress.show(self, (self.step - shown_step) / (self.seconds - shown))
                    shown, shown_step = self.seconds, self.step
                if self.seconds - measured > settings.measure_seconds:
                    self._measure()
                    measured = self.seconds
                if self.seconds - saved > settings.save_seconds or self._due(settings.save_steps):
                    self.save()
                    saved = self.seconds
        self.finished = self.share() >= 1.0
        if self.finished or self.capped:
            self._measure()
        self.save()
        if self.first and self.score is not None:
            self.score.stop()
        if self.capped:
            self.progress.say(
                f"stopped early, at step {self.step} of {settings.steps}, because minutes is {settings.minutes:g}: the "
                f"learning rate is still {self.learning_rate():.2g}; the same command with more minutes goes on"
            )
        elif not self.finished:
            self.progress.say(f"stopped at step {self.step}; the same command goes on from there")
        self.progress.end()
        return self.finished

    def _descend(self, objective: nn.Module, batch: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
        with on(self.accelerator.device):
            total, terms, report = objective(batch)
            self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(total)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.step)
        for key, value in {"loss": total, **{f"terms/{k}": v for k, v in terms.items()}, **report,
                           "gradient": norm}.items():  # fmt: skip
            entry = self.sums.setdefault(key, [0.0, 0])
            entry[0] = entry[0] + (value.detach() if isinstance(value, Tensor) else value)
            entry[1] += 1

    def _log(self) -> None:
        row = {key: float(total) / count for key, (total, count) in self.sums.items()}
        self.sums = {}
        if not np.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss at step {self.step} is {row['loss']}: lower learning_rate, or look at "
                                     f"the data; the state before it is in {self.path}")  # fmt: skip
        self.progress.log(self, {**row, "learning_rate": self.learning_rate()})

    def _measure(self) -> None:
        if self.first:
            with self.ema.applied(), on(self.accelerator.device):
                figures = self.stage.measure()
            if figures:
                self.progress.measured(self, figures)
        self.accelerator.wait_for_everyone()

    def _due(self, steps: int | None) -> bool:
        return bool(steps) and self.step % steps == 0

    def _clock(self, started: float) -> float:
        """Seconds spent, the same on every process."""
        now = time.monotonic() - started
        return now if self.accelerator.num_processes == 1 else self._broadcast(now)

    def _agreed(self, asked: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return asked
        return self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device)).item() > 0

    def _broadcast(self, value: float) -> float:
        from accelerate.utils import broadcast

        return broadcast(torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)).item()


def finished(out: Path) -> bool:
    """Whether the run in a folder came to its end."""
    try:
        return bool(states.read_header(out / states.WEIGHTS).get("finished"))
    except states.StateError:
        return False

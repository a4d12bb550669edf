"""What a training run is told: one flat YAML file per run, every key known, every value of the right type.

A file may start from another one (``base: action.yaml``, relative to itself) and say only what differs. Unknown keys
are an error that names them. Paths are relative to the working directory.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vla_nodes.share import share_path

MAX_BYTES = 1 << 20
CONFIGS = "config/train"


class SettingsError(ValueError):
    """One line: which file or key, and what is wrong with it."""


@dataclass(frozen=True)
class Settings:
    """What both stages know. ``None`` (null in YAML) where a default would be a guess."""

    stage: str = ""  # one of STAGES: which of the settings below these are
    what: str = ""  # in a few words, for tables
    out: Path = Path()  # folder of the run: state, weights, log, curves
    data: tuple[Path, ...] = ()  # folders of episodes
    env: str | None = None  # environment whose names, sentences and places stage 1 learns from
    language: Path | None = None  # folder of the instruction encoder; null: the one of ``start`` or the shipped one
    start: Path | None = None  # weights (.safetensors) or checkpoint folder to begin with
    preset: str = "nano"  # without effect where ``start`` is a checkpoint folder
    mixer: str | None = None  # mamba2, mamba1, attention; null: the preset's
    memory: bool = True  # carry the core's state from tick to tick
    depth: bool = True  # look at depth images
    seed: int = 0  # of every random number, together with the number of the step
    # -- the optimiser
    batch: int = 16  # examples a step and process
    learning_rate: float = 2e-3  # largest, after the warm-up
    warmup: int = 50  # steps
    min_lr_ratio: float = 0.01  # share of learning_rate that is left after the last step, down a cosine
    weight_decay: float = 0.01  # of AdamW
    beta2: float = 0.95  # of AdamW
    clip: float = 1.0  # norm of the gradient
    ema_decay: float = 0.0  # of the running average of the weights that is saved; 0: the weights themselves
    weights: dict[str, float] = field(default_factory=dict)  # factors on loss terms, by name
    # -- the budget
    steps: int | None = None  # which the learning rate follows, so that the curve does not depend on the machine
    minutes: float | None = None  # a cap: stop there, before the steps are done; the same command goes on
    # -- the machine
    device: str = "auto"  # auto, cpu, cuda
    processes: int | None = None  # null: one per GPU
    precision: str = "32"  # 32 or bf16 (mixed)
    threads: int = 1  # of torch
    workers: int = 1  # threads that prepare batches
    # -- what is seen of it
    log_steps: int = 10  # steps between rows of log.jsonl
    show_seconds: float = 60.0  # between lines on the terminal
    save_seconds: float = 60.0  # between states written to disk
    save_steps: int | None = None  # beside the seconds
    measure_seconds: float = 180.0  # between measurements on held-out episodes
    held_out: int = 12  # every so many episodes, one is held out, by number
    score_minutes: float = 0.0  # between closed-loop scores; 0: none
    score_episodes: int = 2  # of each task family
    score_args: str = ""  # further arguments of `python -m vla_nodes eval`

    @property
    def total_steps(self) -> int:
        """How many steps the run has. SettingsError where nobody has said."""
        if self.steps is None:
            raise SettingsError("set steps: the learning rate follows them")
        return self.steps

    @property
    def environment(self) -> str:
        """The environment that stage 1 learns from. SettingsError where nobody has said."""
        if self.env is None:
            raise SettingsError("set env: the environment whose names, sentences and places are learnt")
        return self.env


BUDGET = {"what", "out", "minutes", "steps", "device", "threads", "workers", "log_steps", "show_seconds",
          "save_seconds", "save_steps", "measure_seconds", "score_minutes", "score_episodes", "score_args",
          "example_workers"}  # fmt: skip
"""Keys that may change between a run and its continuation; any other makes it another run."""


@dataclass(frozen=True)
class GroundingSettings(Settings):
    """Stage 1, perception (what stands where; nothing is asked) and grounding (language meets vision)."""

    frozen: tuple[str, ...] = ()  # parts of the model that do not learn, e.g. queries
    questions: int = 0  # sentences asked of each image: none by perception, some by grounding
    measure_batches: int = 4  # held-out batches of a measurement


@dataclass(frozen=True)
class ParaphraseSettings(Settings):
    """Stage 1, from sentences alone."""

    meaning: Path | None = None  # weights that say what sentences mean, where ``start`` learnt paraphrases; null: start


@dataclass(frozen=True)
class HeadSettings(Settings):
    """Stage 1, one small head anew: where does it go (placement_head), can it be done (feasibility_head)."""

    examples: int = 70  # files of about 1000 that are made before it learns
    example_workers: int = 1  # processes that make them


@dataclass(frozen=True)
class ActionSettings(Settings):
    """Stage 2."""

    grounded: Path | None = None  # stage 1 weights; null: those of ``start``, or eyes that never learnt
    cache: Path | None = None  # folder for visual tokens; null: ``cache`` in ``out``
    cache_workers: int = 1  # processes that fill it
    window_ticks: int = 48  # of a training window
    state_dropout: float = 1.0  # share of steps whose windows begin with an empty state
    carried: tuple[int, ...] = (24, 96)  # ticks, least and most, that made the state the other windows begin with


STAGES: dict[str, type[Settings]] = {
    "perception": GroundingSettings, "grounding": GroundingSettings, "paraphrase": ParaphraseSettings,
    "placement_head": HeadSettings, "feasibility_head": HeadSettings, "action": ActionSettings}  # fmt: skip
CHOICES = {"mixer": ("mamba2", "mamba1", "attention", None), "device": ("auto", "cpu", "cuda"),
           "precision": ("32", "bf16")}  # fmt: skip


def find(name: str | Path) -> Path:
    """A configuration by path, or by name among the shipped ones."""
    path = Path(name)
    if path.is_file():
        return path
    try:
        return share_path(f"{CONFIGS}/{path.name if path.suffix else f'{path}.yaml'}")
    except FileNotFoundError:
        raise SettingsError(f"{name}: no such file, and none of that name in {CONFIGS}") from None


def read(path: Path, depth: int = 0) -> dict[str, Any]:
    """The keys of a YAML file on top of those of its ``base``."""
    if depth > 8:
        raise SettingsError(f"{path}: more than 8 files start from each other; do they go in a circle?")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(f"{path}: larger than {MAX_BYTES} bytes")
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SettingsError(f"{path}: not a mapping of keys to values")
    base = values.pop("base", None)
    return {**(read(path.parent / str(base), depth + 1) if base is not None else {}), **values}


def build(values: dict[str, Any], source: str = "settings") -> Settings:
    """Settings of the stage that ``values`` names. SettingsError names every unknown key, or the first wrong value."""
    kind = STAGES.get(str(values.get("stage")))
    if kind is None:
        raise SettingsError(f"{source}: stage {values.get('stage')!r} is none of {', '.join(STAGES)}")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise SettingsError(f"{source}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    made = kind(**{name: _as(f"{source}: {name}", value, hints[name]) for name, value in values.items()})
    for name, choices in CHOICES.items():
        if getattr(made, name, choices[0]) not in choices:
            raise SettingsError(f"{source}: {name} {getattr(made, name)!r} is none of {choices}")
    if made.steps is None or made.steps < 1:
        raise SettingsError(f"{source}: set steps, how long to train: the learning rate falls until the last of them")
    if isinstance(made, GroundingSettings) and (made.stage == "perception") != (made.questions == 0):
        raise SettingsError(f"{source}: questions = {made.questions}: perception asks none of an image, grounding some")
    if made.env is None and kind is not ActionSettings:
        raise SettingsError(f"{source}: set env, the environment whose sentences and labels {made.stage} learns from")
    if not made.out.parts:
        raise SettingsError(f"{source}: set out, the folder of the run (--out)")
    if not made.data and kind is not ParaphraseSettings:
        raise SettingsError(f"{source}: set data, the folders of episodes (--data)")
    return made


def assignment(text: str) -> tuple[str, Any]:
    """("key", value) of a ``key=value`` from the command line; the value is YAML."""
    name, found, value = text.partition("=")
    if not found:
        raise SettingsError(f"--set {text!r}: write key=value")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {text!r}: {' '.join(str(error).split())}") from None


def _as(where: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` says. YAML 1.1 takes 3e-3 for text: numbers are also read from text."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _as(where, value, next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        rows = value if isinstance(value, list | tuple) else [value]
        return tuple(_as(where, row, arguments[0]) for row in rows)
    if origin is dict:
        if not isinstance(value, dict):
            raise SettingsError(f"{where} = {value!r} must be a mapping of names to numbers")
        return {str(key): _as(where, entry, arguments[1]) for key, entry in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    if hint is str and isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    if hint in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
            if hint is float or number == int(number):
                return hint(number)
        except (ValueError, OverflowError):
            pass
    raise SettingsError(f"{where} = {value!r} must be of type {getattr(hint, '__name__', hint)}")


def plain(settings: Settings) -> dict[str, Any]:
    """As YAML and JSON take it."""

    def simple(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return [simple(v) for v in value] if isinstance(value, tuple) else value

    return {f.name: simple(getattr(settings, f.name)) for f in fields(settings)}

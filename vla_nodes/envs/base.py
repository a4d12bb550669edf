"""What an environment is: a simulated robot, tasks for it, and a verdict on each episode.

Evaluation, the collection of demonstrations and training speak to these interfaces alone, so that a benchmark of
another arm, another action space or another simulator is one more module and one more line in `ENVIRONMENTS`.

    env = make("tabletop")
    start = env.reset("drawer", seed=7)
    while env.time < start.limit and not env.succeeded:
        actions = policy(env.observe(), start.instruction)
        env.apply(actions, period=0.05, tick=0.1)
    verdict = env.outcome()

Nothing here says how an environment moves its robot. The tabletop world feeds action chunks to the chunk executor and
to joint trajectory controllers. An environment that is stepped (`gymnasium`: Meta-World, LIBERO) executes in `apply`
as many rows of the chunk as steps fit into the tick. Many episodes run in parallel in processes of their own, each of
which makes its own environment by name.

Poses are (4, 4) homogeneous matrices, positions (3,) in m, both in the robot's base frame; times are s of simulation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # an environment and its expert work without torch
    from vla_nodes.policy.contract import Contract
    from vla_nodes.policy.processing import Observation

ENVIRONMENTS = {"tabletop": "vla_nodes.envs.tabletop.environment"}
"""Name -> module with ``make() -> Environment`` and, where stage 1 can learn from it, ``grounding() -> Grounding``."""
NAMES = tuple(ENVIRONMENTS)
DEFAULT = "tabletop"


class EnvError(ValueError):
    """One line: what an environment cannot do, or which one is not known, and the remedy."""


# -- what can be evaluated -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Group:
    """Suites that are evaluated together and summed in a row of the table."""

    suites: tuple[str, ...]
    title: str = ""  # of the row that sums them; "": no such row
    baseline: str = ""  # a group whose families it is compared with, for what training never saw


@dataclass(frozen=True)
class Suites:
    """What an environment can be evaluated on. A suite yields an episode for every seed."""

    names: tuple[str, ...] = ()
    groups: Mapping[str, Group] = field(default_factory=dict)
    default: str = ""  # group or suite
    mixed: tuple[str, ...] = ()  # suites whose episodes belong to several task families: a row of the table for each
    idle: tuple[str, ...] = ()  # suites in which success is to leave everything alone: nothing for an expert
    varied: str = ""  # the suite with the most varied episodes, for calibration
    about: str = ""  # what they are, for a person

    @property
    def choices(self) -> tuple[str, ...]:
        """Every name of a group or a suite."""
        return tuple(dict.fromkeys((*self.groups, *self.names)))

    def members(self, name: str) -> tuple[str, ...]:
        """The suites of a group, or the suite of that name. EnvError when there is neither."""
        if name in self.groups:
            return self.groups[name].suites
        if name in self.names:
            return (name,)
        raise EnvError(f"no suite {name!r}; there are {', '.join(self.choices)}")


@dataclass(frozen=True)
class Start:
    """What an episode begins with."""

    instruction: str
    family: str  # task family, for the table's rows
    limit: float  # s that it may take
    steps: int = 1  # things that the instruction asks for, one after the other
    patience: float | None = None  # s without an action after which it is over; None: holding still is no failure
    record: Mapping[str, Any] = field(default_factory=dict)  # for the header of a recorded episode (JSON)


@dataclass(frozen=True)
class Outcome:
    """The verdict on an episode so far, read off the simulator's state."""

    success: bool
    reason: str = ""  # "" or why it is no success: one of a few kinds, so that failures can be counted
    detail: str = ""  # the simulator's truth, for a person
    steps_done: int = 0
    wrong: tuple[str, ...] = ()  # objects that were lifted or displaced though the instruction does not name them
    touched: tuple[str, ...] = ()  # objects that the robot touched
    mean_jerk: float = 0.0  # of the tool, m/s^3
    p99_jerk: float = 0.0


class Environment(Protocol):
    """One simulated robot and its tasks. Nothing is simulated before ``reset``. Not thread-safe."""

    suites: Suites
    contract: Contract  # its robot and cameras; state, actions, tick, period and horizon of its demonstrations
    latency: float  # s from an observation to the arrival of its chunk; 0 where the simulator waits for the policy

    def reset(self, suite: str, seed: int, instruction: str | None = None) -> Start:
        """Begin the episode of a suite that follows from the seed alone, with an instruction of the caller's own if
        the suite takes one. EnvError for a suite that is not there or an instruction that cannot be done."""
        ...

    def episodes_for(self, instruction: str, first_seed: int, count: int) -> list[tuple[str, int]]:
        """(suite, seed) of episodes that allow an instruction of the caller's own; EnvError says why not."""
        ...

    @property
    def time(self) -> float:
        """s since the reset."""
        ...

    @property
    def succeeded(self) -> bool:
        """The task is done, for as long as it has to last: the episode can end here."""
        ...

    def observe(self) -> Observation:
        """What a policy gets to see now, and nothing more: images, joint states, the tool's pose."""
        ...

    def apply(self, actions: np.ndarray | None, period: float, tick: float, latency: float | None = None) -> str:
        """One tick: let ``tick`` s pass. ``latency`` s in (None: the environment's own) a chunk arrives that was
        computed from the observation at the start: ``actions`` (H, D), rows ``period`` s apart, executed until a later
        chunk replaces it. None: go on with the chunk in hand. Returns why the robot refused it, or "".
        """
        ...

    def outcome(self) -> Outcome:
        """The verdict, at any time."""
        ...

    @property
    def moments(self) -> int:
        """How many moments of this episode `frame` can show: one for the reset, and one after each tick."""
        ...

    def frame(self, moment: int) -> tuple[float, np.ndarray]:
        """(s, (H, W, 3) uint8 RGB) of a moment, for a person. Ends the episode: the world may be set back for it."""
        ...

    def close(self) -> None:
        """Give back what the simulator holds; ``reset`` begins anew."""
        ...


# -- optional: demonstrations ----------------------------------------------------------------------------------------
class Plan(NamedTuple):
    """What an expert would do now."""

    actions: np.ndarray  # (H, D) as `Environment.apply` takes them
    primitive: int = -1  # index in Demonstrator.primitives of what it is at; -1: it does not say
    step: int = 0  # step of the instruction that it is at
    finished: bool = False  # that step is done and the hand clear of it


Disturbance = Callable[[np.ndarray, float], np.ndarray]
"""(chunk (H, D) as planned, s) -> the chunk to execute."""


class Demonstrator(Environment, Protocol):
    """An environment with an expert, for `collect` and `eval --expert`."""

    families: tuple[str, ...]  # that demonstrations can be asked for by name
    primitives: tuple[str, ...]  # names of what an expert can be at; () where it does not say
    afterwards: float  # s to record after success, so that the policy learns to rest

    def reset_demonstration(self, seed: int, rng: np.random.Generator, family: str | None = None) -> Start:
        """Begin an episode to learn from: of a family or of the environment's mixture, from a varied start.

        ``Start.record`` holds what belongs into its header, "paraphrases" of the instruction among it.
        """
        ...

    def plan(self, horizon: int, period: float) -> Plan:
        """What the expert does next from the state as it is now, so that a disturbed robot gets the label that mends
        the disturbance. Call once a tick, before ``apply``."""
        ...

    def disturbance(self, rng: np.random.Generator) -> Disturbance:
        """Pushes for one episode. What is recorded stays what the expert planned."""
        ...

    def labels(self) -> dict[str, np.ndarray]:
        """Truth about the picture that `observe` shows now, training only, never an input; {} where there is none.
        See `Grounding` for the arrays that stage 1 reads."""
        ...


class StaticScenes(Protocol):
    """An environment that can draw labelled pictures without simulating, for stage 1."""

    contract: Contract

    def static_scene(self, seed: int, unusual: float) -> tuple[dict[str, Any], Iterator[tuple[Observation, dict]]]:
        """A scene of its own and several pictures of it, everything somewhere else in each: the header to record, and
        an observation with its labels for every picture. ``unusual``: share of scenes with objects nobody asks for."""
        ...

    def close(self) -> None: ...


# -- optional: labels for stage 1 --------------------------------------------------------------------------------------
class Step(Protocol):
    """One thing that an instruction asks for."""

    @property
    def verb(self) -> str: ...
    @property
    def target(self) -> str:
        """Name of the object it is done to; "" for none."""
        ...

    @property
    def reference(self) -> str:
        """Name of the object that the target goes to; "" for none."""
        ...

    @property
    def relation(self) -> str:
        """Where the target goes, relative to the reference; "" for into or onto it."""
        ...


class Sentence(NamedTuple):
    """An instruction and what it asks for; no steps where it asks for nothing that the robot could do."""

    text: str
    steps: tuple[Step, ...]


class Grounding(Protocol):
    """What stage 1 learns from beside pictures: the names of things, sentences about them, and where things go.

    An object's name is an appearance and a category ("red", "cup"), either of them possibly "". Recorded episodes hold
    the labels: header entry ``things`` (names), arrays ``segmentation`` (T, h, w) uint8 index in ``things`` + 1, 0 for
    the background, ``thing_positions`` (T, n, 3), and those named in ``state``.
    """

    appearances: tuple[str, ...]  # that a sentence may name; the last is "", none
    categories: tuple[str, ...]  # that a sentence may name; the last is "", nothing at all
    movable: tuple[str, ...]  # categories that the robot can pick up
    containers: tuple[str, ...]  # categories that things are put into, named without an appearance
    verbs: tuple[str, ...]  # of a step: its relation where there is one, else its verb
    state: tuple[str, ...]  # further arrays (T, ...) of an episode that `feasible` needs
    held_out_axes: tuple[str, ...]  # ways in which `held_out` sentences differ from those of training

    def describe(self, name: str) -> tuple[str, str]:
        """(appearance, category) of an object by its name; ("", "") for ""."""
        ...

    def about(self, things: list[str], rng: np.random.Generator) -> Sentence:
        """A sentence about a scene that holds ``things``: mostly of what can be done, sometimes not."""
        ...

    def imagined(self, rng: np.random.Generator) -> Sentence:
        """A sentence about a scene that is nowhere drawn."""
        ...

    def plain(self, rng: np.random.Generator) -> Sentence:
        """The same in the first words that come to mind; small talk where nothing is asked for."""
        ...

    def unusual(self, rng: np.random.Generator) -> Sentence:
        """A sentence whose target or reference may be of a category that is no part of ``categories``."""
        ...

    def held_out(self, axis: str, rng: np.random.Generator) -> Sentence:
        """A sentence in words, or about objects, that training never hears."""
        ...

    def feasible(self, step: Step, at: int, state: Mapping[str, np.ndarray]) -> bool:
        """Whether a step, the ``at``-th of its sentence, could be done if all it names is there. ``state``: the arrays
        of one tick."""
        ...

    def place_position(self, step: Step, reference: np.ndarray) -> np.ndarray:
        """(3,) where the target's center is let go, for a reference whose center is at ``reference`` (3,)."""
        ...

    def reference_position(self, step: Step, rng: np.random.Generator) -> np.ndarray:
        """(3,) a made-up center of the step's reference, anywhere it could be."""
        ...


# -- the registry ----------------------------------------------------------------------------------------------------
def _module(name: str) -> Any:
    if name not in ENVIRONMENTS:
        raise EnvError(f"no environment {name!r}; there are {', '.join(ENVIRONMENTS)}")
    return importlib.import_module(ENVIRONMENTS[name])


def make(name: str) -> Environment:
    """A new environment by its name. Only now is its simulator imported."""
    return _module(name).make()


def make_demonstrator(name: str) -> Demonstrator:
    """The same for one that has an expert; EnvError where it has none."""
    return _able(name, "plan", "expert to demonstrate anything")


def make_static_scenes(name: str) -> StaticScenes:
    """The same for one that draws pictures of static scenes; EnvError where it does not."""
    return _able(name, "static_scene", "pictures of static scenes")


def _able(name: str, method: str, what: str) -> Any:
    env = make(name)
    if not hasattr(env, method):
        raise EnvError(f"the environment {name} has no {what}")
    return env


def grounding(name: str) -> Grounding:
    """Names, sentences and places of an environment, for stage 1; EnvError where it has none."""
    module = _module(name)
    if not hasattr(module, "grounding"):
        raise EnvError(f"the environment {name} has no labels for stage 1 to learn from")
    return module.grounding()

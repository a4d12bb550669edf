"""One episode in closed loop: observations in, action chunks out, at the tick that the policy was trained for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vla_nodes.envs.base import Demonstrator, Environment, Start
from vla_nodes.evaluation import contact_sheet
from vla_nodes.evaluation.metrics import Result

if TYPE_CHECKING:
    from vla_nodes.policy.runtime import PolicyRuntime


class Driver(Protocol):
    """What decides: the policy, or the expert that knows the simulator's state. ``begin`` sets tick and period."""

    tick: float  # s between two decisions
    period: float  # s between two rows of a chunk

    def begin(self, env: Environment, start: Start) -> None: ...

    def act(self) -> tuple[np.ndarray | None, str]:
        """A chunk (H, D) or None, and why it holds."""
        ...


class PolicyDriver:
    """The policy, seeing what the environment observes and nothing more."""

    def __init__(self, runtime: PolicyRuntime) -> None:
        self.runtime = runtime
        self.tick, self.period = runtime.config.contract.tick, runtime.config.contract.actions.period

    def begin(self, env: Environment, start: Start) -> None:
        self._env = env
        self.runtime.set_instruction(start.instruction)

    def act(self) -> tuple[np.ndarray | None, str]:
        output = self.runtime.step(self._env.observe())
        return output.actions, output.hold_reason


class ExpertDriver:
    """The environment's expert: what the simulator's state allows, and the ceiling of what it can teach."""

    tick, period, horizon = 0.0, 0.0, 0

    def begin(self, env: Demonstrator, start: Start) -> None:
        self._env = env
        actions = env.contract.actions
        self.tick, self.period, self.horizon = env.contract.tick, actions.period, actions.horizon

    def act(self) -> tuple[np.ndarray | None, str]:
        return self._env.plan(self.horizon, self.period).actions, ""


@lru_cache(maxsize=1)
def driver(checkpoint: str, engine: str = "torch") -> Driver:
    """The policy of a checkpoint folder, computed by this engine (policy/inference/engine.py), or for "" the expert.

    CheckpointError or ValueError, one line, when it cannot be loaded or run here.
    """
    if not checkpoint:
        return ExpertDriver()
    from vla_nodes.policy.runtime import PolicyRuntime

    return PolicyDriver(PolicyRuntime.load(Path(checkpoint), device="cpu", threads=1, engine=engine))


def run(who: Driver, env: Environment, start: Start, suite: str, seed: int, limit: float | None = None
        ) -> tuple[Result, contact_sheet.Frames]:  # fmt: skip
    """From an environment's reset, which gave ``start``, to success or the time limit (s); frames of it if it failed.

    An episode also ends when the policy has not acted for ``start.patience``: it has said why it holds still.
    """
    limit = limit or start.limit
    acted, hold, last_action, refused = False, "", 0.0, ""
    who.begin(env, start)
    while env.time < limit - 1e-6 and not env.succeeded:
        now = env.time
        actions, hold = who.act()
        said = env.apply(actions, who.period, who.tick)
        if actions is not None:
            acted, last_action, refused = True, now, said
        if start.patience is not None and env.time - last_action > start.patience:
            break
    outcome = env.outcome()
    reason, detail = outcome.reason, outcome.detail
    if not outcome.success and start.patience is not None:
        if not acted or env.time - last_action > start.patience:
            reason, detail = ("refused" if not acted else "gave up"), f"{hold}; {detail}"
        elif refused:
            detail = f"the last motion was refused: {refused}; {detail}"
    result = Result(suite, seed, start.family, start.instruction, outcome.success, round(env.time, 2), reason, detail,
                    start.steps, outcome.steps_done, list(outcome.wrong), list(outcome.touched), outcome.mean_jerk,
                    outcome.p99_jerk)  # fmt: skip
    frames = [] if outcome.success else [env.frame(moment) for moment in contact_sheet.pick(env.moments)]
    return result, frames

"""The chunk executor against what peers do, on the same recorded policy chunks and in closed loop."""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import click
import numpy as np

from vla_nodes import cli
from vla_nodes.benchmarks.executor_cost import measure
from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.executor import ExecutorOutput
from vla_nodes.control.rows import joint_rows
from vla_nodes.control.seam_report import SeamRecord
from vla_nodes.control.settings import ExecutorSettings, Strategy
from vla_nodes.control.trajectory import Trajectory
from vla_nodes.envs.tabletop import suites
from vla_nodes.envs.tabletop.camera import Camera
from vla_nodes.envs.tabletop.rollout import STEP, Rollout, panda
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.tasks import SuccessChecker, Task
from vla_nodes.envs.tabletop.world import World
from vla_nodes.policy.runtime import PolicyRuntime
from vla_nodes.progress import progress
from vla_nodes.share import SHIPPED_CHECKPOINT, share_path

EXECUTORS = ("ours", "ours-mean", "naive", "timed", "mean")
LATENCIES = (0.05, 0.15, 0.3)
MEMORY = 8  # chunks the mean is over at most
DECAY = 0.01  # ACT's weights exp(-DECAY i), oldest first


class Player(Rollout):
    """A rollout whose chunks go through one of EXECUTORS."""

    def __init__(self, world: World, executor: str) -> None:
        strategy = Strategy.TEMPORAL_ENSEMBLE if executor == "ours-mean" else Strategy.SPLICE
        super().__init__(world, ExecutorSettings(strategy=strategy))
        self.ours, self.executor_name = executor.startswith("ours"), executor
        self._recent: deque[tuple[float, ActionChunk]] = deque(maxlen=MEMORY if executor == "mean" else 1)
        self._next = math.inf  # when the next point is due
        self.records: list[SeamRecord] = []
        model = world.model
        root = model.body_rootid[model.geom_bodyid]
        self._robot = root == model.body("panda_link0").rootid[0]
        self._movable = (
            model.body_dofnum[root] == 6
        )  # bodies that the hand may carry; the drawer and the table are not among them

    def play(self, chunk: ActionChunk) -> None:
        """A chunk of joint positions has come."""
        now = self.world.time
        if self.executor_name == "timed":
            if chunk.stamp + len(chunk.actions) * chunk.period >= now:  # the controller refuses what is past
                self.hand_over(_whole(chunk), now)
            return
        if not self.ours:
            if not self._recent:
                self._next = now
            self._recent.append((now, chunk))
            return
        output = self.executor.submit(chunk, now)
        self.records.append(SeamRecord.of(output, now))
        self.hand_over(output, now)

    def step(self) -> None:
        """STEP seconds of the world, with the point a naive executor sends in them."""
        now = self.world.time
        if self._recent and now >= self._next - 1e-9:
            point = self._point(now)
            if point is not None:
                self.hand_over(point, now)
            self._next = now + self._recent[-1][1].period
        self.run(STEP)

    @property
    def braced(self) -> bool:
        """Whether the robot touches what it cannot carry."""
        geoms = self.world.data.contact.geom
        one = self._robot[geoms]
        return bool((one.any(axis=1) & ~(one | self._movable[geoms]).all(axis=1)).any()) if len(geoms) else False

    def _point(self, now: float) -> ExecutorOutput | None:
        """One point, a period ahead, of every chunk's row for it: rows count from the chunk's arrival."""
        total, weight = np.zeros(8), 0.0
        for i, (came, chunk) in enumerate(self._recent):
            row = int((now - came) / chunk.period + 1e-6)
            if row < len(chunk.actions):
                w = math.exp(-DECAY * i)
                total, weight = total + w * chunk.actions[row], weight + w
        if weight == 0.0:
            return None
        wanted, robot, period = total / weight, panda(), self._recent[-1][1].period
        (gripper,) = robot.grippers
        finger = Trajectory((gripper.joint,), np.array([period]), gripper.position(wanted[7:])[None])
        return ExecutorOutput(
            Trajectory(robot.joint_names, np.array([period]), wanted[None, :7]), {gripper.name: finger}
        )


def _whole(chunk: ActionChunk) -> ExecutorOutput:
    """All rows of a chunk, positions only, at their own times."""
    robot, times = panda(), chunk.period * np.arange(1, len(chunk.actions) + 1)
    (gripper,) = robot.grippers
    fingers = Trajectory((gripper.joint,), times, gripper.position(chunk.openings), stamp=chunk.stamp)
    return ExecutorOutput(
        Trajectory(robot.joint_names, times, chunk.motion, stamp=chunk.stamp), {gripper.name: fingers}
    )


@dataclass
class Played:
    """One episode: what it was, whether it succeeded, the tool (T, 3) m at every STEP, where it was wanted (T, 3) m
    (NaN before the first chunk), whether the robot touched drawer or table (T,), the chunks and, of ours, the seams."""

    executor: str
    latency: float
    seed: int
    success: bool
    tool: np.ndarray
    wanted: np.ndarray
    braced: np.ndarray
    chunks: list[ActionChunk]
    records: list[SeamRecord]

    @property
    def jerk(self) -> np.ndarray:
        """(T',) m/s^3, of the moments at which the robot touched nothing but what it carries."""
        jerk = np.linalg.norm(np.diff(self.tool, 3, axis=0), axis=1) / STEP**3
        return jerk[~np.lib.stride_tricks.sliding_window_view(self.braced, 4).any(axis=1)]

    @property
    def error(self) -> np.ndarray:
        """(T',) m where the tool was wanted somewhere."""
        error = np.linalg.norm(self.tool - self.wanted, axis=1)
        return error[np.isfinite(error)]


def play(
    scene: Scene, task: Task, text: str, source: PolicyRuntime | list[ActionChunk], executor: str, latency: float
) -> Played:
    """One episode; `source` is a policy that observes it, or the chunks of an earlier one."""
    world = World(scene)
    player, checker = Player(world, executor), SuccessChecker(task)
    policy = camera = None
    made: list[ActionChunk] = []
    coming: deque[ActionChunk] = deque()
    recorded: deque[ActionChunk] = deque()
    if isinstance(source, PolicyRuntime):
        policy, camera, limit = source, Camera(world), suites.time_limit(task)
        policy.set_instruction(text)
    else:
        recorded.extend(source)
        limit = source[-1].stamp + latency + suites.STEP_LIMIT / 10
    tool, wanted, braced = [], [], []
    due = world.time
    try:
        while world.time < limit and not (camera is not None and checker.succeeded):
            if policy is not None and camera is not None and world.time >= due - 1e-9:
                due += policy.config.contract.tick
                if (chunk := _ask(policy, player, camera, text)) is not None:
                    made.append(chunk)
                    coming.append(chunk)
            while recorded and recorded[0].stamp <= world.time + 1e-9:
                made.append(recorded.popleft())
                coming.append(made[-1])
            while coming and coming[0].stamp + latency <= world.time + 1e-9:
                player.play(coming.popleft())
            player.step()
            tool.append(world.tool_pose()[:3, 3])
            braced.append(player.braced)
            wanted.append(_wanted(made[-1], world.time) if made else np.full(3, np.nan))
            checker.update(world)
    finally:
        if camera is not None:
            camera.close()
    return Played(executor, latency, scene.seed, checker.succeeded, np.array(tool), np.array(wanted),
                  np.array(braced), made, player.records)  # fmt: skip


def _ask(policy: PolicyRuntime, player: Player, camera: Camera, text: str) -> ActionChunk | None:
    """The policy's chunk for now, as joint positions, or None while it holds."""
    stamp, image = player.world.time, camera.render()
    observation = player.observation(camera, image)
    actions = policy.step(observation).actions
    if actions is None:
        return None
    actions = np.asarray(actions, float)
    deltas = ActionChunk(
        stamp, text, policy.config.contract.actions.period, ActionSpace.EE_DELTA, actions, ("gripper",)
    )
    rows = joint_rows(panda(), deltas, observation.joint_positions, player.executor.settings.ik, math.inf, None)
    actions = np.hstack([rows.q, rows.openings])
    return ActionChunk(stamp, text, deltas.period, ActionSpace.JOINT_POSITION, actions, deltas.grippers)


def _wanted(chunk: ActionChunk, now: float) -> np.ndarray:
    """(3,) m, where the chunk wants the tool at `now`; before its first row, in line with its first two."""
    rows = chunk.actions[:, :7]
    rows = np.vstack([2.0 * rows[0] - rows[min(1, len(rows) - 1)], rows])
    times = chunk.stamp + chunk.period * np.arange(len(rows))
    q = np.array([np.interp(now, times, rows[:, j]) for j in range(7)])
    return panda().forward(q)[:3, 3]


@lru_cache(maxsize=1)
def _runtime(checkpoint: str) -> PolicyRuntime:
    return PolicyRuntime.load(Path(checkpoint), device="cpu", threads=1)


def _job(job: tuple[str, str, int, str, float, list[ActionChunk] | None]) -> Played:
    checkpoint, suite, seed, executor, latency, chunks = job
    return play(*suites.episode(suite, seed), chunks or _runtime(checkpoint), executor, latency)


def table(replayed: list[Played], closed: list[Played]) -> str:
    """One row per latency and executor."""
    rows = [
        "latency  executor    recorded chunks: jerk RMS / peak    vs naive RMS / peak   tracking RMS   success"
        "   closed loop: success",
        "                              m/s^3                     times lower              mm",
    ]
    keys = sorted({(p.latency, EXECUTORS.index(p.executor)) for p in [*replayed, *closed]})
    for latency, k in keys:
        name = EXECUTORS[k]
        rms, peak, error, won = _numbers(replayed, name, latency)
        naive_rms, naive_peak, _, _ = _numbers(replayed, "naive", latency)
        part = [p for p in closed if (p.executor, p.latency) == (name, latency)]
        loop = f"{sum(p.success for p in part)}/{len(part)}" if part else "-"
        rows.append(f"{latency * 1e3:4.0f} ms  {name:10}  {rms:18.1f} / {peak:7.0f}   {naive_rms / rms:14.1f} / "
                    f"{naive_peak / peak:4.1f}   {error * 1e3:11.1f}   {won:>7}   {loop:>20}")  # fmt: skip
    return "\n".join(rows)


def _numbers(played: list[Played], executor: str, latency: float) -> tuple[float, float, float, str]:
    part = [p for p in played if (p.executor, p.latency) == (executor, latency)]
    if not part:
        return math.nan, math.nan, math.nan, "-"
    jerk, error = (np.concatenate([getattr(p, name) for p in part]) for name in ("jerk", "error"))
    rms = [math.sqrt(float(np.mean(x * x))) if x.size else math.nan for x in (jerk, error)]
    return rms[0], float(jerk.max()), rms[1], f"{sum(p.success for p in part)}/{len(part)}"


def compare(args: cli.Options) -> int:
    """The command."""
    if args.chunks:
        print(measure(panda(), args.chunks))
        print(measure(panda(), min(args.chunks, 2000), memory=True, seed=1), "(traced, which slows it down)")
    if args.cost_only:
        return cli.ExitStatus.DONE
    checkpoint, started = str(args.checkpoint or share_path(SHIPPED_CHECKPOINT)), time.monotonic()
    seeds = range(args.seed, args.seed + args.episodes)
    ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process
    with multiprocessing.get_context("spawn").Pool(args.workers, signal.signal, ignored) as pool:

        def run(jobs: list[tuple]) -> list[Played]:
            return list(progress(pool.imap(_job, jobs), total=len(jobs), unit="episodes"))

        recorded = run([(checkpoint, args.suite, seed, "ours", LATENCIES[0], None) for seed in seeds])
        moved = [p for p in recorded if p.chunks]
        combinations = [(executor, latency) for latency in args.latency for executor in args.executors]
        replayed = run([(checkpoint, args.suite, p.seed, *c, p.chunks) for p in moved for c in combinations])
        if args.closed and replayed:
            print(table(replayed, []), flush=True)  # what follows takes much longer
        again, closed, status = range(args.seed, args.seed + args.closed), [], cli.ExitStatus.DONE
        jobs = [(checkpoint, args.suite, seed, *c, None) for seed in again for c in combinations]
        try:
            closed.extend(progress(pool.imap(_job, jobs), total=len(jobs), unit="episodes"))
        except KeyboardInterrupt:
            status = cli.ExitStatus.INTERRUPTED
            print(f"interrupted after {len(closed)} of {len(jobs)} episodes in closed loop")
    print(table(replayed, closed))
    print(f"recorded: {sum(p.success for p in recorded)}/{len(recorded)} succeeded, "
          f"{sum(len(p.chunks) for p in moved)} chunks; {time.monotonic() - started:.0f} s")  # fmt: skip
    if args.seam_log and moved:
        args.seam_log.write_text("\n".join(record.line() for record in moved[0].records) + "\n")
    return status


command = cli.Command(
    "control-bench",
    """
    The chunk executor against what peers do, on the same recorded policy chunks and in closed loop.

    Recorded: the policy drives the arm once per scene through our executor at 50 ms; its chunks, as joint positions,
    are then played by every executor at every latency. Closed loop: the policy sees what each executor makes of it.

        ours        splice, this suite's default
        ours-mean   our splice onto the mean of recent chunks (strategy temporal_ensemble)
        naive       one point per control period, positions only: the newest chunk's rows from the first one on
        timed       every chunk as one trajectory of positions stamped with its observation, so that the controller
                    starts at the row for now: latency compensated as well as a stock controller can, without
                    blending or limits
        mean        the same, with the exponentially weighted mean of recent chunks (ACT, Zhao et al. 2023, IV.B)

    Jerk is that of the measured tool at 100 Hz, except while the hand touches the drawer or the table: these then set
    it, slipping and sticking, whatever the executor does. The tracking error is the tool's distance from where the
    newest observed chunk wanted it at that instant.
    

    A recorded episode and one in closed loop take about half a minute of a core each, a replayed one some seconds; the
    defaults make 4, 60 and 60. Ctrl-C in closed loop gives the table so far. Measure the cost on a machine that does
    nothing else.
    """,
    compare,
    cli.checkpoint(),
    cli.option("--suite", type=click.Choice(("demo", "random")), default="demo", help="scenes and tasks"),
    cli.count("--episodes", "scenes recorded and played", 4, least=0),
    cli.count("--closed", "episodes in closed loop per row", 4, least=0),
    cli.seed("seed of the first scene"),
    cli.option("--latency", type=cli.Several(float, least=0.0), metavar="X,X", default=",".join(map(str, LATENCIES)),
               help="from an observation to its chunk [s]"),
    cli.option("--executors", type=cli.Several(choices=EXECUTORS), metavar="NAME,NAME", default=",".join(EXECUTORS),
               help="what is compared"),
    cli.workers(),
    cli.option("--seam-log", type=cli.PATH, metavar="FILE", help="our first episode's seams, for the command seams"),
    *cli.section(
        "Cost",
        cli.count("--chunks", "chunks that the cost is measured over; 0 measures none", 500, least=0),
        cli.flag("--cost-only", "cost per chunk and memory; no policy, no simulator"),
    ),
    examples="""
    python -m vla_nodes control-bench --cost-only
    python -m vla_nodes control-bench --episodes 6 --closed 0 --chunks 0
    """,
    errors=(OSError,),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

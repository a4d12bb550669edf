"""What the executor costs: CPU time per chunk of 16 rows for 7 joints, and memory over many chunks.

The stream is what a policy sends while an arm moves: tool deltas of a wandering motion with row and chunk noise, a
new chunk every 0.1 s, 50 ms late, spliced onto the motion in flight. CPU time of the thread is measured, not wall
time, so a busy machine disturbs it less.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vla_nodes.control.chunk import ActionChunk, ActionSpace
from vla_nodes.control.executor import ChunkExecutor
from vla_nodes.control.robot import RobotModel
from vla_nodes.control.settings import ExecutorSettings
from vla_nodes.memory import resident_kb

ROWS, PERIOD, TICK, LATENCY = 16, 0.1, 0.1, 0.05
WATCH, LOOKS = 50, 100  # chunks between two looks at the memory at least; looks at most
JOINT_STATES = 0.02  # s between measurements


@dataclass(frozen=True)
class Cost:
    """ms: (N,) CPU time of `submit` per chunk; modes: how often each way to join was taken; blocks: Python's memory
    blocks held more in the last third of the chunks than in the one before; resident: the same of the process's
    resident memory, kB, that of the libraries in C++ included (0 where the system does not say); growth: of what Python
    and numpy hold, bytes (None if allocations were not traced)."""

    ms: np.ndarray
    modes: dict[str, int]
    blocks: int
    resident: int
    growth: int | None

    def __str__(self) -> str:
        p50, p99 = np.percentile(self.ms, [50, 99])
        text = f"{len(self.ms)} chunks of {ROWS} rows: CPU p50 {p50:.2f} ms, p99 {p99:.2f} ms ({self.modes})"
        text += f"; over the last third {self.blocks:+d} memory blocks held, {self.resident:+d} kB resident"
        return text if self.growth is None else f"{text}, {self.growth:+d} bytes"


def chunks(robot: RobotModel, count: int, seed: int = 0, start: float = 100.0) -> Iterator[ActionChunk]:
    """A policy's chunks in ee_delta, stamped every TICK seconds."""
    rng = np.random.default_rng(seed)
    for stamp in start + TICK * np.arange(count):
        t = stamp + PERIOD * np.arange(ROWS)
        velocity = np.stack([0.1 * np.sin(0.9 * t), 0.1 * np.cos(0.7 * t), 0.05 * np.sin(1.1 * t), 0.0 * t,
                             0.05 * np.sin(t), 0.1 * np.cos(t)], axis=1)  # fmt: skip
        rows = velocity * PERIOD * (1.0 + 0.1 * rng.normal(size=(1, 6))) + 0.001 * rng.normal(size=(ROWS, 6))
        actions = np.hstack([rows, np.full((ROWS, 1), 0.5 + 0.5 * np.sign(np.sin(0.5 * stamp)))])
        yield ActionChunk(float(stamp), "bench", PERIOD, ActionSpace.EE_DELTA, actions, ("gripper",))


def measure(
    robot: RobotModel, count: int, settings: ExecutorSettings | None = None, memory: bool = False, seed: int = 0
) -> Cost:
    """Submit `count` chunks; the arm follows the reference. `memory` traces every allocation, which slows it down."""
    executor, ms = ChunkExecutor(robot, settings), np.full(count, np.nan)
    modes: Counter[str] = Counter()
    held, watch = [], max(WATCH, count // LOOKS)
    looks = np.zeros((2, -(-count // watch)), dtype=int)  # made beforehand: what is noted must not count
    for k, chunk in enumerate(chunks(robot, count, seed)):
        if k == 0:
            executor.observe(chunk.stamp, robot.rest, np.zeros(robot.dof), 0.04)
        before = time.thread_time()
        output = executor.submit(chunk, chunk.stamp + LATENCY)
        ms[k] = 1e3 * (time.thread_time() - before)
        modes[output.cause or output.mode] += 1
        for t in chunk.stamp + np.arange(JOINT_STATES, TICK + 1e-9, JOINT_STATES):
            reference = executor.reference(float(t))
            assert reference is not None  # a chunk was just taken
            q, qd, _ = reference
            executor.observe(float(t), q, qd)
        if k % watch == 0:
            gc.collect()  # frees what Python keeps of dead tuples for reuse: up to 2000 of each size, counted as blocks
            looks[:, k // watch] = sys.getallocatedblocks(), resident_kb()
        if memory and k == max(count // 10, 50):
            tracemalloc.start()
            held.append(tracemalloc.get_traced_memory()[0])
        elif memory and k > count // 10 and k % watch == 0:
            held.append(tracemalloc.get_traced_memory()[0])
    if memory:
        tracemalloc.stop()
    blocks, resident = (_growth(x.tolist()) for x in looks)
    return Cost(ms, dict(modes), blocks, resident, _growth(held) if memory else None)


def _growth(held: list[int]) -> int:
    """Of held bytes (N,): the median of the last third over that of the second; the first third replaces what was
    held before tracing began."""
    third = len(held) // 3
    return int(np.median(held[2 * third :]) - np.median(held[third : 2 * third])) if third else 0

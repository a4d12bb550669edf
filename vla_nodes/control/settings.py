"""Settings of the executor, with the values that suit an arm next to a person."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vla_nodes.control.inverse_kinematics import IkSettings


class Strategy(str, Enum):
    """What a new chunk does to the motion in flight."""

    SPLICE = "splice"  # blend onto the newest chunk at once
    TEMPORAL_ENSEMBLE = "temporal_ensemble"  # blend onto the average of recent chunks (Zhao et al. 2023, ACT)
    FINISH_CHUNK = "finish_chunk"  # ignore new chunks until the one in flight is done
    NAIVE = "naive"  # rows as they come: no alignment, no limits, no velocities. For comparison only


class OnInstructionChange(str, Enum):
    """What the first chunk of a new instruction does to the motion in flight."""

    BLEND_NOW = "blend_now"
    FINISH_CHUNK = "finish_chunk"
    STOP_FIRST = "stop_first"


@dataclass(frozen=True)
class ExecutorSettings:
    """Times in s, lengths in m, angles in rad.

    velocity_scale, acceleration_scale, jerk_scale: share of the robot's own limits that may be used.
    tool_speed: m/s, most the tool frame may translate.
    lead: how far ahead of now a splice begins; covers planning and transport. A later arrival is harmless (the
        blend starts from zero), only less smooth.
    blend: shortest overlap with the motion in flight; longer where limits ask for it.
    knot: spacing of trajectory points, a power of two.
    history: how long measured joints are kept, so the oldest usable chunk.
    max_joint_gap: how far from a chunk's stamp the nearest measurement may be.
    unreachable: position error (m) or a fifth of it per rad beyond which a row counts as out of reach.
    at_rest: what a chunk's latency means while the arm stands still. "stamp": rows already past are dropped and the
        arm catches up within its limits; "path": the arm starts at the chunk's first row, late by the latency.
    slowest: lowest share of the policy's pace that still counts as carrying out the chunk.
    stop_time: longest stop along the planned path; a faster stop that leaves the path is used beyond it.
    ensemble_decay: weight exp(-decay * i) of the i-th oldest chunk (temporal_ensemble).
    """

    strategy: Strategy = Strategy.SPLICE
    on_instruction_change: OnInstructionChange = OnInstructionChange.BLEND_NOW
    velocity_scale: float = 0.6
    acceleration_scale: float = 0.3
    jerk_scale: float = 0.1
    tool_speed: float = 0.6
    lead: float = 0.03
    blend: float = 0.2
    effort: float = 0.95
    smoothing: float = 0.01
    span: float = 20.0
    knot: float = 1.0 / 32.0
    history: float = 2.0
    max_joint_gap: float = 0.1
    unreachable: float = 0.03
    at_rest: str = "stamp"
    slowest: float = 0.1
    stop_time: float = 1.0
    ensemble_decay: float = 0.01
    ensemble_size: int = 8
    ik: IkSettings = field(default_factory=IkSettings)

    def __post_init__(self) -> None:
        mantissa = self.knot
        while 0.0 < mantissa < 1.0:
            mantissa *= 2.0
        if mantissa != 1.0 or not 1 / 256 <= self.knot <= 1 / 8:
            raise ValueError(f"knot must be a power of two between 1/256 and 1/8 s, got {self.knot}")
        if self.at_rest not in ("stamp", "path"):
            raise ValueError(f"at_rest must be 'stamp' or 'path', got {self.at_rest!r}")
        for name in ("blend", "history", "stop_time", "slowest", "max_joint_gap"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.lead < 0.0:
            raise ValueError(f"lead must not be negative, got {self.lead}")

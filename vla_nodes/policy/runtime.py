"""The policy as a robot uses it: observations in, chunks out, one instruction at a time, history in the carried state.

The ROS-free core of policy_node, and the very same code in evaluation and replay.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vla_nodes.policy import checkpoint as checkpoints
from vla_nodes.policy.configuration import PRIMITIVES
from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.modeling import Instruction, Prepared, VisualTokens, proprioception
from vla_nodes.policy.processing import CameraImage, Observation, square

CERTAIN = 0.4  # grounding probability above which the robot may start
LOST = 0.1  # and below which a running task is given up, when it stays there
DECIDE_TICKS = 3  # observations the first decision is averaged over
HELD = (0.1, 0.9)  # gripper openings between which it has something in hand, which the hand may hide
LOST_TICKS = 20
DONE_TICKS = 3  # observations in a row that must call a step done before the next one begins
MAX_GAP = 0.5  # s between observations beyond which the change since the last one means nothing


@dataclass
class PolicyOutput:
    actions: np.ndarray | None  # (H, 7) in the checkpoint's action space and units; None = hold still
    hold_reason: str = ""  # "" when there are actions, else one line for the operator
    grounding: float = 0.0  # 0..1, that all the instruction names is understood and in view
    primitive: str = "hold"
    step: int = 0  # of the instruction, the first is 0
    done: float = 0.0  # 0..1, that this step is done and the hand clear of it
    target: np.ndarray = field(default_factory=lambda: np.full(3, np.nan))  # m in base, middle of the thing
    timings: dict[str, float] = field(default_factory=dict)  # ms by part, and "total"


class PolicyRuntime:
    """Load once, `set_instruction`, then `step` with every new observation."""

    def __init__(self, model, config: checkpoints.CheckpointConfig, device: str = "cpu", engine=None) -> None:
        self.model, self.config, self.device = model, config, torch.device(device)
        self.engine = engine or engines.TorchEngine(model)
        self.instruction = ""
        self._asked: Instruction | None = None
        self._language_ms = 0.0
        self.reset()

    @classmethod
    def load(cls, checkpoint: Path, device: str = "auto", threads: int = 1, engine: str = "torch") -> PolicyRuntime:
        """CheckpointError on anything wrong with the folder; ValueError for a device or engine this machine lacks.

        engine: auto, torch, openvino or onnxruntime, see engine.py; the first start with a new checkpoint exports it.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device {device!r} is none of auto, cpu, cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda and this machine has none that torch can use; set device to cpu or auto")
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        torch.set_num_threads(max(1, threads))
        model, config = checkpoints.load(Path(checkpoint), chosen)
        return cls(model, config, chosen, engines.load(model, engine, threads, Path(checkpoint)))

    # -- instruction ---------------------------------------------------------------------------------------------------
    def check_instruction(self, text: str) -> str:
        """ "" or one line saying why this text cannot be an instruction."""
        return self.model.language.check(text)

    @torch.no_grad()
    def set_instruction(self, text: str) -> None:
        """Start on a new instruction with a new history. ValueError when `check_instruction` refuses it."""
        if reason := self.check_instruction(text):
            raise ValueError(reason)
        started = time.perf_counter()
        self._asked = self.model.prepare(self.model.language.encode([text]))
        wanted = [True, *(self._asked.wanted[0, 1:] > 0).tolist()]
        self.steps = wanted.index(False) if False in wanted else len(wanted)
        self._language_ms = 1e3 * (time.perf_counter() - started)
        self.instruction = text
        self.reset()

    def follow(self, prepared: Prepared) -> None:
        """One step as the model prepared it, with a new history and no look at whether it can be done: to measure."""
        row = (part.unsqueeze(1) for part in prepared)
        self._asked = Instruction(*row, wanted=prepared.summary.new_ones(1, 1))
        self.steps = 1
        self.reset()
        self._decided = True

    def reset(self) -> None:
        """Forget the history (on activation, a new instruction or a clock jump); the instruction stays."""
        self._state: tuple | None = None
        self._previous: Observation | None = None
        self._decided: bool | None = None
        self._evidence: list[float] = []
        self._lost = 0
        self._step, self._done = 0, 0

    # -- one tick -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, observation: Observation) -> PolicyOutput:
        """One observation, newer than the last. ValueError names what is wrong with it."""
        if self._asked is None:
            return PolicyOutput(None, "no instruction yet: publish one on the instruction topic")
        started = time.perf_counter()
        if len(observation.cameras) != 1 or len(observation.grippers) != 1:
            raise ValueError("this policy takes one camera and one gripper")
        (image,) = observation.cameras.values()
        color, depth, intrinsics = self._images(image)
        pose = self._tensor(image.pose)
        tool = self._tensor(observation.tool_pose[:3, 3])
        step = self._step
        now = self._asked.at(step)
        view = self.engine.look(color, depth, intrinsics, pose, tool, now)
        grounding = float(view.grounding.sigmoid())
        if self._decided is None or not self._decided:  # it does not start on what it could not end
            for later in range(step + 1, self.steps):
                other = self.engine.look(color, depth, intrinsics, pose, tool, self._asked.at(later))
                grounding = min(grounding, float(other.grounding.sigmoid()))
        looked = time.perf_counter()
        body = self._body(observation)
        view = VisualTokens(*(part.unsqueeze(1) for part in view))
        output, self._state = self.engine.think(body, view, now.summary, self._state)
        actions = self.model.physical(output.actions)[0, 0].cpu().numpy()
        self._previous = observation
        ended = time.perf_counter()
        timings = {"vision": 1e3 * (looked - started), "core": 1e3 * (ended - looked), "language": self._language_ms,
                   "total": 1e3 * (ended - started)}  # fmt: skip
        self._language_ms = 0.0
        reason = self._judge(grounding, HELD[0] < observation.grippers[0] < HELD[1])
        if not reason and not np.isfinite(actions).all():
            reason = "the policy gave actions that are not numbers"
        done = float(output.done.sigmoid())
        self._done = self._done + 1 if done > 0.5 and not reason else 0
        if self._done >= DONE_TICKS and step + 1 < self.steps:
            self._step, self._done, self._lost = step + 1, 0, 0
        return PolicyOutput(None if reason else actions, reason, grounding, PRIMITIVES[int(output.primitive.argmax())],
                            step, done, output.target[0, 0].cpu().numpy(), timings)  # fmt: skip

    def _judge(self, grounding: float, holding: bool) -> str:
        """Start only on something seen and understood; give up on something lost, unless it is in hand.

        Returns why to hold still, or "".
        """
        self._evidence.append(grounding)
        if self._decided is None:
            if len(self._evidence) < DECIDE_TICKS:
                return "looking for what the instruction names"
            self._decided = float(np.mean(self._evidence[-DECIDE_TICKS:])) >= CERTAIN
        if not self._decided:
            recent = float(np.mean(self._evidence[-LOST_TICKS:]))
            if len(self._evidence) >= LOST_TICKS and recent >= 0.8:  # it came into view later
                self._decided = True
                return ""
            named = f'what "{self.instruction}" names'
            return f"{named} is not in view, or it is nothing this policy can do (certainty {recent:.2f})"
        self._lost = self._lost + 1 if grounding < LOST and not holding else 0
        if self._lost >= LOST_TICKS:
            self._decided, self._evidence = False, []
            return f'lost sight of what "{self.instruction}" names'
        self._evidence.clear()
        return ""

    # -- inputs -------------------------------------------------------------------------------------------------------
    def _tensor(self, array) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(array, np.float32), device=self.device).unsqueeze(0)

    def _images(self, image: CameraImage) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Resize to the network's square and bring the intrinsics along. Nothing is stretched silently."""
        color, depth = image.color, image.depth
        size = self.config.image_size
        if color.ndim != 3 or color.shape[2] != 3 or color.dtype != np.uint8:
            raise ValueError(f"colour image must be (H, W, 3) uint8, got {color.shape} {color.dtype}")
        if depth is not None and depth.shape != color.shape[:2]:
            raise ValueError(f"depth {depth.shape} is not aligned to colour {color.shape[:2]}: use aligned depth")
        color, depth, intrinsics = square(color, depth, image.intrinsics, size)
        if depth is None:
            depth = np.zeros((size, size), np.float32)
        near, far = self.config.depth_range
        depth = np.where((depth >= near) & (depth <= far), depth, 0.0)
        pixels = torch.as_tensor(np.ascontiguousarray(color), device=self.device).permute(2, 0, 1).unsqueeze(0)
        return pixels, self._tensor(depth), self._tensor(intrinsics)

    def _body(self, now: Observation):
        last = self._previous
        gap = now.stamp - last.stamp if last is not None else 0.0
        if last is not None and 1e-3 < gap <= MAX_GAP:
            velocity = (now.tool_pose[:3, 3] - last.tool_pose[:3, 3]) / gap
            rate = float(now.grippers[0] - last.grippers[0]) / gap
        else:
            velocity, rate = np.zeros(3), 0.0
        parts = (now.tool_pose, float(now.grippers[0]), now.joint_positions, now.joint_velocities, velocity, rate)
        rows = (self._tensor(part).unsqueeze(0) if np.ndim(part) else self._tensor([part]) for part in parts)
        return proprioception(*rows)

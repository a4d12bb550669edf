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
from vla_nodes.policy.contract import Camera
from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.modeling import CameraInput, Instruction, StepQueries, VlaPolicy
from vla_nodes.policy.processing import CameraImage, Observation, StateLayout, square, state_vectors
from vla_nodes.policy.start_gate import StartGate


@dataclass
class PolicyOutput:
    actions: np.ndarray | None  # (H, A) in the columns and units of the contract; None = hold still
    hold_reason: str = ""  # "" when there are actions, else one line for the operator
    # 0..1, that all the instruction names is in view and can be done; NaN: not judged
    feasibility: float = float("nan")
    primitive: str = ""  # of motion, "" where the policy names none
    step: int = 0  # of the instruction, the first is 0
    done: float = float("nan")  # 0..1, that this step is done and the hand clear of it; NaN: not judged
    target: np.ndarray = field(default_factory=lambda: np.full(3, np.nan))  # m in base, centre of the target
    timings: dict[str, float] = field(default_factory=dict)  # ms by part, and "total"


class PolicyRuntime:
    """Load once, `set_instruction`, then `step` with every new observation.

    config: the checkpoint's (`checkpoint.CheckpointConfig`), with its contract.
    """

    def __init__(
        self,
        model: VlaPolicy,
        config: checkpoints.CheckpointConfig,
        device: str = "cpu",
        engine: engines.Engine | None = None,
    ) -> None:
        self.model, self.config, self.device = model, config, torch.device(device)
        self.engine = engine or engines.TorchEngine(model)
        self.gate = StartGate(config.contract.thresholds)
        self.instruction = ""
        self.steps = 0
        self._layout = StateLayout(config.contract)
        self._asked: Instruction | None = None
        self._language_ms = 0.0
        self.reset()

    @classmethod
    def load(cls, checkpoint: Path, device: str = "auto", threads: int = 1, engine: str = "torch") -> PolicyRuntime:
        """CheckpointError on anything wrong with the folder; ValueError for a device or engine this machine lacks.

        engine: auto, torch, openvino or onnxruntime, see inference/engine.py; the first start with a new checkpoint
        exports it.
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
        self._asked = self.model.encode_instruction(self.model.language.encode([text]))
        present = [True, *(self._asked.step_present[0, 1:] > 0).tolist()]
        self.steps = present.index(False) if False in present else len(present)
        self._language_ms = 1e3 * (time.perf_counter() - started)
        self.instruction = text
        self.reset()

    def follow(self, step: StepQueries) -> None:
        """One step as the model encoded it, with a new history and no look at whether it can be done: to measure."""
        queries, summary = (part.unsqueeze(1) for part in step)
        self._asked = Instruction(queries, summary, step.summary.new_ones(1, 1))
        self.steps = 1
        self.reset()
        self.gate.start()

    def reset(self) -> None:
        """Forget the history (on activation, a new instruction or a clock jump); the instruction stays."""
        self._carried: tuple | None = None
        self._previous: Observation | None = None
        self._step = 0
        self.gate.reset()

    # -- one tick -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, observation: Observation) -> PolicyOutput:
        """One observation, newer than the last. ValueError names what is wrong with it."""
        if self._asked is None:
            return PolicyOutput(None, "no instruction yet: publish one on the instruction topic")
        started = time.perf_counter()
        images = self._images(observation)
        tool = self._tensor(observation.tool_pose[:3, 3])
        step = self._step
        asked = self._asked.at(step)
        view = self.engine.encode_observation(images, tool, asked)
        feasibility = float("nan") if view.feasibility is None else float(view.feasibility.sigmoid())
        if view.feasibility is not None and not self.gate.started:  # it does not start on what it could not end
            for later in range(step + 1, self.steps):
                other = self.engine.encode_observation(images, tool, self._asked.at(later)).feasibility
                assert other is not None  # as of the first step
                feasibility = min(feasibility, float(other.sigmoid()))
        looked = time.perf_counter()
        state = self._layout.tokens(state_vectors(observation, self._previous))
        output, self._carried = self.engine.forward(
            {token: self._tensor(values).unsqueeze(0) for token, values in state.items()},
            engines.one_tick(view), asked.summary, self._carried)  # fmt: skip
        actions = self.model.denormalize(output.actions)[0, 0].cpu().numpy()
        self._previous = observation
        ended = time.perf_counter()
        timings = {"vision": 1e3 * (looked - started), "core": 1e3 * (ended - looked), "language": self._language_ms,
                   "total": 1e3 * (ended - started)}  # fmt: skip
        self._language_ms = 0.0
        reason = ""
        if view.feasibility is not None:
            reason = self.gate.judge(feasibility, observation.grippers, self.instruction)
        if not reason and not np.isfinite(actions).all():
            reason = "the policy gave actions that are not numbers"
        done = float("nan") if output.done is None else float(output.done.sigmoid())
        if self.gate.step_done(done, not reason, step + 1 < self.steps):
            self._step = step + 1
        names = self.model.config.primitives
        primitive = "" if output.primitive is None else names[int(output.primitive.argmax())]
        target = np.full(3, np.nan) if output.object_center is None else output.object_center[0, 0].cpu().numpy()
        return PolicyOutput(None if reason else actions, reason, feasibility, primitive, step, done, target, timings)

    # -- inputs -------------------------------------------------------------------------------------------------------
    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(array, np.float32), device=self.device).unsqueeze(0)

    def _images(self, observation: Observation) -> tuple[CameraInput, ...]:
        """Every camera of the contract, in its order; ValueError names one that is missing or wrong."""
        if missing := [c.name for c in self.config.contract.cameras if c.name not in observation.cameras]:
            raise ValueError(f"no image of camera {missing[0]}: the policy was trained with it")
        return tuple(self._image(camera, observation.cameras[camera.name]) for camera in self.config.contract.cameras)

    def _image(self, camera: Camera, image: CameraImage) -> CameraInput:
        """Resize to the network's square and bring the intrinsics along. Nothing is stretched silently."""
        color, depth, size = image.color, image.depth, self.config.policy.image_size
        if color.ndim != 3 or color.shape[2] != 3 or color.dtype != np.uint8:
            raise ValueError(f"colour image of {camera.name} must be (H, W, 3) uint8, got {color.shape} {color.dtype}")
        if depth is not None and depth.shape != color.shape[:2]:
            raise ValueError(f"depth {depth.shape} is not aligned to colour {color.shape[:2]}: use aligned depth")
        known = camera.pose == "known"
        if known and (image.pose is None or image.intrinsics is None):
            raise ValueError(f"camera {camera.name} has no pose or no calibration: the policy was trained with them")
        intrinsics = image.intrinsics if image.intrinsics is not None else np.eye(3)
        color, depth, intrinsics = square(color, None if camera.depth == "none" else depth, intrinsics, size)
        if depth is None:
            if camera.depth == "required":
                raise ValueError(f"camera {camera.name} has no depth: the policy was trained with it")
            depth = np.zeros((size, size), np.float32)
        near, far = camera.depth_range
        depth = np.where((depth >= near) & (depth <= far), depth, 0.0)
        pixels = torch.as_tensor(np.ascontiguousarray(color), device=self.device).permute(2, 0, 1).unsqueeze(0)
        if not known:
            return CameraInput(pixels, self._tensor(depth))
        assert image.pose is not None
        return CameraInput(pixels, self._tensor(depth), self._tensor(intrinsics), self._tensor(image.pose))

"""A recording, a checkpoint and the settings, checked against each other and ready to be replayed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vla_nodes.pipeline.policy_loop import fingerprint, misfits
from vla_nodes.pipeline.robot_description import RobotDescription
from vla_nodes.replay.open_loop import Replay, Sink
from vla_nodes.replay.outputs import Fan, copied
from vla_nodes.rosbag import timeline as clocks
from vla_nodes.rosbag.read import Bag, BagError
from vla_nodes.rosbag.topics import ON_DEMAND, Topics, resolve
from vla_nodes.share import SHIPPED_CHECKPOINT, share_path

LATENCY = 0.05
"""s of bag time that a policy step takes unless told otherwise."""


class ReplayError(ValueError):
    """One line (or a table after one): what does not fit what, and the remedy."""


@dataclass
class Session:
    """Raises BagError or ReplayError while it is made."""

    bag: Bag
    parameters: dict[str, dict[str, Any]]
    checkpoint: Path | None = None  # None: the parameter's, or the package's own
    instruction: str = ""  # "": those of the recording, or the parameter's
    latency: float = LATENCY
    clock: str = "auto"
    remaps: Sequence[str] = ()
    namespace: str = ""
    topics: Topics = field(init=False)
    began: float = field(default_factory=time.perf_counter)  # what a user waits for is counted from here

    def __post_init__(self) -> None:
        p = self.parameters["policy_node"]
        needed = ["color", "info", "joints"]
        needed += ["depth"] if p["use_depth"] else []
        needed += ["camera_pose"] if p["camera_pose_source"] == "topic" else []
        self.instruction = self.instruction or p["instruction"]
        also = ON_DEMAND if p["camera_pose_source"] == "tf" else ()
        self.topics = resolve(self.bag, self.remaps, self.namespace, needed, also)
        if also and not any(self.topics[name] for name in also):
            raise BagError(f"{self.bag.path}: camera_pose_source is tf, and neither /tf nor /tf_static is in the bag")
        if not self.instruction and not (self.topics["instruction"] or self.topics["active_instruction"]):
            raise BagError(f"{self.bag.path}: no instruction in the recording: give one with --instruction")
        self.clock = clocks.choose(self.bag, self.topics, self.clock)
        if len({values["contract"] for values in self.parameters.values()}) > 1:
            raise ReplayError("policy_node.contract and action_node.contract name different files: it is one robot")
        self.description = RobotDescription(p["contract"])
        self.robot = self.description.model()
        chosen = self.checkpoint or (Path(p["checkpoint"]).expanduser() if p["checkpoint"] else None)
        self.checkpoint = chosen or share_path(SHIPPED_CHECKPOINT)
        self.runtime = load(self.checkpoint, p)
        contract = self.runtime.config.contract
        if len(contract.cameras) > 1:
            names = ", ".join(camera.name for camera in contract.cameras)
            raise ReplayError(f"{self.checkpoint}: replay feeds one camera, this policy looks through {names}")
        if table := misfits(contract, self.description):
            raise ReplayError(f"{self.checkpoint}: the checkpoint does not fit this robot:\n{table}")
        self.begin(Sink())  # a parameter out of range is said before anything is written
        if self.instruction and (reason := self.runtime.check_instruction(self.instruction)):
            raise ReplayError(f"instruction refused: {reason}")

    def replay(
        self, sinks: Sequence[Sink], images: bool = False, progress: Callable[[Any], None] | None = None
    ) -> tuple[Replay, str, float]:
        """One pass: (the Replay at its end, "" or why it ended early, wall time in s)."""
        import torch

        torch.set_flush_denormal(False)  # some libraries set it in the thread that loads them
        run = self.begin(Fan(sinks))
        events = clocks.timeline(self.bag, self.topics, self.clock, copied(self.bag, images))
        started, ended = time.perf_counter(), ""
        try:
            run.run(events, progress)
        except BagError as error:
            ended = str(error)
        return run, ended, time.perf_counter() - started

    def begin(self, sink: Sink) -> Replay:
        """A Replay before its first message. Raises ValueError for a parameter out of range."""
        workspace = self.description.robot.workspace
        return Replay(self.runtime, self.robot, workspace, self.parameters, self.latency, sink, self.instruction)

    def joint_names(self) -> tuple[list[str], dict[str, str]]:
        """Names of the arm's joints, and of each gripper's by the gripper's name, as the robot calls them."""
        action = self.begin(Sink()).action
        return action.arm_names, action.gripper_joints

    def settings(self) -> dict[str, Any]:
        """What the result depends on besides the bag and the files of the checkpoint."""
        engine, checkpoint = self.runtime.engine, self.checkpoint
        assert checkpoint is not None  # __post_init__ sets it
        return {
            "bag": self.bag.path.name,
            "topics": dict(sorted(self.topics.by_input.items())),
            "clock": self.clock,
            "latency_s": self.latency,
            "instruction": self.instruction,
            "engine": f"{engine.name} {engine.precision}",
            "checkpoint": f"{checkpoint.name} {fingerprint(checkpoint)}",
            "parameters": {
                node: {k: v for k, v in values.items() if k not in ("checkpoint", "instruction")}
                for node, values in self.parameters.items()
            },
        }


def load(checkpoint: Path, policy: dict[str, Any]) -> Any:
    """The policy as policy_node loads it, with arithmetic that does not depend on the machine's load."""
    import cv2
    import torch

    from vla_nodes.policy.inference.engine import EXPORTED, EngineError
    from vla_nodes.policy.runtime import PolicyRuntime

    if policy["device"] == "cuda":
        raise ReplayError("policy_node.device is cuda: replay runs on the CPU, where equal inputs give equal bytes")
    torch.set_deterministic_debug_mode("warn")  # as use_deterministic_algorithms, which imports a compiler for seconds
    cv2.setNumThreads(1)
    # On the robot auto is what is fastest at the moment; here it must be the same from run to run.
    names = [*filter(find_spec, EXPORTED), "torch"] if policy["engine"] == "auto" else [policy["engine"]]
    try:
        for name in names[:-1]:
            with suppress(EngineError):
                return PolicyRuntime.load(checkpoint, "cpu", policy["threads"], name)
        return PolicyRuntime.load(checkpoint, "cpu", policy["threads"], names[-1])
    except ValueError as error:
        raise ReplayError(str(error)) from None

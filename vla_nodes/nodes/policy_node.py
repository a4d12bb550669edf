"""policy_node: synchronised images of the contract's cameras, joint states and an instruction in; ActionChunk out.

Images are subscribed best effort, one deep; what is computed when is in `pipeline.policy_loop`. Without an instruction,
with stale images, when inactive, or when the policy itself declines, nothing is published on vla/action_chunk and
vla/status says why.
"""

from __future__ import annotations

import threading
import time
from array import array
from pathlib import Path

import numpy as np
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String

from vla_nodes.messages.camera_pose import SOURCES
from vla_nodes.messages.convert import chunk_fields, status_fields
from vla_nodes.messages.sync import CameraStreams
from vla_nodes.msg import ActionChunk, PolicyStatus
from vla_nodes.nodes.base import ERROR, LATCHED, LATEST, OK, RELIABLE_LATEST, WARN, BaseNode, ConfigureError, run
from vla_nodes.nodes.camera_pose_input import LiveCameraPose
from vla_nodes.nodes.liveness import Change, Rate
from vla_nodes.nodes.lockstep_timers import WATCH
from vla_nodes.nodes.parameters import Param, declare
from vla_nodes.nodes.robot_parameter import CONTRACT, robot_description
from vla_nodes.nodes.to_messages import status_key, to_time
from vla_nodes.pipeline.policy_core import PolicyCore, Result, State, Worker
from vla_nodes.pipeline.policy_loop import STATUS_PERIOD, WATCH_PERIOD, Job, PolicyLoop, fingerprint, misfits
from vla_nodes.policy.inference import engine as engines
from vla_nodes.share import SHIPPED_CHECKPOINT, share_path

POSE = "x y z qx qy qz qw of the camera's colour optical frame in base, for source 'parameter'."
MAX_SHOWN = 256
"""Most characters of an instruction repeated in a log or a status."""


class PolicyNode(BaseNode):
    """Runs a checkpoint's policy on the newest observation."""

    params = (
        Param("checkpoint", "", f"Checkpoint folder; empty: {SHIPPED_CHECKPOINT} of this package."),
        Param("device", "auto", "Where the policy runs.", choices=("auto", "cpu", "cuda")),
        Param("engine", "auto", "What computes it on a CPU; see policy/inference/engine.py.", choices=engines.NAMES),
        Param("threads", 1, "CPU threads of the policy.", 1, 256),
        Param("rate", 0.0, "Policy steps per second of observation time [Hz]; 0: the checkpoint's own.", 0.0, 100.0),
        Param("max_image_age", 0.5, "Oldest observation acted upon [s], ROS clock.", 0.02, 10.0),
        Param("slop", 0.02, "Largest difference of colour and depth stamps [s].", 0.0, 0.5),
        Param("use_depth", True, "Subscribe the depth that is optional in the checkpoint's contract."),
        Param("instruction", "", "Instruction put in force at activation."),
        Param(
            "resume_instruction",
            False,
            "Go on with the instruction in force after this node or action_node was deactivated or restarted; off, it "
            "is withdrawn then, and the arm rests until it is told again.",
        ),
        Param("camera_pose_source", "topic", "Where the cameras' poses in base come from.", choices=SOURCES),
        Param("camera_pose", [0.0], POSE),
        CONTRACT,
        Param("paced_latency", 0.05, "What a step takes in the player's time, where paced [s].", 0.0, 5.0),
        Param("joint_map", [""], "Pairs 'our_joint:robot_joint' where joint_states uses other names."),
    )

    def __init__(self) -> None:
        super().__init__("policy_node")
        self._made_worker: Worker | None = None
        # So that no instruction is accepted between deciding on a chunk and publishing it.
        self._lock = threading.RLock()

    @property
    def _worker(self) -> Worker:
        """What configure made; only asked for between configure and cleanup."""
        assert self._made_worker is not None, "not configured"
        return self._made_worker

    # -- lifecycle ---------------------------------------------------------------------------------
    def configure(self) -> None:
        from vla_nodes.policy.runtime import PolicyRuntime  # torch takes seconds to import: only where it is used

        folder = Path(self.value("checkpoint") or share_path(SHIPPED_CHECKPOINT)).expanduser()
        described = robot_description(self.value("contract"))
        self._robot = described.model()
        runtime = PolicyRuntime.load(folder, self.value("device"), self.value("threads"), self.value("engine"))
        contract = runtime.config.contract
        if table := misfits(contract, described):
            raise ConfigureError(f"the checkpoint does not fit this robot:\n{table}")
        self._checkpoint = f"{folder.name} {fingerprint(folder)}"
        rate = self.value("rate") or 1.0 / contract.tick
        if abs(rate * contract.tick - 1) > 0.05:
            self.get_logger().warning(f"rate is {rate} Hz, the checkpoint was trained at {1 / contract.tick:.1f} Hz")
        self._core = PolicyCore(runtime, rate, self.value("max_image_age"))
        self._loop = PolicyLoop(
            self._core, self._robot, self.value("slop"), self.value("use_depth"), self.value("joint_map")
        )
        self._base = described.robot.base_frame
        self._poses = {camera.name: self._pose_of(camera.name) for camera in contract.cameras if camera.pose == "known"}
        self._pose_at = {name: pose.at for name, pose in self._poses.items()}
        self._leader = contract.cameras[0].name
        self._frame_rate, self._dropped_before = Rate(), 0
        self._chunk_pub = self.publish_on(ActionChunk, "vla/action_chunk", self.between())
        self._status_pub = self.publish_on(PolicyStatus, "vla/status", self.between(), managed=False)
        self._active_pub = self.publish_on(String, "vla/active_instruction", LATCHED, managed=False)
        for streams in self._loop.sync.cameras.values():
            self._subscribe_camera(streams)
        self.subscribe(JointState, "joint_states", self._on_joints, 10)
        self.subscribe(String, "instruction", self._on_instruction, RELIABLE_LATEST)
        self._made_worker = Worker(self._loop.compute, self._computed)
        self._begun, self._pending = 0, False
        self._status_at, self._chunks, self._said = 0.0, 0, ""
        self.every(WATCH_PERIOD, self._watch, WATCH)
        if self.value("resume_instruction"):
            self.subscribe(String, "vla/last_instruction", self._on_last_instruction, LATCHED)

    def activate(self) -> None:
        self._pending = False
        self._loop.clear()
        if not self._core.instruction and self.value("instruction"):
            self._instruct(self.value("instruction"))
        self._core.activate()
        self._dropped_before = self._loop.dropped_frames()
        self._publish_status()

    def deactivate(self) -> None:
        with self._lock:
            self._core.deactivate()
            if not self.value("resume_instruction"):
                self._withdraw("policy_node was deactivated")
            self._publish_status()

    def cleanup(self) -> None:
        if self._made_worker is not None:
            if not self._worker.stop():
                self.get_logger().error("the policy step under way does not end: it is left behind")
            self._made_worker = None

    def clock_jumped(self) -> None:
        self._loop.clear()
        for pose in self._poses.values():
            pose.clear()
        self._core.reset()
        self._core.waiting("the clock was set back: waiting for an observation")

    # -- inputs ------------------------------------------------------------------------------------
    def _pose_of(self, camera: str) -> LiveCameraPose:
        """Where a camera stands, from the source chosen; its parameter is declared where it is not there yet."""
        if not self.has_parameter(f"{camera}_pose"):
            declare(self, [Param(f"{camera}_pose", [0.0], POSE)])
        source, written = self.value("camera_pose_source"), self.value(f"{camera}_pose")
        return LiveCameraPose(self, source, self._base, written, camera)

    def _subscribe_camera(self, streams: CameraStreams) -> None:
        camera = streams.name
        color, depth = f"{camera}/color/image_raw", f"{camera}/aligned_depth_to_color/image_raw"

        def on_color(message: Image) -> None:
            now = time.monotonic()
            if camera == self._leader:
                self._frame_rate.tick(now)
            self.inputs.heard(color, now)
            self._loop.color(message, camera)
            self._try()

        def on_depth(message: Image) -> None:
            self.inputs.heard(depth, time.monotonic())
            self._loop.depth(message, camera)
            self._try()

        def on_info(message: CameraInfo) -> None:
            self._loop.info(message, camera)
            self._try()

        self.subscribe(Image, color, on_color, LATEST)
        if streams.info:
            self.subscribe(CameraInfo, f"{camera}/color/camera_info", on_info, LATEST)
        if streams.depth:
            self.subscribe(Image, depth, on_depth, LATEST)

    def _on_joints(self, message: JointState) -> None:
        if problem := self._loop.joints(message):
            self.get_logger().error(problem)
        if not self._loop.joint_problem:
            self.inputs.heard("joint_states", time.monotonic())
            self._try()

    def _on_instruction(self, message: String) -> None:
        self._instruct(message.data)
        self._publish_status()

    def _on_last_instruction(self, message: String) -> None:
        """What was in force when a policy_node before this one ended, kept by action_node."""
        if message.data and not self._core.instruction and not self._core.refused:
            self.get_logger().info("resuming the instruction that was in force")
            self._instruct(message.data)

    def peer_stopped(self, name: str) -> None:
        """Whoever activates action_node again need not know what was asked of the arm before."""
        kept = self.value("resume_instruction") or self.pacing.paced  # a player in lock step: silence is no sign
        if name == "action_node" and self.configured and not kept:
            self._withdraw("action_node was deactivated, or its process ended or fell silent")
            self._publish_status()

    def _withdraw(self, why: str) -> None:
        with self._lock:
            if not self._core.instruction:
                return
            self._core.withdraw(f"the instruction was withdrawn, as {why}: publish it again")
        self.get_logger().warning(f"instruction withdrawn: {why}")
        self._active_pub.publish(String())

    def _instruct(self, text: str) -> None:
        with self._lock:
            refused = self._core.instruct(text)
        if refused:
            self.get_logger().warning(f"instruction refused, the arm holds: {refused}")
        else:
            self.get_logger().info(f'instruction: "{text[:MAX_SHOWN]}"')
        if not self.active:
            self._core.deactivate()
        self._active_pub.publish(String(data=self._core.instruction))

    # -- one step ----------------------------------------------------------------------------------
    def _try(self) -> None:
        """Give the worker the newest complete observation, if it is due and the worker is free."""
        if not self.active or self._computing:
            return
        job = self._loop.next(self.now(), self._pose_at)
        if job is None:
            return
        self._begun, self._pending = self.get_clock().now().nanoseconds, self.pacing.paced
        if self._worker.offer(job):
            self._core.started(job.ticket)

    @property
    def _computing(self) -> bool:
        """A step is under way: in the worker, or, paced, until the player's clock says that it has taken its time."""
        return self._worker.busy or self._pending

    def _computed(self, result: Result) -> None:
        """Worker thread: a step has ended."""
        if self.pacing.paced:
            self.pacing.once(self._begun, self.value("paced_latency"), lambda: self._done(result))
        else:
            self._done(result)

    def _done(self, result: Result) -> None:
        """Publish the chunk, if it still serves what is asked for now."""
        self._pending = False
        ticket, output = result.job.ticket, result.output
        if result.error is not None:
            self.get_logger().error(f"policy step failed: {result.error!r}", throttle_duration_sec=2.0)
        with self._lock:
            finished = self._core.finished(ticket, output, result.error, result.seconds, self.now())
            if finished and self.active and output is not None:
                self._chunk_pub.publish(self._chunk_message(result.job, output.actions))
                self._chunks += 1
            self._publish_status()

    def _chunk_message(self, job: Job, actions: np.ndarray) -> ActionChunk:
        fields = chunk_fields(self._core.runtime.config.contract.actions, job.ticket.instruction, actions)
        message = ActionChunk(**{**fields, "actions": array("f", fields["actions"].tobytes())})
        message.header.stamp = job.pair.first.color.header.stamp
        message.header.frame_id = self._base
        return message

    # -- status ------------------------------------------------------------------------------------
    def _watch(self) -> None:
        """Steady clock: notice that nothing comes, and keep vla/status going."""
        if self.active and self._core.instruction and not self._computing:
            self._try()
        if self.active and self._core.instruction and not self._computing:
            silent = self.inputs.lost()
            self._loop.watch(self.now(), f"nothing on {', '.join(silent)}" if silent else self._pose_problem())
        if self.steady_now() - self._status_at > STATUS_PERIOD + 1e-6:  # the replay counts in ns: no rounding of floats
            self._publish_status()

    def _pose_problem(self) -> str:
        """Why a camera's pose is not known, or ""."""
        return next((problem for pose in self._poses.values() if (problem := pose.problem())), "")

    def _publish_status(self) -> None:
        fields = status_fields(self._core)
        stamp, target = fields.pop("stamp"), fields.pop("target")
        message = PolicyStatus(**fields)
        message.header.frame_id = self._base
        message.header.stamp = self.get_clock().now().to_msg() if stamp is None else to_time(stamp)
        message.target.x, message.target.y, message.target.z = (float(v) for v in target)
        message.dropped_frames = max(0, self._loop.dropped_frames() - self._dropped_before)
        message.checkpoint = self._checkpoint
        self._status_pub.publish(message)
        self._said = status_key(message)
        self._status_at = self.steady_now()

    def progress(self) -> dict[str, object]:
        if self._made_worker is None:
            return {}
        busy = self._worker.busy  # read before the counters: the worker stops being busy only after its chunk was sent
        return {"busy": busy, "sent": {"vla/action_chunk": self._chunks}, "status": self._said}

    def input_changed(self, change: Change) -> None:
        if change.lost and self.active:
            self._core.waiting(f"nothing on {change.name} for {change.silence:.1f} s")
            self._publish_status()

    def diagnostics(self) -> tuple[bytes, str, dict[str, object]]:
        core, now = self._core, time.monotonic()
        last, p50, p99 = core.latencies()
        values = {
            "state": core.state.name,
            "instruction": core.instruction[:MAX_SHOWN],
            "checkpoint": self._checkpoint,
            "steps": core.ticks,
            "colour rate [Hz]": f"{self._frame_rate.hz(now):.1f}",
            "latency last, p50, p99 [ms]": f"{last:.1f}, {p50:.1f}, {p99:.1f}",
            "age of the observation acted upon [s]": f"{core.age():.3f}",
            **{f"dropped {reason}": count for reason, count in self._loop.sync.dropped.items()},
        }
        if core.output is not None:
            values |= {f"time {name} [ms]": f"{ms:.1f}" for name, ms in core.output.timings.items()}
        if unable := self._loop.joint_problem or self._pose_problem():
            return ERROR, unable, values
        if core.state in (State.RUNNING, State.DONE):
            return OK, core.state.name.lower(), values
        return (OK if core.state == State.WAITING_INSTRUCTION and not core.refused else WARN), core.reason, values


def main(args: list[str] | None = None) -> int:
    return run(PolicyNode, args)


if __name__ == "__main__":
    raise SystemExit(main())

"""policy_node: synchronised RGB-D, joint states and an instruction in; ActionChunk out.

Images are subscribed best effort, one deep; pairing and latest-only work are in `data.sync` and `policy_core`. Without
an instruction, with stale images, when inactive, or when the policy itself declines, nothing is published on
vla/action_chunk and vla/status says why.
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String

from vla_nodes.control.chunk import ActionSpace
from vla_nodes.control.robot import RobotModel
from vla_nodes.data.images import decode_color, decode_depth
from vla_nodes.data.joints import JointInput
from vla_nodes.data.sync import ObservationSync, Pair
from vla_nodes.msg import ActionChunk, PolicyStatus
from vla_nodes.nodes.base import ERROR, LATCHED, LATEST, OK, RELIABLE_LATEST, WARN, BaseNode, ConfigureError, run
from vla_nodes.nodes.camera_pose import SOURCES as POSE_SOURCES
from vla_nodes.nodes.camera_pose import CameraPose
from vla_nodes.nodes.convert import seconds
from vla_nodes.nodes.parameters import Param
from vla_nodes.nodes.peers import Change, Rate
from vla_nodes.pipeline.policy_core import PolicyCore, Result, State, Ticket, Worker
from vla_nodes.policy import engine as engines
from vla_nodes.share import share_path

STATUS_PERIOD = 0.15
"""s between two vla/status without a step in between (> 5 Hz)."""
MAX_SHOWN = 256
"""Most characters of an instruction repeated in a log or a status."""
COLUMNS = {
    ActionSpace.EE_DELTA: ("dx", "dy", "dz", "rx", "ry", "rz", "gripper"),
    ActionSpace.EE_POSE: ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper"),
}


@dataclass(frozen=True)
class Job:
    """What the worker gets: messages as they came, decoded there."""

    ticket: Ticket
    pair: Pair
    camera_pose: np.ndarray


class PolicyNode(BaseNode):
    """Runs a checkpoint's policy on the newest observation."""

    params = (
        Param("checkpoint", "", "Checkpoint folder; empty: resource/checkpoints/nano of this package."),
        Param("device", "auto", "Where the policy runs.", choices=("auto", "cpu", "cuda")),
        Param("engine", "torch", "What computes it on a CPU; see policy/engine.py.", choices=engines.NAMES),
        Param("threads", 1, "CPU threads of the policy.", 1, 256),
        Param("rate", 0.0, "Policy steps per second of observation time [Hz]; 0: the checkpoint's own.", 0.0, 100.0),
        Param("max_image_age", 0.5, "Oldest observation acted upon [s], ROS clock.", 0.02, 10.0),
        Param("slop", 0.02, "Largest difference of colour and depth stamps [s].", 0.0, 0.5),
        Param("use_depth", True, "Subscribe depth. Off only for a policy that was trained without."),
        Param("instruction", "", "Instruction put in force at activation."),
        Param("resume_instruction", True, "After a restart go on with the instruction that was in force."),
        Param("camera_pose_source", "topic", "Where the camera's pose in base comes from.", choices=POSE_SOURCES),
        Param("camera_pose", [0.0], "x y z qx qy qz qw of the colour optical frame in base, for source 'parameter'."),
        Param("urdf", "config/panda/panda.urdf", "Robot description: a path, or one below the package's share folder."),
        Param("tool_frame", "panda_hand_tcp", "Tool frame of the robot; must be the checkpoint's."),
        Param("base_frame", "panda_link0", "Base frame of the robot; must be the checkpoint's."),
        Param("joint_map", [""], "Pairs 'our_joint:robot_joint' where joint_states uses other names."),
    )

    def __init__(self) -> None:
        super().__init__("policy_node")
        self._worker: Worker | None = None
        self._lock = threading.RLock()  # an instruction never comes between a step's verdict and its chunk

    # -- lifecycle ---------------------------------------------------------------------------------
    def configure(self) -> None:
        from vla_nodes.policy.runtime import PolicyRuntime  # torch takes seconds to import: only where it is used

        folder = Path(self.value("checkpoint") or share_path("resource/checkpoints/nano")).expanduser()
        urdf = Path(self.value("urdf"))
        self._robot = RobotModel(urdf if urdf.is_absolute() else share_path(str(urdf)), self.value("tool_frame"))
        runtime = PolicyRuntime.load(folder, self.value("device"), self.value("threads"), self.value("engine"))
        self._check_fit(runtime.config)
        config = runtime.config
        self._space = ActionSpace(config.action_space)
        self._columns = list(COLUMNS.get(self._space, (*config.joint_names, "gripper")))
        self._checkpoint = f"{folder.name} {_fingerprint(folder)}"
        rate = self.value("rate") or 1.0 / config.tick
        if abs(rate * config.tick - 1) > 0.05:
            self.get_logger().warning(f"rate is {rate} Hz, the checkpoint was trained at {1 / config.tick:.1f} Hz")
        self._core = PolicyCore(runtime, rate, self.value("max_image_age"))
        self._sync = ObservationSync(self.value("slop"), self.value("use_depth"))
        joints = (*config.joint_names, config.gripper_joint)
        self._joints = JointInput(joints, self.value("joint_map"), self.get_logger().error)
        self._period, self._base = config.period, self.value("base_frame")
        self._camera = CameraPose(self, self.value("camera_pose_source"), self._base, self.value("camera_pose"))
        self._frame_rate, self._dropped_before = Rate(), 0
        self._chunk_pub = self.publish_on(ActionChunk, "vla/action_chunk", RELIABLE_LATEST)
        self._status_pub = self.publish_on(PolicyStatus, "vla/status", RELIABLE_LATEST, managed=False)
        self._active_pub = self.publish_on(String, "vla/active_instruction", LATCHED, managed=False)
        self.subscribe(Image, "camera/color/image_raw", self._on_color, LATEST)
        self.subscribe(CameraInfo, "camera/color/camera_info", self._on_info, LATEST)
        if self.value("use_depth"):
            self.subscribe(Image, "camera/aligned_depth_to_color/image_raw", self._on_depth, LATEST)
        self.subscribe(JointState, "joint_states", self._on_joints, 10)
        self.subscribe(String, "instruction", self._on_instruction, RELIABLE_LATEST)
        self._worker = Worker(self._compute, self._done)
        self._status_at = 0.0
        self.every(0.05, self._watch)
        if self.value("resume_instruction"):
            self.subscribe(String, "vla/last_instruction", self._on_last_instruction, LATCHED)

    def activate(self) -> None:
        self._sync.clear()
        if not self._core.instruction and self.value("instruction"):
            self._instruct(self.value("instruction"))
        self._core.activate()
        self._dropped_before = self._dropped()
        self._publish_status()

    def deactivate(self) -> None:
        with self._lock:
            self._core.deactivate()
            self._publish_status()

    def cleanup(self) -> None:
        if self._worker is not None:
            if not self._worker.stop():
                self.get_logger().error("the policy step under way does not end: it is left behind")
            self._worker = None

    def clock_jumped(self) -> None:
        self._sync.clear()
        self._core.reset()
        self._core.waiting("the clock was set back: waiting for an observation")

    # -- inputs ------------------------------------------------------------------------------------
    def _on_color(self, message: Image) -> None:
        now = time.monotonic()
        self._frame_rate.tick(now)
        self.inputs.heard("camera/color/image_raw", now)
        self._sync.add_color(seconds(message.header.stamp), message)
        self._try()

    def _on_depth(self, message: Image) -> None:
        self.inputs.heard("camera/aligned_depth_to_color/image_raw", time.monotonic())
        self._sync.add_depth(seconds(message.header.stamp), message)
        self._try()

    def _on_info(self, message: CameraInfo) -> None:
        self._sync.add_info(seconds(message.header.stamp), message)
        self._try()

    def _on_joints(self, message: JointState) -> None:
        joints = self._joints.read(message.name, message.position, message.velocity)
        if joints is None:
            return
        self.inputs.heard("joint_states", time.monotonic())
        self._sync.add_joints(seconds(message.header.stamp), *joints)
        newest = self._sync.newest("color")
        if newest is not None and self._core.due(newest):
            self._try()

    def _on_instruction(self, message: String) -> None:
        self._instruct(message.data)
        self._publish_status()

    def _on_last_instruction(self, message: String) -> None:
        """What was in force when a policy_node before this one ended, kept by action_node."""
        if message.data and not self._core.instruction and not self._core.refused:
            self.get_logger().info("resuming the instruction that was in force")
            self._instruct(message.data)

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
        newest = self._sync.newest("color")
        if not self.active or newest is None or not self._core.due(newest) or self._worker.busy:
            return
        camera_pose = self._camera.matrix()
        if camera_pose is None:
            return
        pair = self._sync.take()
        if pair is None or not self._core.due(pair.stamp):
            return
        ticket = self._core.ticket(pair.stamp, self.now())
        if ticket is not None and self._worker.offer(Job(ticket, pair, camera_pose)):
            self._core.started(ticket)

    def _compute(self, job: Job) -> Any:
        """Worker thread: decode, kinematics, policy."""
        from vla_nodes.policy.runtime import Observation

        pair, config = job.pair, self._core.runtime.config
        self._core.prepare(job.ticket)
        color, info, joints = pair.color, pair.info, pair.joints
        if (info.width, info.height) != (color.width, color.height):
            raise ValueError(
                f"camera_info is for {info.width}x{info.height} pixels, the image has {color.width}x{color.height}"
            )
        rgb = decode_color(color.data, color.height, color.width, color.step, color.encoding, color.is_bigendian)
        d = pair.depth
        depth = None if d is None else decode_depth(d.data, d.height, d.width, d.step, d.encoding, d.is_bigendian)
        intrinsics = np.asarray(info.k, dtype=float).reshape(3, 3)
        if not (intrinsics[0, 0] > 0 and intrinsics[1, 1] > 0):
            raise ValueError("camera_info has no focal length (k is zero): the camera is not calibrated")
        arm = len(config.joint_names)
        return self._core.runtime.step(
            Observation(
                stamp=pair.stamp,
                color=rgb,
                depth=depth,
                intrinsics=intrinsics,
                camera_pose=job.camera_pose,
                joint_positions=joints.position[:arm],
                joint_velocities=joints.velocity[:arm],
                gripper=float(self._robot.gripper.opening(joints.position[arm])),
                ee_pose=self._robot.forward(joints.position[:arm]),
            )
        )

    def _done(self, result: Result) -> None:
        """Worker thread: publish the chunk, if it still serves what is asked for now."""
        ticket, output = result.job.ticket, result.output
        if result.error is not None:
            self.get_logger().error(f"policy step failed: {result.error!r}", throttle_duration_sec=2.0)
        with self._lock:
            if self._core.finished(ticket, output, result.error, result.seconds, self.now()) and self.active:
                self._chunk_pub.publish(self._chunk_message(ticket, result.job.pair, output.actions))
            self._publish_status()

    def _chunk_message(self, ticket: Ticket, pair: Pair, actions: np.ndarray) -> ActionChunk:
        rows = np.ascontiguousarray(actions, dtype=np.float32)
        message = ActionChunk(
            instruction=ticket.instruction,
            period=self._period,
            action_space=self._space.value,
            names=self._columns,
            horizon=rows.shape[0],
            dim=rows.shape[1],
            actions=array("f", rows.tobytes()),
        )
        message.header.stamp = pair.color.header.stamp
        message.header.frame_id = self._base
        return message

    # -- status ------------------------------------------------------------------------------------
    def _watch(self) -> None:
        """Steady clock: notice that nothing comes, and keep vla/status going."""
        core = self._core
        if self.active and core.instruction and not self._worker.busy:
            self._try()
            why = self._lack()
            if why and core.state not in (State.INACTIVE, State.WAITING_INSTRUCTION):
                core.waiting(why)
        if time.monotonic() - self._status_at > STATUS_PERIOD:
            self._publish_status()

    def _lack(self) -> str:
        """Why there is no observation to act upon: "" while they come."""
        if self._joints.problem:
            return self._joints.problem
        silent = self.inputs.lost()
        if silent:
            return f"nothing on {', '.join(silent)}"
        if (problem := self._camera.problem()) != "":
            return problem
        last = self._core.output_stamp
        if last is None:
            return self._sync.why_not()
        age = self.now() - last
        if age > self._core.max_image_age + self._core.period:
            return self._sync.why_not() or f"the newest observation is {age:.2f} s old"
        return ""

    def _publish_status(self) -> None:
        core, output = self._core, self._core.output
        message = PolicyStatus(state=int(core.state), reason=core.reason[:500], instruction=core.instruction)
        message.header.frame_id = self._base
        if core.output_stamp is not None:
            message.header.stamp.sec, nanosec = divmod(round(core.output_stamp * 1e9), 1_000_000_000)
            message.header.stamp.nanosec = nanosec
        else:
            message.header.stamp = self.get_clock().now().to_msg()
        target = np.full(3, np.nan) if output is None else np.asarray(output.target, dtype=float)
        message.target.x, message.target.y, message.target.z = (float(v) for v in target)
        if output is not None:
            message.primitive, message.grounding = output.primitive, float(output.grounding)
        message.latency_ms, message.latency_p50_ms, message.latency_p99_ms = core.latencies()
        message.observation_age = core.age()
        message.ticks = core.ticks
        message.dropped_frames = max(0, self._dropped() - self._dropped_before)
        message.checkpoint = self._checkpoint
        self._status_pub.publish(message)
        self._status_at = time.monotonic()

    def _dropped(self) -> int:
        return sum(count for reason, count in self._sync.dropped.items() if reason.startswith("color"))

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
            **{f"dropped {reason}": count for reason, count in self._sync.dropped.items()},
        }
        if core.output is not None:
            values |= {f"time {name} [ms]": f"{ms:.1f}" for name, ms in core.output.timings.items()}
        if self._joints.problem or self._camera.problem():
            return ERROR, self._joints.problem or self._camera.problem(), values
        if core.state in (State.RUNNING, State.DONE):
            return OK, core.state.name.lower(), values
        return (OK if core.state == State.WAITING_INSTRUCTION and not core.refused else WARN), core.reason, values

    def _check_fit(self, config: Any) -> None:
        """Refuse a checkpoint made for another robot, with a table of what differs."""
        from vla_nodes.policy.checkpoint import misfit_table

        gripper = self._robot.gripper
        rows = config.misfits(
            joint_names=tuple(self._robot.joint_names),
            gripper_joint=None if gripper is None else gripper.joint,
            tool_frame=self.value("tool_frame"),
            base_frame=self.value("base_frame"),
        )
        if config.action_space not in [space.value for space in ActionSpace]:
            rows.append(("action_space", config.action_space, " or ".join(space.value for space in ActionSpace)))
        if rows:
            raise ConfigureError(f"the checkpoint does not fit this robot:\n{misfit_table(rows)}")


def _fingerprint(folder: Path) -> str:
    """First characters of the hash of the weights, so that a log tells which policy ran."""
    digest = hashlib.sha256()
    with open(folder / "model.safetensors", "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:8]


def main(args: list[str] | None = None) -> int:
    return run(PolicyNode, args)


if __name__ == "__main__":
    raise SystemExit(main())

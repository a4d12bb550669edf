"""action_node: ActionChunk to the JointTrajectory a stock controller accepts, behind the safety gate.

Silence of the policy, of the camera (seen as the policy's own hold) or of joint_states means one decelerating stop,
said once. An arm that does not follow, vla/stop and an emergency stop (a Bool on each of `estop_topics`) hold it until
vla/resume. dry_run publishes to vla/preview/... only.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger

from vla_nodes.control.guards import SelfCollisionGuard
from vla_nodes.control.safety import SafetySettings
from vla_nodes.control.seam_report import SeamLog
from vla_nodes.control.settings import ExecutorSettings, OnInstructionChange, Strategy
from vla_nodes.control.streams import Output
from vla_nodes.msg import ActionChunk as ActionChunkMessage
from vla_nodes.msg import PolicyStatus
from vla_nodes.nodes import command_outputs
from vla_nodes.nodes.base import ERROR, LATCHED, LATEST, OK, RELIABLE_LATEST, WARN, BaseNode, run
from vla_nodes.nodes.command_outputs import ActionDoor, ForwardDoor, TopicDoor
from vla_nodes.nodes.liveness import Change
from vla_nodes.nodes.lockstep_timers import GATE
from vla_nodes.nodes.parameters import Param
from vla_nodes.nodes.robot_parameter import CONTRACT, robot_description
from vla_nodes.nodes.to_messages import status_key
from vla_nodes.pipeline.action_core import ActionCore, Answer
from vla_nodes.pipeline.action_loop import GATE_PERIOD, ActionLoop, executor_settings, safety_settings

E, S = ExecutorSettings(), SafetySettings()


class ActionNode(BaseNode):
    """Carries out chunks; see the module's docstring."""

    params = (
        CONTRACT,
        Param(
            "joint_map", [""], "Pairs 'our_joint:robot_joint' where joint_states and the controllers use other names."
        ),
        Param(
            "output",
            Output.TOPIC.value,
            "How trajectories reach the controllers: JointTrajectory on a topic, FollowJointTrajectory goals (needs "
            "control_msgs), or Float64MultiArray positions for a forward_command_controller.",
            choices=tuple(o.value for o in Output),
        ),
        Param("command_rate", 100.0, "Rate of forward_positions commands [Hz].", 10.0, 1000.0),
        Param("self_collision", False, "Refuse motions in which links would touch, by the URDF's collision geometry."),
        Param("seam_log", "", "File to which the seam of every chunk is appended, for 'python -m vla_nodes seams'."),
        Param("dry_run", False, "Publish to vla/preview/... only; the arm does not move."),
        Param(
            "strategy",
            E.strategy.value,
            "What a new chunk does to the motion in flight.",
            choices=tuple(s.value for s in Strategy),
        ),
        Param(
            "on_instruction_change",
            E.on_instruction_change.value,
            "What the first chunk of a new instruction does to the motion in flight.",
            choices=tuple(s.value for s in OnInstructionChange),
        ),
        Param("velocity_scale", E.velocity_scale, "Share of the robot's joint velocity limits used.", 0.01, 1.0),
        Param("acceleration_scale", E.acceleration_scale, "Share of its acceleration limits used.", 0.01, 1.0),
        Param("jerk_scale", E.jerk_scale, "Share of its jerk limits used.", 0.01, 1.0),
        Param("tool_speed", E.tool_speed, "Largest speed of the tool [m/s].", 0.01, 5.0),
        Param("lead", E.lead, "How far ahead of now a splice begins [s].", 0.0, 0.5),
        Param("blend", E.blend, "Shortest time in which a new chunk is joined [s].", 0.05, 2.0),
        Param("effort", E.effort, "Share of the limits that joining a new chunk may use.", 0.1, 1.0),
        Param("smoothing", E.smoothing, "How far rows may be moved to take noise out [rad]; 0: off.", 0.0, 0.02),
        Param("table", S.table, "Height below which the tool does not go [m].", -5.0, 5.0),
        Param(
            "outside",
            S.outside,
            "Rows outside the box: keep those before, or refuse the chunk.",
            choices=("truncate", "refuse"),
        ),
        Param("max_age", S.max_age, "Oldest observation a chunk may serve [s].", 0.05, 10.0),
        Param("step_factor", S.step_factor, "Share of top speed above which a row is impossible.", 0.1, 10.0),
        Param(
            "tracking_tolerance",
            S.tracking_tolerance,
            "Measured-minus-commanded error of a joint at which the arm is held until vla/resume [rad].",
            0.005,
            3.0,
        ),
        Param("tracking_time", S.tracking_time, "How long that error must last [s].", 0.0, 5.0),
        Param("estop_topics", ["estop"], "Emergency stop topics (std_msgs/Bool), one for each source."),
        Param("joint_timeout", 0.5, "Silence of joint_states that stops the arm [s]; 0: never.", 0.0, 5.0),
        Param(
            "chunk_timeout",
            S.chunk_timeout,
            "Time without a usable chunk that stops a moving arm [s]; 0: never.",
            0.0,
            10.0,
        ),
        Param("policy_timeout", 0.7, "Silence of vla/status that counts as a dead policy [s].", 0.3, 10.0),
        Param(
            "deadman_timeout",
            S.deadman_timeout,
            "Silence of vla/deadman that stops the arm [s]; 0: not used.",
            0.0,
            5.0,
        ),
    )

    def __init__(self) -> None:
        super().__init__("action_node")
        self._made_core: ActionCore | None = None
        self._held = ""
        self._doors: dict = {}
        self._seams: SeamLog | None = None

    @property
    def _core(self) -> ActionCore:
        """What configure made; only asked for between configure and cleanup."""
        assert self._made_core is not None, "not configured"
        return self._made_core

    # -- lifecycle ---------------------------------------------------------------------------------
    def configure(self) -> None:
        described = robot_description(self.value("contract"))
        robot, safety = described.model(), safety_settings(self.value, described.robot.workspace)
        guards = [("self_collision", SelfCollisionGuard(described.urdf, robot))] if self.value("self_collision") else []
        self._seams = SeamLog(Path(self.value("seam_log"))) if self.value("seam_log") else None
        self._made_core = ActionCore(robot, executor_settings(self.value), safety, guards=guards,
                                record=self._seams.write if self._seams else None)  # fmt: skip
        if self._held:  # a stop outlives what was configured when it was asked for
            self._core.gate.stop()
        self._loop = ActionLoop(self._core, self.value("joint_map"))
        self._doors = self._made_doors()
        self.subscribe(ActionChunkMessage, "vla/action_chunk", self._on_chunk, self.between())
        self.subscribe(PolicyStatus, "vla/status", self._on_status, self.between())
        self.subscribe(JointState, "joint_states", self._on_joints, 10)
        self._last_instruction_pub = self.publish_on(String, "vla/last_instruction", LATCHED, managed=False)
        self.subscribe(String, "vla/active_instruction", self._last_instruction_pub.publish, LATCHED)
        self._subscribe_estops()
        self.subscribe(Bool, "vla/deadman", self._on_deadman, RELIABLE_LATEST)
        self.serve(Trigger, "vla/stop", self._on_stop)
        self.serve(Trigger, "vla/resume", self._on_resume)
        self.inputs.expect("vla/status", self.value("policy_timeout"))
        self.inputs.expect("joint_states")
        self._last, self._heard_status = Answer(), ""
        self.every(GATE_PERIOD, self._tick_gate, GATE)

    def activate(self) -> None:
        self._core.reset()
        if self.value("dry_run"):
            self.get_logger().warning("dry_run is set: trajectories go to vla/preview/... and the arm does not move")

    def deactivate(self) -> None:
        self._publish(Answer(arm=self._core.stop(self.now())))

    def cleanup(self) -> None:
        if self._made_core is not None:
            self._held = self._core.gate.holding
        for door in self._doors.values():
            door.close()
        self._doors = {}
        if self._seams is not None:
            self._seams.close()
            self._seams = None

    def clock_jumped(self) -> None:
        self._core.reset()
        for door in self._doors.values():
            door.reset()

    def _made_doors(self) -> dict[str, TopicDoor | ActionDoor | ForwardDoor]:
        prefix, output = "vla/preview/" if self.value("dry_run") else "", Output(self.value("output"))
        parts = {"arm": self._loop.arm_names, **{name: [joint] for name, joint in self._loop.gripper_joints.items()}}
        return {
            part: command_outputs.make(self, output, part, joints, self.value("command_rate"), prefix, self._on_lost)
            for part, joints in parts.items()
        }

    def progress(self) -> dict[str, object]:
        return {"status": self._heard_status} if self.configured else {}

    # -- inputs ------------------------------------------------------------------------------------
    def _on_joints(self, message: JointState) -> None:
        before, answer = self._loop.joint_problem, Answer()
        if self.active:
            answer = self._loop.joints(message, self.steady_now())
        else:
            self._loop.read_joints(message)
        if problem := self._loop.joint_problem:
            if problem != before:
                self.get_logger().error(problem)
            return
        self.inputs.heard("joint_states", time.monotonic())
        if answer.new:
            self._say(answer)

    def _on_chunk(self, message: ActionChunkMessage) -> None:
        if self.active:
            self._publish(self._loop.chunk(message, self.now()))

    def _on_status(self, message: PolicyStatus) -> None:
        self._heard_status = status_key(message)
        self.inputs.heard("vla/status", time.monotonic())
        self._loop.status(message.state, message.reason)

    def _subscribe_estops(self) -> None:
        """Each topic thrice: what was latched before, publishers that latch nothing (ros2 topic pub), and those whose
        quality of service is best effort. Some are heard more than once, which changes nothing."""
        topics = self.value("estop_topics")
        if not topics or len(set(topics)) < len(topics) or not all(topics):
            raise ValueError(f"estop_topics is {list(topics)}: name one topic or more, each once")
        for topic in topics:
            try:
                self.resolve_topic_name(topic)
            except RuntimeError as error:
                raise ValueError(f"estop_topics: '{topic}' cannot be a topic's name") from error
            for reader, qos in (("latched", LATCHED), ("reliable", RELIABLE_LATEST), ("best effort", LATEST)):
                self.subscribe(Bool, topic, partial(self._on_estop, topic, reader), qos)

    def _on_estop(self, topic: str, reader: str, message: Bool) -> None:
        gate, before = self._core.gate, self._core.gate.estops
        gate.estop(message.data, topic, reader)
        if gate.estops == before:
            return
        if message.data:
            self.get_logger().warning(f"emergency stop on {topic}")
            self._tick_gate()
        elif gate.estops:
            self.get_logger().warning(f"{topic} released; still stopped by {', '.join(gate.estops)}")
        else:
            self.get_logger().warning(f"emergency stop on {topic} released; vla/resume to go on")

    def _on_deadman(self, message: Bool) -> None:
        if message.data:
            self._core.gate.deadman(self.steady_now())

    def _on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._core.gate.stop()
        self._tick_gate()
        response.success, response.message = True, "stopping; vla/resume to go on"
        return response

    def _on_resume(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        why = self._core.gate.resume()
        response.success, response.message = why is None, why or "going on with the next chunk"
        self.get_logger().info(f"resume: {response.message}")
        return response

    # -- outputs -----------------------------------------------------------------------------------
    def _tick_gate(self) -> None:
        if self.active:
            self._publish(self._loop.tick(self.now(), self.steady_now()))

    def _publish(self, answer: Answer) -> None:
        for part, trajectory in {"arm": answer.arm, **(answer.grippers or {})}.items():
            if trajectory is not None and part in self._doors:
                self._doors[part].send(trajectory)
        if answer.new:
            self._say(answer)
        self._last = answer if answer.reason else self._last

    def _on_lost(self, reason: str, astray: bool) -> None:
        """A goal was refused or given up: where the arm is going is no longer ours to say."""
        self._publish(self._core.lost(reason, astray))

    def _say(self, answer: Answer) -> None:
        self.get_logger().warning(f"{answer.cause}: {answer.reason[:300]}")

    def input_changed(self, change: Change) -> None:
        if change.name == "vla/status" and change.lost:
            self._loop.idle = f"the policy is silent: no vla/status for {change.silence:.1f} s"
            if self.active:
                self._tick_gate()

    def diagnostics(self) -> tuple[bytes, str, dict[str, object]]:
        core, now = self._core, self.now()
        values = {
            "moving": core.moving(now),
            "held for": core.holding or "nothing",
            "held because": core.reason or "nothing",
            "emergency stops": ", ".join(core.gate.estops) or "none",
            "last refusal": self._last.reason or "none",
            "dry run": self.value("dry_run"),
            **core.numbers(),
        }
        if self._seams is not None:
            self._seams.flush()
            values["seam log"] = self._seams.problem or self.value("seam_log")
        if self._loop.joint_problem:
            return ERROR, self._loop.joint_problem, values
        if core.holding in ("estop", "stop"):
            return WARN, f"held: {core.holding}", values
        if core.holding and core.holding != "policy":
            return ERROR, f"held: {core.holding} ({core.reason})", values
        return OK, "carrying out chunks" if core.moving(now) else (self._loop.idle or "at rest"), values


def main(args: list[str] | None = None) -> int:
    return run(ActionNode, args)


if __name__ == "__main__":
    raise SystemExit(main())

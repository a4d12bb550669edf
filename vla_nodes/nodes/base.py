"""What the suite's lifecycle nodes share: parameters that are errors when wrong, heartbeats, diagnostics, a clean end.

A node derives from `BaseNode`, lists its `params`, and fills in `configure`, `activate`, `deactivate` and `cleanup`.
Whatever is wrong at configure is raised as an exception with one clear line; it is logged and the node stays
unconfigured. Each node tells the others five times a second that it lives (`vla/heartbeat`), shows in its diagnostics
how long ago it heard each of them, and says once, as a warning and in its diagnostics, when one of its inputs or
another node of the suite has fallen silent. A node that it has not heard (people run camera_node alone, and after a
start the network may take seconds) is shown so, and is no reason for a warning. An illegal transition is refused
(transitions.py), and a second node of the same name ends before it serves anything (heartbeat.py).
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rclpy
import rclpy.logging
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String
from std_srvs.srv import SetBool

from vla_nodes.nodes import heartbeat
from vla_nodes.nodes.heartbeat import Beat
from vla_nodes.nodes.liveness import Change, Watch
from vla_nodes.nodes.lockstep_timers import OTHER, Pacing
from vla_nodes.nodes.parameters import Param, declare, params_files, unknown, unknown_sections
from vla_nodes.nodes.transitions import refuse_illegal

LATEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST)
"""Sensor subscriptions: matches reliable and best-effort publishers, and never queues old images."""
RELIABLE_LATEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_LAST)
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    history=HistoryPolicy.KEEP_LAST,
)

SUITE = ("sim_node", "camera_node", "policy_node", "action_node")
"""Those that hear each other's heartbeats."""
NODES = (*SUITE, "recorder_node", "player_node")
BEAT_PERIOD = 0.2
CHECK_PERIOD = 0.1
DIAGNOSTICS_PERIOD = 1.0

OK, WARN, ERROR, STALE = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR, DiagnosticStatus.STALE

AUTOSTART = Param(
    "autostart",
    False,
    "Configure and activate when the process starts, without a lifecycle manager (also when it is respawned). Later "
    "transitions are left to whoever asks for them.",
)

PACED = Param(
    "paced",
    False,
    "A player_node in lock step sets the pace: periodic work follows its clock, and silent inputs are not watched.",
)


class ConfigureError(ValueError):
    """Something the operator has to put right before the node can be configured; the text says what and how."""


class BaseNode(LifecycleNode):
    """Lifecycle node of the suite; see the module's docstring."""

    params: tuple[Param, ...] = ()

    def __init__(self, name: str, **kwargs: Any) -> None:
        """Raises heartbeat.NameTakenError where another node of this name runs."""
        self._claim = heartbeat.claim(name)
        super().__init__(name, **kwargs)
        refuse_illegal(self)
        self._params = {param.name: param for param in (AUTOSTART, PACED, *self.params)}
        self._problems = declare(self, tuple(self._params.values()))
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self.steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.inputs = Watch()
        self.peers = Watch()
        for peer in SUITE:
            if peer != self.get_name():
                self.peers.expect(peer)
        self.active = False
        self.ended: int | None = None
        self.params_files: list[Path] = []  # those of the command line
        self._resources: list[Any] = []
        self._drops = 0
        self.pacing = Pacing()
        self._active_peers: dict[str, str] = {}  # name: identity of its process
        self._beat_pub = self.create_publisher(String, heartbeat.TOPIC, 10)
        self._diagnostics_pub = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_subscription(String, heartbeat.TOPIC, self._on_beat, 10)
        self.create_service(SetBool, "~/progress", self._on_progress)
        self._ticks = 0
        self._ticked = 0.0
        self._ready = True
        self.create_timer(CHECK_PERIOD, self._tick, clock=self.steady)
        threshold = JumpThreshold(min_forward=None, min_backward=Duration(seconds=-0.05), on_clock_change=False)
        self._jump_handle = self.get_clock().create_jump_callback(threshold, post_callback=self._on_jump)
        self._beat()

    # -- for the node to fill in -------------------------------------------------------------------
    def configure(self) -> None:
        """Create what the parameters ask for; raise with one clear line where that cannot be."""

    def activate(self) -> None: ...

    def deactivate(self) -> None: ...

    def cleanup(self) -> None: ...

    def clock_jumped(self) -> None:
        """The ROS clock was set back (simulator reset, bag loop); only called while configured."""

    def input_changed(self, change: Change) -> None:
        """An input has fallen silent or come back; a warning has been logged."""

    def peer_changed(self, change: Change) -> None: ...

    def peer_stopped(self, name: str) -> None:
        """Another node of the suite that was active no longer is: deactivated, ended, fallen silent or started anew."""

    def diagnostics(self) -> tuple[bytes, str, dict[str, Any]]:
        """(level, message, values) for /diagnostics."""
        return OK, "running", {}

    def progress(self) -> dict[str, Any]:
        """What a node adds to the answer of ~/progress: messages sent, and whether it is computing."""
        return {}

    # -- helpers -----------------------------------------------------------------------------------
    def now(self) -> float:
        """s on the ROS clock (simulated where use_sim_time is set)."""
        return self.get_clock().now().nanoseconds * 1e-9

    def steady_now(self) -> float:
        """s on a clock that never goes back: the machine's, or, `paced`, the player's."""
        return self.pacing.steady(self.get_clock().now().nanoseconds)

    def value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def subscribe(self, kind: type, topic: str, callback: Callable[[Any], None], qos: QoSProfile | int = 10) -> Any:
        """Subscription that lives from configure to cleanup. Where `paced`, nothing is lost: a player waits for each
        message to be handled."""
        if self.pacing.paced and isinstance(qos, QoSProfile) and qos.reliability == ReliabilityPolicy.BEST_EFFORT:
            qos = RELIABLE_LATEST
        counted = self.pacing.counted(self.resolve_topic_name(topic), self._until_cleanup(callback))
        return self._keep(self.create_subscription(kind, topic, counted, qos))

    def publish_on(
        self, kind: type, topic: str, qos: QoSProfile | int = 10, managed: bool = True, **options: Any
    ) -> Any:
        """Publisher that lives from configure to cleanup; a managed one is silent while the node is not active."""
        create = self.create_lifecycle_publisher if managed else self.create_publisher
        return self._keep(create(kind, topic, qos, **options))

    def serve(self, kind: type, name: str, callback: Callable[[Any, Any], Any]) -> Any:
        return self._keep(self.create_service(kind, name, self._until_cleanup(callback)))

    def every(self, period: float, callback: Callable[[], None], rank: int = OTHER) -> Any:
        """A timer on the steady clock, which runs on when /clock stands still; `paced`: see lockstep_timers.py."""
        if self.pacing.paced:
            return self.pacing.every(period, callback, rank)
        guarded = self._until_cleanup(callback)  # called without arguments: a newer rclpy would give it a TimerInfo
        return self._keep(self.create_timer(period, lambda: guarded(), clock=self.steady))

    def end_process(self, status: int) -> None:
        """Have `run` end this process, with this exit status."""
        self.ended = status

    def keep_time(self) -> None:
        """For a node whose own fast timer, when the machine is slow, crowds out the one that beats and watches."""
        if time.monotonic() - self._ticked > 1.5 * CHECK_PERIOD:
            self._tick()

    def between(self) -> QoSProfile:
        """QoS of what the nodes tell each other: the latest. Where `paced`, also for a node that came later: nothing is
        said again while the player waits."""
        return LATCHED if self.pacing.paced else RELIABLE_LATEST

    # -- lifecycle ---------------------------------------------------------------------------------
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            if self._problems:
                raise ConfigureError("; ".join(self._problems.values()))
            self.pacing.paced = self.value("paced")
            with self._beating():
                self.configure()
            # After configure, because the publishers' qos_overrides are declared with the publishers.
            if wrong := unknown(self) + unknown_sections(self.params_files, (*NODES, self.get_name())):
                raise ConfigureError("; ".join(wrong))
        except Exception as error:
            self._report("configure", error)
            self._drop()
            return TransitionCallbackReturn.FAILURE
        self.get_logger().info("configured")
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        result = super().on_activate(state)  # publishers first: activate may publish
        try:
            self.activate()
        except Exception as error:
            self._report("activate", error)
            super().on_deactivate(state)
            return TransitionCallbackReturn.FAILURE
        self.active = True
        self._beat()
        self.get_logger().info("active")
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.active = False
        try:
            self.deactivate()  # before the publishers go silent: deactivate may publish the stop
        except Exception as error:
            self._report("deactivate", error)
        self._beat()
        self.get_logger().info("inactive")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._drop()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self.active:
            self.on_deactivate(state)
        self._drop()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.active = False
        self._drop()
        return TransitionCallbackReturn.SUCCESS

    @property
    def configured(self) -> bool:
        return self._state_machine.current_state[1] not in ("unconfigured", "finalized")

    def close(self) -> None:
        """End of the process, however it came about: stop what moves, tell the others, free what is held."""
        self._ready = False
        try:
            if self.active:
                self.active = False
                self.deactivate()
            self._beat(heartbeat.GONE)
        except Exception as error:  # the context may be gone already; there is nobody left to tell
            self.get_logger().debug(f"at shutdown: {error}")
        self._drop()

    def destroy_node(self) -> None:
        super().destroy_node()
        self._claim.release()

    # -- private -----------------------------------------------------------------------------------
    def _keep(self, resource: Any) -> Any:
        self._resources.append(resource)
        return resource

    def _until_cleanup(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """The callback, and nothing after what was configured with it is gone: an executor still calls what it had
        taken before. A service then gives its response as it came, which says no success."""
        configured = self._drops

        def guarded(*arguments: Any) -> Any:
            if self._drops == configured:
                return callback(*arguments)
            return arguments[1] if len(arguments) > 1 else None

        return guarded

    def _drop(self) -> None:
        self._drops += 1
        try:
            self.cleanup()
        except Exception as error:
            self._report("cleanup", error)
        for resource in self._resources:
            for destroy in (self.destroy_subscription, self.destroy_service, self.destroy_timer):
                if destroy(resource):
                    break
            else:
                self.destroy_lifecycle_publisher(resource)
        self._resources.clear()
        self.pacing.clear()
        self.inputs = Watch()

    def _report(self, when: str, error: Exception) -> None:
        if isinstance(error, ValueError | OSError | ImportError | RuntimeError):
            self.get_logger().error(f"cannot {when}: {error}")
        else:
            self.get_logger().error(f"{when} failed: {''.join(traceback.format_exception(error)).rstrip()}")

    def _on_set_parameters(self, parameters: Iterable[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            param = self._params.get(parameter.name)
            if param is None:
                continue
            if (wrong := param.problem(parameter.value)) is not None:
                return SetParametersResult(successful=False, reason=wrong)
            if self.configured and not param.live:
                reason = f"parameter {param.name} is read at configure: deactivate and clean up the node first"
                return SetParametersResult(successful=False, reason=reason)
        for parameter in parameters:
            self._problems.pop(parameter.name, None)
        return SetParametersResult(successful=True)

    def _on_progress(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        """How far this node is, so that a player of a recording need not outrun it: its clock, messages handled by
        topic, what is due when, and what `progress` adds; with `data` it first does what is due by its clock, one
        thing. Answered between two callbacks, so it is never half of one."""
        now = self.get_clock().now().nanoseconds
        if request.data and self.active:
            self.pacing.do(now)
        response.success = self.active
        known = {"now": now, "paced": self.pacing.paced, "taken": self.pacing.taken, "busy": False, "sent": {}}
        known |= self.progress()
        due, ends = (self.pacing.next(now), self.pacing.ends()) if self.active else (None, None)
        response.message = json.dumps({**known, "due": due, "ends": ends})
        return response

    def _on_jump(self, jump: Any) -> None:
        self.pacing.jumped(self.get_clock().now().nanoseconds, jump.delta.nanoseconds)
        if self.configured:
            self.get_logger().info("the clock was set back: starting anew")
            self.clock_jumped()

    def _beat(self, state: str = "") -> None:
        state = state or self._state_machine.current_state[1]
        self._beat_pub.publish(Beat(self.get_name(), state, self._claim.identity).message())

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """Heartbeats from a thread, while this one configures: loading a checkpoint takes seconds."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT_PERIOD):
                self._beat()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _on_beat(self, message: String) -> None:
        beat = Beat.parse(message.data)
        name = beat.name
        if name == self.get_name():
            # Heard only now, where the network took longer to connect the two than the second one waited.
            if heartbeat.must_yield(self._claim.identity, False, beat) and heartbeat.is_listed_twice(self):
                self.get_logger().fatal(heartbeat.taken(self))
                self.end_process(1)
            return
        if name not in SUITE:
            return
        if beat.state != "active" or self._active_peers.get(name, beat.identity) != beat.identity:
            self._peer_stopped(name)
        if beat.state == heartbeat.GONE:
            if not self.peers.is_lost(name):
                self.get_logger().warning(f"{name} has shut down")
            self.peers.forget(name)
            self.peers.expect(name)
            self.peer_changed(Change(name, True, 0.0))
            return
        if beat.state == "active":
            self._active_peers[name] = beat.identity
        if beat.state != heartbeat.CLAIMING:  # it may be about to end, for the one that runs
            self.peers.heard(name, time.monotonic())

    def _peer_stopped(self, name: str) -> None:
        if self._active_peers.pop(name, None) is not None:
            self.peer_stopped(name)

    def _tick(self) -> None:
        if not self._ready:
            return
        now = self._ticked = time.monotonic()
        self._ticks += 1
        if self._ticks % round(BEAT_PERIOD / CHECK_PERIOD) == 0:
            self._beat()
        for change in self.peers.check(now):
            if change.lost:
                self.get_logger().warning(
                    f"{change.name} has fallen silent ({change.silence:.1f} s): is it still running?"
                )
                self._peer_stopped(change.name)
            else:
                self.get_logger().info(f"{change.name} is back after {change.silence:.1f} s")
            self.peer_changed(change)
        for change in () if self.pacing.paced else self.inputs.check(now):
            if change.lost:
                self.get_logger().warning(f"nothing on {change.name} for {change.silence:.1f} s")
            else:
                self.get_logger().info(f"{change.name} is back after {change.silence:.1f} s")
            self.input_changed(change)
        if self._ticks % round(DIAGNOSTICS_PERIOD / CHECK_PERIOD) == 0:
            self._publish_diagnostics(now)

    def _publish_diagnostics(self, now: float) -> None:
        label = self._state_machine.current_state[1]
        level, text, values = self.diagnostics() if self.active else (OK, label, {})
        silent = self.peers.lost() + (self.inputs.lost() if self.active else [])
        if silent and level == OK:
            level, text = WARN, f"silent: {', '.join(silent)}"
        heard = {**self.inputs.ages(now), **self.peers.ages(now)}
        ages = {f"age of {k} [s]": "not heard" if v is None else f"{v:.2f}" for k, v in heard.items()}
        status = DiagnosticStatus(level=level, name=f"{self.get_name()}: state", message=text, hardware_id="vla_nodes")
        merged = {"lifecycle": label, **values, **ages}
        status.values = [KeyValue(key=str(k), value=str(v)) for k, v in merged.items()]
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics_pub.publish(message)


def run(make: Callable[[], BaseNode], args: list[str] | None = None, once: bool = False) -> int:
    """Process entry: spin a node in one thread until Ctrl-C or SIGTERM, then end it without a traceback.

    Returns 0, or what the node gave to `end_process`; 1 where a node of its name runs already; with `once`, 1 where
    autostart does not bring it to active (for a command, which nobody configures again).

    The signals are taken here and not by rclpy, whose handler invalidates the context under the running callback: so
    the node's last words, a stop for the arm among them, are still published.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        stop.set()  # again while ending changes nothing: whoever is in a hurry sends SIGKILL, as ros2 launch does

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    rclpy.init(args=sys.argv if args is None else args, signal_handler_options=SignalHandlerOptions.NO)
    node = None
    try:
        node = make()
        node.params_files = params_files(sys.argv if args is None else args)
        executor = _executor()
        executor.add_node(node)
        if node.value("autostart"):
            started = node.trigger_configure() == TransitionCallbackReturn.SUCCESS
            if started and not stop.is_set():  # nothing is activated that has been told to end
                started = node.trigger_activate() == TransitionCallbackReturn.SUCCESS
            if once and not started:
                node.end_process(1)
        # Not spin(): without a timeout the event-driven executor of rclpy 7.1 waits busily and calls nothing.
        while not stop.is_set() and node.ended is None and rclpy.ok():
            executor.spin_once(timeout_sec=0.2)
    except heartbeat.NameTakenError as error:
        rclpy.logging.get_logger("vla_nodes").fatal(str(error))
        return 1
    except ExternalShutdownException:
        pass
    finally:
        if node is not None:
            node.close()
        rclpy.try_shutdown()
    return (node.ended or 0) if node is not None else 0


def _executor() -> Any:
    """The event-driven executor where this rclpy has it (a third of the CPU time), else the single-threaded one."""
    try:
        from rclpy.experimental import EventsExecutor
    except ImportError:
        return SingleThreadedExecutor()
    return EventsExecutor()

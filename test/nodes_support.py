"""Real node processes over real DDS for the tests: started, watched, and always ended. And a policy that is known."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import rclpy
import robots
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from vla_nodes.demo.processes import free_domain
from vla_nodes.nodes.base import BEAT_PERIOD

ROOT = Path(__file__).resolve().parent.parent
OF_A_ROBOT = ("camera_node", "policy_node", "action_node")
"""Nodes with a parameter `contract`; the Panda where a test names no other."""
PATIENCE = 60.0
"""s; a condition that holds is seen at once."""
START = 240.0
"""s for a process to start: importing torch takes 3 s on an idle machine, a minute where eight others want the core."""
AGAIN = 2.0
"""s after which something is said again that DDS loses while a listener is not discovered yet."""
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def wait_for(condition: Callable[[], object], what: str, patience: float = PATIENCE):
    """Poll until `condition()` is truthy and return it; fail with `what` otherwise."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {patience} s: {what}")


def say(publish: Callable[[], None], taken: Callable[[], object], what: str) -> None:
    """Publish until `taken()`, once where nothing is lost: a node just started may not have been discovered yet."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        publish()
        with contextlib.suppress(AssertionError):
            wait_for(taken, what, AGAIN)
            return
    raise AssertionError(f"not within {PATIENCE} s: {what}")


class Process:
    """One node process in a session of its own, with its output in a file."""

    def __init__(
        self, name: str, arguments: list[str], environment: dict[str, str], folder: Path, script: Path | None = None
    ) -> None:
        """script: run in place of the node's module."""
        program = ["-m", f"vla_nodes.nodes.{name}"] if script is None else [str(script)]
        self.name = name
        self.log_path = folder / f"{name}-{time.monotonic_ns()}.log"
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT,
                preexec_fn=os.setpgrp,  # its own group, so that a Ctrl-C at the tests does not reach it
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> float:
        """SIGKILL; returns the steady time of it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return time.monotonic()

    def interrupt(self, patience: float = PATIENCE) -> int:
        """Ctrl-C; returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(patience)

    def end(self) -> None:
        if self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


PROBE = "probe"


class Graph:
    """Nodes under test and a probe node that hears them, on a DDS domain of their own, loopback only."""

    def __init__(self) -> None:
        self.domain = free_domain()
        self._folder = tempfile.TemporaryDirectory(prefix="vla-nodes-test-")
        self.folder = Path(self._folder.name)
        self.environment = {
            **os.environ,
            "ROS_DOMAIN_ID": str(self.domain),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
            "ROS_LOG_DIR": str(self.folder),
            "RCUTILS_LOGGING_BUFFERED_STREAM": "0",
        }
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        self.processes: list[Process] = []
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=self.domain)
        self.node = rclpy.create_node(PROBE, context=self.context)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self.heard: dict[str, list] = defaultdict(list)
        self.times: dict[str, list[float]] = defaultdict(list)
        self._stop = False
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        while not self._stop and self.context.ok():
            self._executor.spin_once(timeout_sec=0.1)

    def start(
        self,
        name: str,
        *parameters: str,
        autostart: bool = True,
        clock: bool = True,
        extra=(),
        script: Path | None = None,
    ) -> Process:
        """Start a node; `parameters` are "name:=value"; script: as Process."""
        if name == "policy_node" and not any(p.startswith("engine:=") for p in parameters):
            parameters = (*parameters, "engine:=torch")  # exporting a graph takes seconds, and is tested elsewhere
        if name in OF_A_ROBOT and not any(p.startswith("contract:=") for p in parameters):
            parameters = (*parameters, f"contract:={robots.PANDA}")
        given = [*parameters, f"autostart:={str(autostart).lower()}", *(["use_sim_time:=true"] if clock else [])]
        arguments = ["--ros-args", *extra, *(word for p in given for word in ("-p", p))]
        process = Process(name, arguments, self.environment, self.folder, script)
        self.processes.append(process)
        return process

    def hear(self, kind: type, topic: str, qos: QoSProfile | int = 10, keep: int = 4000) -> list:
        """Record a topic's messages; returns the list they are appended to (beside it in `times`, when each was sent,
        in s on the machine's clock: this process may read late)."""

        def callback(message, info) -> None:
            if len(self.heard[topic]) < keep:
                self.times[topic].append(info["source_timestamp"] * 1e-9)
                self.heard[topic].append(message)

        self.node.create_subscription(kind, topic, callback, qos)
        return self.heard[topic]

    def publisher(self, kind: type, topic: str, qos: QoSProfile | int = 10, patience: float = START):
        """Publisher on which a subscriber has been found, other than the probe itself."""
        publisher = self.node.create_publisher(kind, topic, qos)

        def found() -> bool:
            known = self.node.get_subscriptions_info_by_topic(publisher.topic_name)
            return publisher.get_subscription_count() > sum(end.node_name == PROBE for end in known)

        wait_for(found, f"a subscriber on {topic}", patience)
        return publisher

    def wait_until_all_hear(self, names: Iterable[str]) -> None:
        """Until each of these nodes says in its diagnostics, from now on, that it hears the others.

        Before one is killed: where it was never heard it is not missed, and rightly; and DDS, which announces a node
        some times at its start and then every 3 s, takes seconds for that where the first are lost on a busy machine.

        Needs `hear(DiagnosticArray, "/diagnostics")`."""
        names, begun, deaf = list(names), time.time(), {}

        def all_hear() -> bool:
            deaf.clear()
            deaf.update({name: "says nothing" for name in names})
            sent = zip(self.times["/diagnostics"], self.heard["/diagnostics"], strict=False)
            for status in (s for at, message in sent if at > begun for s in message.status):
                name, said = status.name.partition(":")[0], {v.key: v.value for v in status.values}
                ages = {other: said.get(f"age of {other} [s]", "not told") for other in names if other != name}
                deaf[name] = {other: age for other, age in ages.items() if not age[:1].isdigit() or float(age) > 1.0}
            return not any(deaf[name] for name in names)

        try:
            wait_for(all_hear, "")
        except AssertionError:
            raise AssertionError(f"not within {PATIENCE} s: every node hearing every other; missing {deaf}") from None

    def late(self, since: float, gone: str) -> float:
        """s by which heartbeats came too late since then (machine's clock), at worst: what a busy machine costs. That
        of the node that is `gone` is not awaited.

        Needs `hear(String, "vla/heartbeat")`."""
        worst, last = 0.0, {}
        for at, message in zip(self.times["vla/heartbeat"], self.heard["vla/heartbeat"], strict=False):
            name = message.data.partition(" ")[0]
            if at > since and name in last:
                worst = max(worst, at - last[name] - BEAT_PERIOD)
            last[name] = at
        still = [time.time() - at - BEAT_PERIOD for name, at in last.items() if name != gone]
        return max([worst, *still])

    def call(self, kind: type, name: str, request=None):
        """Call a service, which may be that of a node just started, and return its response."""
        client = self.node.create_client(kind, name)
        wait_for(client.service_is_ready, f"service {name}", START)
        future = client.call_async(request or kind.Request())
        wait_for(future.done, f"an answer of {name}")
        return future.result()

    def close(self, told: int = 1500) -> None:
        """End everything; first print the last `told` characters of each log, for pytest to show of a failed test."""
        for process in self.processes:
            print(f"---- {process.name}\n{process.log[-told:]}")
        for process in self.processes:
            process.end()
        self._stop = True
        self._thread.join(5)
        self.node.destroy_node()
        rclpy.try_shutdown(context=self.context)
        self._folder.cleanup()


def write_checkpoint(folder: Path, grounding: float = 8.0, dy: float = 0.1) -> Path:
    """A checkpoint of the real format and the real network, small, whose head says one constant thing.

    It is certain of its grounding (or of the contrary), moves the tool by `dy` (normalised) a row along base y and
    keeps the gripper open: what the nodes do with a policy can then be told from what a policy does.
    """
    import policy_tiny
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from vla_nodes.policy.checkpoint import CheckpointConfig, save
    from vla_nodes.policy.configuration import PolicyConfig, SpaceConfig
    from vla_nodes.policy.language import LanguageConfig
    from vla_nodes.policy.modeling import VlaPolicy

    words = ["[PAD]", "[UNK]", "pick", "up", "the", "red", "green", "blue", "block", "put", "in", "bowl", "hold"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "words.json"
    tokenizer.save(str(source))
    language = LanguageConfig(vocabulary=64, embedding=16, d_model=32, n_layer=1, d_state=8, headdim=8, sentence=16)
    config = PolicyConfig(
        preset="test", image_size=112, vision_widths=(8, 8, 8, 8), feature_width=16, d_model=32, n_layer=1, d_state=8,
        headdim=8, head_width=16, language=language, space=SpaceConfig(center=(0.48, 0.0, 0.15), ground_height=0.0),
    )  # fmt: skip
    torch.manual_seed(0)
    contract = policy_tiny.contract(horizon=16)
    model = VlaPolicy(config, contract, tokenizer)
    with torch.no_grad():
        for part in model.feasibility_head.parts:
            part[-1].weight.zero_()
            part[-1].bias.fill_(grounding)
        model.head.shared.weight.zero_()
        model.head.decoders.zero_()
        row = torch.tensor([0.0, dy, 0.0, 0.0, 0.0, 0.0, 8.0])
        model.head.shared.bias.copy_(row.repeat(contract.actions.horizon))
    made = CheckpointConfig(config, contract, provenance={"command": "written by a test"})
    save(folder, model, made, source)
    return folder

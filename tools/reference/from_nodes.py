"""Parameters, topics and services, from the nodes themselves: each is configured, and what it created is listed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
import types
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tables import code, first_paragraph, table

ROOT = Path(__file__).resolve().parents[2]
ROBOT = {"contract": "config/panda/contract.yaml"}
CONFIGURED: dict[str, list[dict[str, Any]]] = {
    # What is set beside the defaults, so that every topic of a node appears; the first set is the usual one.
    "camera_node": [ROBOT],
    "policy_node": [
        {**ROBOT, "engine": "torch"},
        {**ROBOT, "engine": "torch", "camera_pose_source": "tf", "resume_instruction": True},
    ],
    "action_node": [ROBOT, {**ROBOT, "dry_run": True}, {**ROBOT, "output": "forward_positions"}],
    "recorder_node": [{"out": tempfile.gettempdir()}],
    "player_node": [],  # publishes what its recording holds
}
"""Parameters with which a node is configured here; a node that is not named is configured once, with its defaults."""


def nodes() -> list[str]:
    """The nodes that are installed, in the order in which data flows."""
    flow = ["camera_node", "policy_node", "action_node", "sim_node"]
    found = {file.name for file in (ROOT / "resource/executables").iterdir()}
    return [name for name in flow if name in found] + sorted(found - set(flow))


def node_class(name: str) -> type:
    from vla_nodes.nodes.base import BaseNode

    module = importlib.import_module(f"vla_nodes.nodes.{name}")
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    return next(value for value in own if issubclass(value, BaseNode))


def parameters() -> str:
    from vla_nodes.nodes.base import AUTOSTART, PACED

    head = ["parameter", "default", "range", "what"]
    parts = [
        "# Parameters of the nodes\n",
        "Set them in a params file ([`config/panda/params.yaml`](../../config/panda/params.yaml) is one) or with "
        "`--ros-args -p NAME:=VALUE`. A name that a node does not have is an error at configure. Parameters "
        "are read at configure; those marked *live* may also be changed later.\n",
        "## Every node\n",
        table(head, [_parameter(param) for param in (AUTOSTART, PACED)]),
        "`use_sim_time` and `qos_overrides.*` are those of every ROS 2 node.\n",
    ]
    for name in nodes():
        kind = node_class(name)
        parts += [f"## {name}\n", first_paragraph(sys.modules[kind.__module__]) + "\n"]
        parts.append(table(head, [_parameter(param) for param in kind.params]))
    return "\n".join(parts)


def _parameter(param: Any) -> list[str]:
    if param.choices:
        allowed = ", ".join(map(code, param.choices))
    elif param.low is None and param.high is None:
        allowed = ""
    else:
        low, high = ("" if bound is None else f"{bound:g}" for bound in (param.low, param.high))
        allowed = f"{low} .. {high}"
    what = param.description.strip() + (" *Live.*" if param.live else "")
    if isinstance(param.default, list) and len(param.default) > 4:
        return [
            f"`{param.name}`",
            f"{len(param.default)} names",
            allowed,
            f"{what} Default: {code(json.dumps(param.default))}",
        ]
    return [f"`{param.name}`", code(param.default), allowed, what]


@dataclass(frozen=True)
class Endpoint:
    """One publisher, subscription or service of a node."""

    name: str
    kind: str
    role: str
    node: str
    qos: str


def endpoints() -> list[Endpoint]:
    """What every node creates, in every way that CONFIGURED names."""
    found: dict[Endpoint, None] = {}
    for name in nodes():
        for values in CONFIGURED.get(name, [{}]):
            found |= dict.fromkeys(_configured(name, values))
    return list(found)


def _configured(name: str, values: dict[str, Any]) -> list[Endpoint]:
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "OFF"  # nothing on the network is to meet these nodes
    import rclpy
    from rclpy.lifecycle import TransitionCallbackReturn

    arguments = ["--ros-args", "--log-level", "error", "-r", "__ns:=/ns"]
    for key, value in values.items():
        arguments += ["-p", f"{key}:={json.dumps(value)}"]
    rclpy.init(args=arguments)
    try:
        node = node_class(name)()
        with _with_tf2(node) as absent:
            if node.trigger_configure() != TransitionCallbackReturn.SUCCESS:
                raise SystemExit(f"{name} cannot be configured with {values}; its own line above says why")
        found = [*_endpoints(node, name), *absent]
        node.close()
        node.destroy_node()
    finally:
        rclpy.try_shutdown()
    return found


@contextmanager
def _with_tf2(node: Any) -> Iterator[list[Endpoint]]:
    """Nodes use tf2_msgs where it is installed; here they find it in any case, so that the pages are always the same.

    Gives a list that what a node creates of the stand-in is added to.
    """
    found: list[Endpoint] = []
    if importlib.util.find_spec("tf2_msgs") is not None:
        yield found
        return
    stand_in = type("TFMessage", (), {"__module__": "tf2_msgs.msg"})
    create = {"subscribes": node.subscribe, "publishes": node.publish_on}

    def made(role: str, kind: type, topic: str, *arguments: Any, **options: Any) -> Any:
        if kind is not stand_in:
            return create[role](kind, topic, *arguments, **options)
        found.append(Endpoint(topic, _type(kind), role, node.get_name(), _qos(arguments[-1])))
        return None

    node.subscribe, node.publish_on = partial(made, "subscribes"), partial(made, "publishes")
    modules = {name: types.ModuleType(name) for name in ("tf2_msgs", "tf2_msgs.msg")}
    modules["tf2_msgs.msg"].TFMessage = stand_in
    sys.modules.update(modules)
    try:
        yield found
    finally:
        for name in modules:
            del sys.modules[name]


def _endpoints(node: Any, name: str) -> Iterator[Endpoint]:
    for publisher in node.publishers:
        yield Endpoint(_relative(publisher.topic_name), _type(publisher.msg_type), "publishes", name,
                       _qos(publisher.qos_profile))  # fmt: skip
    for subscription in node.subscriptions:
        yield Endpoint(_relative(subscription.topic_name), _type(subscription.msg_type), "subscribes", name,
                       _qos(subscription.qos_profile))  # fmt: skip
    for service in node.services:
        yield Endpoint(_relative(service.srv_name, name), _type(service.srv_type), "serves", name, "")


def _relative(topic: str, node: str = "") -> str:
    topic = topic.removeprefix("/ns/")
    return "~" + topic.removeprefix(node) if node and topic.startswith(f"{node}/") else topic


def _type(kind: type) -> str:
    package, interface = kind.__module__.split(".")[:2]
    return f"{package}/{interface}/{kind.__name__}"


def _qos(profile: Any) -> str:
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    profile = profile if isinstance(profile, QoSProfile) else QoSProfile(depth=profile)
    best_effort = profile.reliability == ReliabilityPolicy.BEST_EFFORT
    latched = profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
    return ", ".join(
        ["best effort" if best_effort else "reliable", f"last {profile.depth}"] + ["transient local"] * latched
    )


STANDARD = ("/parameter_events", "/rosout", "~/transition_event")
STANDARD_SERVICES = re.compile(r"~/(\w*parameter\w*|change_state|get_\w+)$")
"""What every (lifecycle) node of ROS 2 has."""


def topics_and_services() -> tuple[str, str]:
    from vla_nodes.nodes.interfaces import ACTIONS, SERVICES, TOPICS

    by_name: dict[str, list[Endpoint]] = defaultdict(list)
    for endpoint in endpoints():
        name = "~/transition_event" if endpoint.name.endswith("/transition_event") else endpoint.name
        by_name[name].append(endpoint)
    topics = {n: e for n, e in by_name.items() if e[0].role != "serves" and n not in STANDARD}
    services = {n: e for n, e in by_name.items() if e[0].role == "serves" and not STANDARD_SERVICES.match(n)}
    for what, found, described in (("topic", topics, TOPICS), ("service", services, SERVICES)):
        if missing := sorted(set(found) - set(described)):
            raise SystemExit(f"vla_nodes/nodes/interfaces.py: say what {what} {missing[0]} is for")
        if idle := sorted(set(described) - set(found)):
            raise SystemExit(f"vla_nodes/nodes/interfaces.py: no node uses {what} {idle[0]}")

    def who(role: str, of: list[Endpoint]) -> str:
        by_qos: dict[str, list[str]] = defaultdict(list)
        for endpoint in of:
            if endpoint.role == role:
                by_qos[endpoint.qos].append(endpoint.node)
        everyone = {name for name in nodes() if CONFIGURED.get(name, True)}
        lines = []
        for qos, names in by_qos.items():
            text = "every node" if set(names) == everyone else ", ".join(dict.fromkeys(names))
            lines.append(f"{text} ({qos})" if qos else text)
        return "; ".join(lines)

    head = ["topic", "type", "published by", "subscribed by", "what"]
    rows = [
        [f"`{name}`", f"`{found[0].kind}`", who("publishes", found), who("subscribes", found), TOPICS[name]]
        for name, found in ((name, topics[name]) for name in TOPICS)
    ]
    topic_page = "\n".join([
        "# Topics\n",
        "Relative names, so that a namespace or a remap moves them; a leading slash marks those that stay. In "
        "brackets: reliability, how many messages are kept, and durability where it is not volatile. *Reliable, last "
        "10* is the default of ROS 2. `player_node` publishes what its recording holds, and `/clock`; `recorder_node` "
        "subscribes whatever its parameter `topics` names, with the QoS of the publisher.\n",
        table(head, rows),
    ])  # fmt: skip
    rows = [[f"`{n}`", f"`{services[n][0].kind}`", who("serves", services[n]), SERVICES[n]] for n in SERVICES]
    action_rows = [[f"`{name}`", ACTIONS[name]] for name in ACTIONS]
    service_page = "\n".join([
        "# Services and actions\n",
        "Beside the standard services of every ROS 2 lifecycle node (`change_state`, `get_state`, parameters).\n",
        table(["service", "type", "served by", "what"], rows),
        "## Actions that action_node calls\n",
        "Of type `control_msgs/action/FollowJointTrajectory`; needs the package `control_msgs`.\n",
        table(["action", "what"], action_rows),
    ])  # fmt: skip
    return topic_page, service_page

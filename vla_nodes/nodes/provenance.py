"""What produced a recording: parameters of the suite's nodes, the checkpoint's configuration, the robot description."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rcl_interfaces.srv import GetParameters, ListParameters
from rclpy.parameter import parameter_value_to_python

from vla_nodes.nodes.base import SUITE, BaseNode
from vla_nodes.pipeline.robot_description import RobotDescription, located
from vla_nodes.share import SHIPPED_CHECKPOINT

MAX_FILE = 4 << 20


class Provenance:
    """Asks each node of the suite that is there for its parameters, without waiting for any of them."""

    def __init__(self, node: BaseNode, describe: Callable[[str, Mapping[str, str]], None]) -> None:
        """describe(name, values): takes one metadata record."""
        self._node, self._describe = node, describe
        self._clients: dict[str, tuple[Any, Any]] = {}
        self._pending: dict[str, Any] = {}
        self._done: set[str] = set()

    def again(self) -> None:
        """A new episode: parameters may have changed."""
        self._done.clear()

    def close(self) -> None:
        for pair in self._clients.values():
            for client in pair:
                self._node.destroy_client(client)
        self._clients.clear()

    def look(self) -> None:
        """Call now and then."""
        for name in SUITE:
            if name in self._done:
                continue
            pending = self._pending.get(name)
            if pending is None:
                self._ask(name)
            elif pending.done():
                self._answered(name, pending)

    def _ask(self, name: str) -> None:
        if name not in self._clients:
            self._clients[name] = (
                self._node.create_client(ListParameters, f"{name}/list_parameters"),
                self._node.create_client(GetParameters, f"{name}/get_parameters"),
            )
        listing, _ = self._clients[name]
        if listing.service_is_ready():
            self._pending[name] = listing.call_async(ListParameters.Request())

    def _answered(self, name: str, pending: Any) -> None:
        del self._pending[name]
        answer = pending.result()
        if isinstance(answer, ListParameters.Response):
            names = [n for n in answer.result.names if not n.startswith("qos_overrides")]
            future = self._clients[name][1].call_async(GetParameters.Request(names=names))
            future.names = names
            self._pending[name] = future
            return
        values = dict(zip(pending.names, map(parameter_value_to_python, answer.values), strict=True))
        self._done.add(name)
        self._describe(f"parameters/{name}", {"json": json.dumps(values, sort_keys=True, default=list)})
        if name == "policy_node":
            self._files(values)

    def _files(self, parameters: Mapping[str, Any]) -> None:
        """The checkpoint's configuration, the robot's contract and its URDF, if they are on this machine."""
        checkpoint = Path(parameters.get("checkpoint") or SHIPPED_CHECKPOINT).expanduser()
        contract = urdf = Path(parameters.get("contract", ""))
        with suppress(OSError, ValueError):  # what is wrong with the file is said below, and by policy_node
            urdf = RobotDescription(contract).urdf
        for record, key, path in (
            ("checkpoint", "config.json", checkpoint / "config.json"),
            ("robot_contract", "yaml", contract),
            ("robot_description", "urdf", urdf),
        ):
            try:
                file = located(path)
                if file.stat().st_size <= MAX_FILE:
                    self._describe(record, {key: file.read_text(encoding="utf-8"), "file": str(path)})
            except (OSError, UnicodeDecodeError) as error:
                self._node.get_logger().warning(f"{record} is not recorded: {error}")

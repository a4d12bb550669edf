"""Parameters as data: declared with description and range, and nothing undeclared passes in silence.

A node lists its parameters as `Param`s. `declare` declares them and returns what is wrong with the given values, and
`unknown` names every override that no one declared, with the nearest name that exists, and `unknown_sections` does so
for the nodes that a params file speaks of: a typo in it is an error at configure, not a default that nobody asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import ParameterException
from rclpy.node import Node

from vla_nodes import bounded_yaml


@dataclass(frozen=True)
class Param:
    """One parameter. `low` and `high` bound numbers, `choices` strings; `live` ones may change after configure."""

    name: str
    default: Any
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    live: bool = False

    def problem(self, value: Any) -> str | None:
        """Why `value` is not allowed, or None."""
        if self.choices and value not in self.choices:
            near = nearest(str(value), self.choices)
            return f"parameter {self.name} is '{value}', must be one of {', '.join(self.choices)}{near}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        low, high = self.low, self.high
        if not value == value or (low is not None and value < low) or (high is not None and value > high):
            return f"parameter {self.name} is {value}, must be {_range_text(low, high)}"
        return None


def declare(node: Node, params: Sequence[Param]) -> dict[str, str]:
    """Declare all; returns {parameter: what is wrong with the value given}, such a one is declared as its default."""
    problems = {}
    for param in params:
        default, options = param.default, {"ignore_override": False}
        given = overrides(node).get(param.name)
        if isinstance(default, float) and given is not None and type(given.value) is int:
            default, options = float(given.value), {"ignore_override": True}  # `rate: 10` in YAML is an integer
        if given is not None and (wrong := param.problem(given.value)) is not None:
            problems[param.name] = wrong
            default, options = param.default, {"ignore_override": True}
        try:
            node.declare_parameter(param.name, default, _descriptor(param), **options)
        except ParameterException as error:
            problems[param.name] = f"parameter {param.name}: {error}"
            if not node.has_parameter(param.name):
                node.declare_parameter(param.name, param.default, _descriptor(param), ignore_override=True)
    return problems


def unknown(node: Node) -> list[str]:
    """One line for each override (params file or command line) of a parameter that this node does not have."""
    known = sorted(node.get_parameters_by_prefix("")) or sorted(node._parameters)
    return [
        f"unknown parameter '{name}'{nearest(name, known)}"
        for name in sorted(overrides(node))
        if not node.has_parameter(name)
    ]


def params_files(arguments: Sequence[str]) -> list[Path]:
    """The params files that a process was started with."""
    return [Path(file) for word, file in zip(arguments, arguments[1:], strict=False) if word == "--params-file"]


def unknown_sections(files: Sequence[Path], nodes: Sequence[str]) -> list[str]:
    """One line for each section of the files whose node name is a mistyped one of `nodes`.

    Files are shared with nodes of other packages, so a name that resembles none of `nodes` is theirs, and
    "left_camera_node" is a node that somebody has named so.
    """
    wrong = []
    for file in files:
        for section in _sections(bounded_yaml.read(file)):
            name = section.rsplit("/", 1)[-1]
            if name in nodes or name.endswith(tuple(f"_{node}" for node in nodes)):
                continue
            if near := difflib.get_close_matches(name, nodes, 1, 0.8):
                wrong.append(f"{file}: section '{section}' is for no node: did you mean '{near[0]}'?")
    return wrong


def _sections(content: Any, above: str = "") -> list[str]:
    """The names of the nodes that a params file gives parameters to, with their namespaces."""
    if not isinstance(content, dict):
        return []
    found = [above] if "ros__parameters" in content else []
    for key, below in content.items():
        if key != "ros__parameters":
            found += _sections(below, f"{above}/{key}" if above else str(key))
    return found


def nearest(word: str, words: Sequence[str]) -> str:
    """ ", did you mean 'x'?" for the word that looks most like `word`, or a list to choose from."""
    close = difflib.get_close_matches(word, words, 1, 0.5)
    if close:
        return f": did you mean '{close[0]}'?"
    return f"; there are {', '.join(words)}" if len(words) <= 40 else ""


def overrides(node: Node) -> dict[str, Any]:
    """What params files and the command line give this node, {name: Parameter}.

    rclpy keeps it under a private name and offers no other way to it; a release that renames it must not turn the
    check off in silence, so there is no default here.
    """
    return node._parameter_overrides


def _descriptor(param: Param) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(description=param.description)
    if param.choices:
        descriptor.additional_constraints = "one of " + ", ".join(param.choices)
    if param.low is not None or param.high is not None:
        low = -1e308 if param.low is None else param.low
        high = 1e308 if param.high is None else param.high
        if isinstance(param.default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
        elif isinstance(param.default, int):
            bounds = (max(int(low), -(2**63)), min(int(high), 2**63 - 1))
            descriptor.integer_range = [IntegerRange(from_value=bounds[0], to_value=bounds[1])]
    return descriptor


def _range_text(low: float | None, high: float | None) -> str:
    if high is None:
        return f">= {low}"
    return f"<= {high}" if low is None else f"from {low} to {high}"

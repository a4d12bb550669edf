"""The live nodes' parameters for replay: config/<robot>/params.yaml, a params file over it, single values over both."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_nodes import bounded_yaml
from vla_nodes.share import share_path

DEFAULTS = "config/panda/params.yaml"
NODES = ("policy_node", "action_node")
MAX_VALUES = 10_000


class ParameterError(ValueError):
    """One line: which parameter of which file, what is wrong with it."""


def load(file: Path | None = None, assignments: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """{"policy_node": {parameter: value}, "action_node": {...}}.

    Args:
        file: as the launch file's params_file; what it leaves out is at its default.
        assignments: "policy_node.slop=0.05", values in YAML.

    Raises:
        ParameterError: an unknown name, or a value of another type than the default's.
    """
    values = _sections(share_path(DEFAULTS))
    if file is not None:
        for node, given in _sections(file).items():
            for name, value in given.items():
                _assign(values, node, name, value, str(file))
    for text in assignments:
        place, equals, value = text.partition("=")
        node, dot, name = place.strip().partition(".")
        if not equals or not dot:
            raise ParameterError(f"'{text}' is not NODE.PARAMETER=VALUE, such as policy_node.slop=0.05")
        try:
            _assign(values, node, name, bounded_yaml.parse(value, MAX_VALUES), text)
        except bounded_yaml.YamlError as error:
            raise ParameterError(f"'{text[:80]}': {error}") from None
    return values


def _sections(file: Path) -> dict[str, dict[str, Any]]:
    try:
        document = bounded_yaml.read(file, max_values=MAX_VALUES)
        found: dict[str, dict[str, Any]] = {}
        for key, section in document.items():
            node = key.rsplit("/", 1)[-1]
            if node in NODES:
                found.setdefault(node, {}).update(section["ros__parameters"])
        return found
    except OSError as error:
        raise ParameterError(f"{file}: {error.strerror}") from None
    except bounded_yaml.YamlError as error:
        raise ParameterError(str(error)) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ParameterError(f"{file}: not a ROS 2 parameter file: {str(error).splitlines()[0]}") from None


def _assign(values: dict[str, dict[str, Any]], node: str, name: str, value: Any, source: str) -> None:
    if node not in values:
        raise ParameterError(f"{source}: '{node}' is none of {', '.join(NODES)}")
    if name == "use_sim_time":
        return
    if name not in values[node]:
        close = difflib.get_close_matches(name, values[node], 1, 0.5)
        raise ParameterError(f"{source}: {node} has no parameter '{name}'{f': {close[0]}?' if close else ''}")
    default = values[node][name]
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        wanted = type(default).__name__
        raise ParameterError(f"{source}: {node}.{name} is {value!r}, must be {wanted} (default {default!r})")
    values[node][name] = value

"""YAML from outside, read within bounds: size, nesting and what aliases expand to.

PyYAML itself has none: deep nesting ends its C loader with a segmentation fault, and a few hundred bytes of nested
aliases stand for more values than any memory holds. Both are counted here on the stream of events, which needs next
to no memory, before anything is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, NodeEvent, ScalarEvent

MAX_DEPTH = 64
MAX_VALUES = 2_000_000  # values in all, with each alias counted as all that it stands for
MAX_NUMBER = 4300  # characters of an unquoted number, as Python allows: to base 60, a longer one would take minutes
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlError(ValueError):
    """One line: what is wrong with the text."""


def read(path: str | Path, max_bytes: int = 1 << 20, max_values: int = MAX_VALUES) -> Any:
    """The content of a YAML file.

    Raises:
        OSError: the file cannot be read.
        YamlError: names the file and what is wrong with it.
    """
    path = Path(path)
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise YamlError(f"{path}: more than {max_bytes} bytes")
    try:
        return parse(data.decode("utf-8"), max_values)
    except UnicodeDecodeError as error:
        raise YamlError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except YamlError as error:
        raise YamlError(f"{path}: {error}") from None


def parse(text: str, max_values: int = MAX_VALUES) -> Any:
    """The values of a YAML text, by the safe loader.

    Raises:
        YamlError: it is no YAML, nested deeper than MAX_DEPTH, or of more values than `max_values`.
    """
    try:
        _count(text, max_values)
        return yaml.load(text, LOADER)  # noqa: S506 - a safe loader
    except yaml.MarkedYAMLError as error:
        at = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise YamlError(f"not YAML: {error.problem or 'not understood'}{at}") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # a date of month 13, an unhashable key
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"not YAML: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def _count(text: str, most: int) -> None:
    """Refuse what is nested too deeply or stands for too many values."""
    sizes: dict[str, int] = {}  # of what an anchor names, expanded
    open_nodes: list[list[Any]] = []  # anchor and size of each collection around the present place
    total = documents = 0

    def add(size: int) -> None:
        nonlocal total
        if open_nodes:
            open_nodes[-1][1] += size
        total = size if not open_nodes else open_nodes[0][1]
        if total > most:
            raise YamlError(f"more than {most} values")

    for event in yaml.parse(text, LOADER):
        if isinstance(event, CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
            if len(open_nodes) > MAX_DEPTH:
                raise YamlError(f"nested more than {MAX_DEPTH} deep (line {event.start_mark.line + 1})")
        elif isinstance(event, CollectionEndEvent):
            anchor, size = open_nodes.pop()
            if anchor:
                sizes[anchor] = size
            add(size)
        elif isinstance(event, AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise YamlError(f"alias {event.anchor} stands within what it names")
            add(sizes.get(event.anchor, 1))
        elif isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise YamlError(f"more than one document (line {event.start_mark.line + 1})")
        elif isinstance(event, NodeEvent):
            long = isinstance(event, ScalarEvent) and event.implicit[0] and len(event.value) > MAX_NUMBER
            if long and not event.value.strip("+-.:_0123456789"):
                raise YamlError(f"a number of {len(event.value)} characters (line {event.start_mark.line + 1})")
            if event.anchor:
                sizes[event.anchor] = 1
            add(1)

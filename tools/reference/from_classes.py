"""Configuration keys, from the classes that read them and the comments beside their fields."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
import typing
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any

from tables import code, first_paragraph, table


def configuration() -> str:
    from vla_nodes.pipeline import robot_description
    from vla_nodes.policy import configuration as policy
    from vla_nodes.policy import contract
    from vla_nodes.training import config as training

    parts = ["# Configuration files\n", "## Contract\n",
             "What a robot, its cameras and its data fix; part of a checkpoint's `config.json`.\n"]  # fmt: skip
    aliases = [(name, value) for name, value in vars(contract).items() if hasattr(value, "__metadata__")]
    parts.append("\n".join(f"- `{name}`: {_bounds(value)}" for name, value in aliases) + "\n")
    for kind in _nested(contract.Contract):
        parts += [f"### {kind.__name__}\n", first_paragraph(kind) + "\n", _keys(kind)]
    parts.append("## Robot\n")
    parts.append("One file for each robot, `config/<robot>/contract.yaml`; the nodes' parameter `contract`.\n")
    for kind in _nested(robot_description.RobotFile):
        if not kind.__module__.endswith("contract"):
            parts += [f"### {kind.__name__}\n", first_paragraph(kind) + "\n", _keys(kind)]
    parts += ["## Model\n", "The rest of a checkpoint's `config.json`: the sizes of the network.\n"]
    for kind in _nested(policy.PolicyConfig):
        if not kind.__module__.endswith("contract"):
            parts += [f"### {kind.__name__}\n", first_paragraph(kind) + "\n", _keys(kind)]
    parts += ["## Training\n", "Keys of the files in `config/train/`. `--set KEY=VALUE` changes any of them; "
              "`base: FILE` begins with the keys of another file; `stage` says which of these it is.\n"]  # fmt: skip
    by_kind: dict[type, list[str]] = defaultdict(list)
    for name, kind in training.STAGES.items():
        by_kind[kind].append(name)
    common = next(iter(by_kind)).__mro__[1]
    parts += ["### Every stage\n", _keys(common)]
    for kind, names in by_kind.items():
        stages = ", ".join(f"`stage: {name}`" for name in names)
        parts += [f"### {stages}\n", first_paragraph(kind) + "\n", _keys(kind)]
    return "\n".join(parts)


def _bounds(alias: Any) -> str:
    """What an annotated type of msgspec admits."""
    meta, said = alias.__metadata__[0], []
    for name, text in {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}.items():
        if getattr(meta, name) is not None:
            said.append(f"{text} {getattr(meta, name):g}")
    for name, text in {"min_length": "at least", "max_length": "at most"}.items():
        if getattr(meta, name) is not None:
            said.append(f"{text} {getattr(meta, name)} characters")
    if meta.pattern is not None:
        said.append(f"of the form `{meta.pattern}`")
    return f"`{alias.__origin__.__name__}`, {', '.join(said)}"


def _nested(kind: type, seen: dict[type, None] | None = None) -> list[type]:
    """A structure and those that its fields hold, each once, from the outside in."""
    seen = {} if seen is None else seen
    if kind not in seen:
        seen[kind] = None
        for hint in typing.get_type_hints(kind).values():
            for inner in _mentioned(hint):
                if is_dataclass(inner) or hasattr(inner, "__struct_fields__"):
                    _nested(inner, seen)
    return list(seen)


def _mentioned(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and not typing.get_args(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from _mentioned(argument)


def _keys(kind: type) -> str:
    """A table of the fields that a class itself declares, with the comments that stand beside or above them."""
    rows = []
    for name, hint, what in _commented(kind):
        default = _default(kind, name)
        shown = "required" if default is MISSING else code(default)
        rows.append([f"`{name}`", f"`{hint}`", shown, what])
    return table(["key", "type", "default", "what"], rows) if rows else "Nothing beyond the keys of every stage.\n"


def _default(kind: type, name: str) -> Any:
    if is_dataclass(kind):
        field = kind.__dataclass_fields__[name]
        value = field.default_factory() if field.default_factory is not MISSING else field.default
    else:  # msgspec: fields with a default are the last ones, or found by name where they are keyword-only
        import msgspec

        field = next(f for f in msgspec.structs.fields(kind) if f.name == name)
        made = field.default_factory is not msgspec.NODEFAULT
        value = field.default_factory() if made else field.default
        value = MISSING if value is msgspec.NODEFAULT else value
    if is_dataclass(value) or hasattr(value, "__struct_fields__"):
        return "see below"
    return list(value) if isinstance(value, tuple) else "" if isinstance(value, Path) and not value.parts else value


def _commented(kind: type) -> Iterator[tuple[str, str, str]]:
    """(name, type as it is written, comment) of the fields in a class's source."""
    source = inspect.getsource(kind)
    comments: dict[int, str] = {}
    alone = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    body = ast.parse(inspect.cleandoc(source) if source[0].isspace() else source).body[0].body
    for field, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        above, line = [], field.lineno - 1
        while line in alone and not comments[line].startswith("--"):
            above.insert(0, comments[line])
            line -= 1
        beside = [comments[n] for n in range(field.lineno, field.end_lineno + 1) if n in comments]
        below = []
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            below = [" ".join(str(following.value.value).split())]
        yield field.target.id, ast.unparse(field.annotation), " ".join([*above, *beside, *below])

"""Messages and launch arguments, from the text of their files (`launch` is not on PyPI)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from tables import code, table

ROOT = Path(__file__).resolve().parents[2]


def messages() -> str:
    parts = ["# Messages\n", "SI units: metres, radians, seconds. Axes follow REP 103.\n"]
    for file in sorted((ROOT / "msg").glob("*.msg")):
        head, rows = _message(file.read_text())
        parts += [f"## vla_nodes/msg/{file.stem}\n", head + "\n", table(["field", "type", "what"], rows)]
    return "\n".join(parts)


def _message(text: str) -> tuple[str, list[list[str]]]:
    """(what the first comment says, a row for each field or constant)."""
    rows: list[list[str]] = []
    head, comment = "", []
    for line in text.splitlines():
        if not line.strip():
            if not head:
                head = " ".join(" ".join(comment).split())
            comment = []
        elif line.startswith("#"):
            if comment and rows and rows[-1][3] == comment:
                comment = []  # a new comment after the lines that the last one was about
            comment = [*comment, line.lstrip("# ").rstrip()]
        else:
            field, _, beside = line.partition("#")
            kind, _, name = field.strip().partition(" ")
            name, _, value = name.partition("=")
            shown = f"`{name.strip()}` = `{value.strip()}`" if value else f"`{name.strip()}`"
            rows.append([shown, f"`{kind}`", " ".join([*comment, beside.strip()]).strip(), comment])
    return head, [row[:3] for row in rows]


def launch() -> str:
    """From the sources, because `launch` is not on PyPI."""
    shared = _launch_arguments(ROOT / "vla_nodes/nodes/launching.py")
    parts = ["# Launch files\n", "`ros2 launch vla_nodes FILE --show-args` prints the same.\n"]
    for file in sorted((ROOT / "launch").glob("*.launch.py")):
        module = ast.parse(file.read_text())
        summary = " ".join(ast.get_docstring(module).split("\n\n")[0].split())
        rows = _launch_arguments(file)
        for call in ast.walk(module):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                rows |= shared.get(call.func.id, {})
        head = ["argument", "default", "choices", "what"]
        parts += [f"## {file.name}\n", summary + "\n", table(head, list(rows.values()))]
    return "\n".join(parts)


def _launch_arguments(file: Path) -> dict[str, Any]:
    """{name: row} of a launch file, or {function: {name: row}} of a module that launch files share."""

    def rows(tree: ast.AST) -> dict[str, list[str]]:
        found = {}
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "DeclareLaunchArgument":
                keywords = {keyword.arg: keyword.value for keyword in call.keywords}
                name = ast.literal_eval(call.args[0])
                default = keywords.get("default_value")
                shown = "required" if default is None else code(ast.unparse(default))
                if isinstance(default, ast.Constant):
                    shown = code(default.value)
                choices = ast.literal_eval(keywords["choices"]) if "choices" in keywords else []
                what = ast.literal_eval(keywords["description"])
                found[name] = [f"`{name}`", shown, ", ".join(map(code, choices)), what]
        return found

    module = ast.parse(file.read_text())
    if file.name.endswith(".launch.py"):
        return rows(module)
    return {f.name: rows(f) for f in module.body if isinstance(f, ast.FunctionDef)}

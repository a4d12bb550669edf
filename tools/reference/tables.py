"""Markdown: tables, values, and the first paragraph of a docstring."""

from __future__ import annotations

import inspect
import json
from typing import Any


def first_paragraph(documented: Any) -> str:
    return " ".join(inspect.getdoc(documented).split("\n\n")[0].split())


def table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)]) + "\n"


def code(value: Any) -> str:
    """As YAML would take it, in back quotes."""
    return f"`{value if isinstance(value, str) and value else json.dumps(value, default=str)}`"

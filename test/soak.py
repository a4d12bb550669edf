"""How much the tests do whose amount is free: little in ``./check``, the full amount in ``./check --soak``.

``conftest.py`` sets both values from the command line before any test module is imported.
"""

from __future__ import annotations

enabled = False
"""Whether ``--soak`` was given."""

first_seed = 0
"""Where random streams start (``--first-seed``): another value tries other streams."""


def amount(short: int, full: int) -> int:
    """``full`` with ``--soak``, else ``short``."""
    return full if enabled else short

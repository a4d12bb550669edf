"""How much memory a process takes."""

from __future__ import annotations

from pathlib import Path


def resident_kb() -> int:
    """kB of this process in memory (Linux; elsewhere 0)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) for x in lines if x.startswith("VmRSS")), 0)

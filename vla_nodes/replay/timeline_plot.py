"""The timeline of a replay as a PNG: what was commanded beside what was recorded, errors, certainty, seams."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from vla_nodes.control.seam_plot import COLOURS, Panel
from vla_nodes.pipeline.policy_core import State
from vla_nodes.replay.outputs import Numbers

PALE = 0.45
"""How far the recorded curves are blended towards white, so that the commanded ones stand before them."""


def draw(numbers: Numbers, path: Path) -> None:
    """Write the picture, without the panels that have no data. Raises OSError if it cannot be written."""
    span = (0.0, 1e-9 * (numbers.end - (numbers.origin or 0)))
    panels = [panel for make in (_joints, _errors, _certainty, _seams) if (panel := make(numbers, span)) is not None]
    image = np.concatenate([panel.image for panel in panels]) if panels else np.full((60, 640, 3), 255, np.uint8)
    if not cv2.imwrite(str(path), image):
        raise OSError(f"could not write {path}")


def _joints(numbers: Numbers, span: tuple[float, float]) -> Panel | None:
    t, q = numbers.curves["commanded"].arrays()
    t_m, q_m = numbers.curves["measured"].arrays()
    if not len(t_m):
        return None
    values = np.concatenate([q_m.ravel(), q.ravel()])
    panel = Panel("arm joints, rad: commanded (strong), recorded (pale)", span, values)
    for j, name in enumerate(numbers.joint_names):
        colour = COLOURS[j % len(COLOURS)]
        pale = tuple(int(c + PALE * (255 - c)) for c in colour)
        place = len(numbers.joint_names) - 1 - j
        panel.line(t_m, q_m[:, j], pale, name[-14:], place)
        for part in _pieces(t) if len(t) else ():
            panel.line(t[part], q[part, j], colour, name[-14:], place)
    return panel


def _errors(numbers: Numbers, span: tuple[float, float]) -> Panel | None:
    t, error = numbers.curves["error"].arrays()
    if not len(t):
        return None
    panel = Panel("commanded minus recorded, rad", span, error)
    for j, name in enumerate(numbers.joint_names):
        place = len(numbers.joint_names) - 1 - j
        panel.line(t, error[:, j], COLOURS[j % len(COLOURS)], name[-14:], place)
    return panel


def _certainty(numbers: Numbers, span: tuple[float, float]) -> Panel | None:
    t, grounding = numbers.curves["grounding"].arrays()
    t_s, state = numbers.curves["state"].arrays()
    if not len(t_s):
        return None
    panel = Panel("certainty that what is named is in view; state of the policy", span, np.array([0.0, 1.0]))
    if len(t):
        panel.line(t, grounding, COLOURS[0], "certainty", 1)
    panel.line(t_s, (state == State.RUNNING).astype(float), COLOURS[3], "running", 0)
    return panel


def _seams(numbers: Numbers, span: tuple[float, float]) -> Panel | None:
    t, gap = numbers.curves["gap"].arrays()
    if not len(t):
        return None
    t_l, left = numbers.curves["left"].arrays()
    panel = Panel("at the seam, rad: gap bridged, and what is left", span, np.concatenate([gap, left]), log=True)
    panel.line(t, gap, COLOURS[3], "gap", 1)
    panel.line(t_l, left, COLOURS[0], "left", 0)
    return panel


def _pieces(t: np.ndarray) -> list[slice]:
    """Stretches without a pause, so that no line is drawn across one."""
    if len(t) < 2:
        return [slice(0, len(t))]
    steps = np.diff(t)
    cuts = [0, *(np.flatnonzero(steps > 5 * np.median(steps)) + 1).tolist(), len(t)]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]

"""Names of topics that more than one part of the suite must know."""

from __future__ import annotations

OURS = [
    "arm_controller/joint_trajectory",
    "gripper_controller/joint_trajectory",
    "vla/preview/arm_controller/joint_trajectory",
    "vla/preview/gripper_controller/joint_trajectory",
    "vla/action_chunk",
    "vla/status",
    "vla/active_instruction",
    "vla/last_instruction",
    "vla/heartbeat",
    "/diagnostics",
    "/rosout",
]
"""Topics that the nodes publish: playing recorded ones would conflict with what the live nodes publish."""

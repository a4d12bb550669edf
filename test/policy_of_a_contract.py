"""policy_node with a policy that is nothing but its contract: it moves the first column by 0.01 (rad, m) a row, opens
every gripper half, and writes down what it was given to see. The contract is `contract.json` in the checkpoint folder.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vla_nodes.nodes import policy_node
from vla_nodes.policy.contract import parse
from vla_nodes.policy.runtime import PolicyOutput, PolicyRuntime


class ContractRuntime:
    """What policy_node asks of a PolicyRuntime."""

    def __init__(self, folder: Path) -> None:
        contract = parse(json.loads((folder / "contract.json").read_text()))
        self.config, self._seen = SimpleNamespace(contract=contract), folder / "seen.json"

    def check_instruction(self, text: str) -> str:
        return ""

    def set_instruction(self, text: str) -> None: ...

    def reset(self) -> None: ...

    def step(self, observation) -> PolicyOutput:
        seen = {
            "stamp": observation.stamp,
            "joints": observation.joint_positions.tolist(),
            "velocities": observation.joint_velocities.tolist(),
            "grippers": observation.grippers.tolist(),
            "tool_pose": observation.tool_pose.tolist(),
            "cameras": {
                name: {
                    "color": image.color.shape,
                    "level": int(image.color.mean()),
                    "depth": None if image.depth is None else float(image.depth.mean()),
                    "intrinsics": None if image.intrinsics is None else image.intrinsics.tolist(),
                    "pose": None if image.pose is None else image.pose.tolist(),
                }
                for name, image in observation.cameras.items()
            },
        }
        temporary = self._seen.with_suffix(".part")
        temporary.write_text(json.dumps(seen))
        temporary.replace(self._seen)
        actions = self.config.contract.actions
        rows = np.zeros((actions.horizon, actions.size), np.float32)
        rows[:, actions.motion_columns[0]] = 0.01
        rows[:, list(actions.gripper_columns)] = 0.5
        return PolicyOutput(rows)


PolicyRuntime.load = lambda folder, *_: ContractRuntime(Path(folder))
raise SystemExit(policy_node.main())

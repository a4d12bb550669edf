"""``python -m vla_nodes COMMAND``: everything the suite does without ROS. Each command has its own ``--help``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {  # name: (module with main(argv) -> int, what it does)
    "replay": ("vla_nodes.replay.command", "a recording through the live pipeline without ROS: report, golden test"),
    "eval": ("vla_nodes.train.evaluate", "closed-loop success of a checkpoint in the simulator"),
    "bench": ("vla_nodes.policy.bench", "ms per tick and memory, SSM against its transformer twin"),
    "engine": ("vla_nodes.train.engine", "a checkpoint's fast CPU graphs: exported, proven, calibrated for 8 bits"),
    "control-bench": ("vla_nodes.train.control_bench", "what the chunk executor costs, and how it moves next to peers"),
    "seams": ("vla_nodes.control.report", "how a recorded run joined its chunks, in numbers and as a PNG"),
    "record": ("vla_nodes.nodes.record", "record the running graph into rosbag2 folders; repair a damaged one"),
    "dataset": ("vla_nodes.replay.dataset", "recordings to training data; LeRobot folders in and out; what is in them"),
    "collect": ("vla_nodes.train.collect", "demonstrations by the scripted expert"),
    "distill": ("vla_nodes.train.distill", "the instruction encoder, from a sentence model"),
    "ground": ("vla_nodes.train.ground", "training stage 1: language meets vision"),
    "act": ("vla_nodes.train.act", "training stage 2: action chunks"),
    "export": ("vla_nodes.train.export", "a checkpoint folder from training weights"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n\ncommands:\n" + "\n".join(f"  {name:13} {text}" for name, (_, text) in COMMANDS.items()))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"vla_nodes: no command {argv[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())

"""``python -m vla_nodes COMMAND``: everything the suite does without ROS. Each command has its own ``--help``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {  # name: (module with main(argv) -> int, what it does)
    "replay": ("vla_nodes.replay.cli", "a recording through the live pipeline without ROS: report, golden test"),
    "dataset": ("vla_nodes.datasets.cli", "recordings to training data; LeRobot folders in and out; what is in them"),
    "eval": ("vla_nodes.evaluation.evaluate", "closed-loop success of a checkpoint in the simulator"),
    "bench": ("vla_nodes.benchmarks.policy_latency", "ms per tick and memory, SSM against its transformer twin"),
    "engine": (
        "vla_nodes.evaluation.export_engine",
        "a checkpoint's fast CPU graphs: exported, calibrated for 8 bits",
    ),
    "control-bench": (
        "vla_nodes.benchmarks.executor_compare",
        "what the chunk executor costs, next to peers",
    ),
    "seams": ("vla_nodes.control.seam_report", "how a recorded run joined its chunks, in numbers and as a PNG"),
    "record": ("vla_nodes.nodes.record", "record the running graph into rosbag2 folders; repair a damaged one"),
    "collect": ("vla_nodes.evaluation.collect", "demonstrations by the scripted expert"),
    "collect-static-scenes": (
        "vla_nodes.evaluation.collect_static_scenes",
        "labelled pictures of static scenes, for training stage 1",
    ),
    "distill": ("vla_nodes.training.language.distill", "the instruction encoder, from a sentence model"),
    "train": ("vla_nodes.training.cli", "training: either stage, the whole recipe, or fine-tuning on your own data"),
    "ablations": ("vla_nodes.benchmarks.ablations", "what each part of the design is good for, as a table"),
    "export": ("vla_nodes.training.export", "a checkpoint folder from training weights"),
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

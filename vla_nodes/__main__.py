"""``python -m vla_nodes COMMAND``, and the command ``vla_nodes``: all commands, imported when they are called."""

from __future__ import annotations

import sys

from vla_nodes import cli

SECTIONS = {  # heading: {name: (module with command, what it does)}
    "Recordings": {
        "record": ("vla_nodes.nodes.record", "record the running graph into rosbag2 folders; repair a damaged one"),
        "replay": ("vla_nodes.replay.cli", "a recording through the live pipeline without ROS: report, golden test"),
        "seams": ("vla_nodes.control.seam_report", "how a recorded run joined its chunks, in numbers and as a picture"),
    },
    "Data": {
        "dataset": ("vla_nodes.datasets.cli", "recordings to training data; LeRobot folders in and out; what is in it"),
        "collect": ("vla_nodes.evaluation.collect", "demonstrations by the expert of an environment"),
        "collect-static-scenes": (
            "vla_nodes.evaluation.collect_static_scenes",
            "labelled pictures of static scenes, for training stage 1",
        ),
    },
    "Training": {
        "train": ("vla_nodes.training.cli", "either stage, the whole recipe, or fine-tuning on data of your own"),
        "ablations": ("vla_nodes.benchmarks.ablations", "what each part of the design is good for, as a table"),
        "export": ("vla_nodes.training.export", "a checkpoint folder from training weights"),
        "distill": ("vla_nodes.training.language.distill", "the instruction encoder, from a sentence model"),
    },
    "Measuring": {
        "eval": ("vla_nodes.evaluation.evaluate", "closed-loop success of a checkpoint in the simulator"),
        "bench": ("vla_nodes.benchmarks.policy_latency", "ms per tick and memory, SSM against its transformer twin"),
        "control-bench": ("vla_nodes.benchmarks.executor_compare", "what the chunk executor costs, next to peers"),
        "engine": ("vla_nodes.evaluation.export_engine", "a checkpoint's fast CPU graphs: exported, calibrated, timed"),
    },
}
COMMANDS = tuple(name for named in SECTIONS.values() for name in named)

command = cli.LazyGroup(
    "",
    """
    A robot arm obeys a sentence: everything of the suite that is no ROS node.

    Exit status: 0 done; 1 it ran, and the answer is no; 2 wrong usage, bad input or something that is not installed;
    130 Ctrl-C; otherwise 128 + the number of a signal. What went wrong is one line on stderr.
    """,
    SECTIONS,
    examples="""
    python -m vla_nodes eval --help
    python -m vla_nodes replay recordings/2026-01-31
    eval "$(vla_nodes --show-completion bash)"
    """,
)


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    sys.exit(main())

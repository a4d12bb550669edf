"""Record the running graph, mark episodes, repair a damaged recording.

Recording needs ROS 2 (rclpy); rosbag2 is not needed. The folders are rosbag2's own, read by `ros2 bag` and Foxglove.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from vla_nodes import cli
from vla_nodes.rosbag.mcap_records import COMPRESSIONS

MARKS = ("start", "stop", "success", "failure", "discard")
PATIENCE = 5.0
"""s that a recorder may take to be found and to answer."""


def record(args: cli.Options) -> int:
    """The command."""
    if args.repair is not None:
        return _repair(args.repair, args.out)
    _need_ros()
    return _record(args)


def mark(args: cli.Options) -> None:
    """record mark: the running recorder ends and marks its episode."""
    _need_ros()
    _mark(args.outcome, args.namespace)


def _need_ros() -> None:
    try:
        import rclpy  # noqa: F401

        import vla_nodes.msg  # noqa: F401
    except ImportError as error:
        remedy = "source a workspace, or tools/setup, . .build/env.sh"
        raise cli.CommandError(f"needs ROS 2 and the built package ({error}): {remedy}") from None


def _repair(bag: Path, out: Path | None) -> int:
    from vla_nodes.rosbag.repair import repair

    _, _, lines = repair(bag, out)
    print("\n".join(lines))
    return cli.ExitStatus.DONE


def _record(options: cli.Options) -> int:
    """Run recorder_node here, active from the start."""
    from vla_nodes.nodes.base import run
    from vla_nodes.nodes.recorder_node import RecorderNode

    values = {
        "autostart": "true",
        "out": _quoted(str(options.out or "recordings")),
        "record_at_start": str(not options.wait).lower(),
        "duration": str(float(options.duration)),
        "end_with_recording": "true",
        "compression": options.compression,
        "use_sim_time": str(options.sim_time).lower(),
    }
    for name in ("topics", "extra_topics"):
        if given := getattr(options, name):
            values[name] = "[" + ", ".join(map(_quoted, given)) + "]"
    arguments = ["--ros-args", *(word for item in values.items() for word in ("-p", ":=".join(item)))]
    if options.namespace:
        arguments += ["-r", f"__ns:=/{options.namespace.strip('/')}"]
    return run(RecorderNode, arguments, once=True)


def _quoted(text: str) -> str:
    """A string in YAML, as which ROS reads parameter values: a folder named 2024 is no number."""
    return "'" + text.replace("'", "''") + "'"


def _mark(what: str, namespace: str) -> None:
    import rclpy
    from std_srvs.srv import Trigger

    name = f"{'/' + namespace.strip('/') if namespace else ''}/vla/record/{what}"
    rclpy.init()
    node = rclpy.create_node("record_mark")
    try:
        client = node.create_client(Trigger, name)
        if not client.wait_for_service(PATIENCE):
            raise cli.CommandError(
                f"no recorder answers at {name}: is `{cli.PROGRAM} record` running?", cli.ExitStatus.FAILED
            )
        future = client.call_async(Trigger.Request())
        end = time.monotonic() + PATIENCE
        while not future.done() and time.monotonic() < end:
            rclpy.spin_once(node, timeout_sec=0.1)
        if not future.done():
            raise cli.CommandError(f"{name} did not answer within {PATIENCE:.0f} s", cli.ExitStatus.FAILED)
        answer = future.result()
        if not answer.success:
            raise cli.CommandError(answer.message, cli.ExitStatus.FAILED)
        print(answer.message)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


def _namespace() -> cli.Option:
    return cli.option("--namespace", metavar="NAME", default="", help="namespace of the nodes")


command = cli.Group(
    "record",
    """
    Record the running graph until Ctrl-C, one rosbag2 folder (MCAP) per episode; or repair a damaged recording.

    Recording needs ROS 2 (rclpy), but not rosbag2. Repairing needs neither; the recording is only read.
    """,
    [
        cli.Command(
            "mark",
            """
            The running recorder ends and marks its episode; start begins one, stop ends one unmarked, discard sets it
            aside.
            """,
            mark,
            cli.argument("OUTCOME", ", ".join(MARKS), type=click.Choice(MARKS)),
            _namespace(),
            examples="""
            python -m vla_nodes record mark success
            """,
        )
    ],
    cli.out("folder of the episodes (recordings); with --repair the new bag (its name and _repaired)"),
    cli.option("--topics", multiple=True, metavar="TOPIC", help="record this, not what a replay needs (repeatable)"),
    cli.option("--extra-topics", multiple=True, metavar="TOPIC", help="record this besides (repeatable)"),
    cli.flag("--wait", "begin with `record mark start`, not at once"),
    cli.number("--duration", "end after so long [s]; 0 is Ctrl-C", 0.0, most=1e6),
    cli.option("--compression", type=click.Choice(COMPRESSIONS), default="zstd", help="of the file's chunks"),
    cli.flag("--sim-time", "stamp with /clock, as nodes with use_sim_time"),
    _namespace(),
    cli.option("--repair", type=cli.PATH, metavar="BAG", help="recover a bag folder or .mcap file"),
    examples="""
    python -m vla_nodes record --out recordings
    python -m vla_nodes record --repair recordings/2026-01-31
    """,
    run=record,
    errors=(ValueError, OSError),
)


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

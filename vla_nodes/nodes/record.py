"""python -m vla_nodes record: record the running graph, mark episodes, repair a damaged recording.

    python -m vla_nodes record --out recordings            until Ctrl-C
    python -m vla_nodes record mark success                the running recorder ends and marks its episode
    python -m vla_nodes record --repair recordings/X       into recordings/X_repaired; needs no ROS

Recording needs ROS 2 (rclpy); rosbag2 is not needed. The folders are rosbag2's own, read by `ros2 bag` and Foxglove.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from vla_nodes.rosbag.mcap_records import COMPRESSIONS

MARKS = ("start", "stop", "success", "failure", "discard")
PATIENCE = 5.0
"""s that a recorder may take to be found and to answer."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 not done (one line says why), 2 wrong arguments."""
    options = _arguments(argv)
    if options.repair is not None:
        return _repair(options.repair, options.out)
    try:
        import rclpy  # noqa: F401

        import vla_nodes.msg  # noqa: F401
    except ImportError as error:
        print(
            f"record: needs ROS 2 and the built package ({error}): source a workspace, or tools/setup, . .build/env.sh",
            file=sys.stderr,
        )
        return 1
    return _mark(options.what, options.namespace) if options.action == "mark" else _record(options)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vla_nodes record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=["mark"], help="mark: tell a running recorder about its episode")
    parser.add_argument("what", nargs="?", choices=MARKS, help="of mark")
    parser.add_argument(
        "--out", type=Path, help="folder of the episodes (default recordings); with --repair the new bag"
    )
    parser.add_argument(
        "--repair", type=Path, metavar="BAG", help="recover a bag folder or .mcap file; it is only read"
    )
    parser.add_argument("--topics", nargs="+", metavar="TOPIC", help="record these instead of what a replay needs")
    parser.add_argument("--extra-topics", nargs="+", metavar="TOPIC", help="record these besides")
    parser.add_argument("--wait", action="store_true", help="begin with `record mark start`, not at once")
    parser.add_argument("--duration", type=float, default=0.0, metavar="S", help="end after S seconds")
    parser.add_argument("--compression", choices=COMPRESSIONS, default="zstd", help="of the chunks (default zstd)")
    parser.add_argument("--sim-time", action="store_true", help="stamp with /clock, as nodes with use_sim_time")
    parser.add_argument("--namespace", default="", help="namespace of the nodes")
    options = parser.parse_args(argv)
    if (options.action == "mark") != (options.what is not None):
        parser.error(f"mark needs one of {', '.join(MARKS)}")
    if not 0 <= options.duration <= 1e6:
        parser.error(f"--duration {options.duration}: must be 0 .. 1e6 s")
    return options


def _repair(bag: Path, out: Path | None) -> int:
    from vla_nodes.rosbag.repair import RepairError, repair

    try:
        _, _, lines = repair(bag, out)
    except (RepairError, OSError) as error:
        print(f"record --repair: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def _record(options: argparse.Namespace) -> int:
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


def _mark(what: str, namespace: str) -> int:
    import rclpy
    from std_srvs.srv import Trigger

    name = f"{'/' + namespace.strip('/') if namespace else ''}/vla/record/{what}"
    rclpy.init()
    node = rclpy.create_node("record_mark")
    try:
        client = node.create_client(Trigger, name)
        if not client.wait_for_service(PATIENCE):
            print(
                f"record mark: no recorder answers at {name}: is `python -m vla_nodes record` running?", file=sys.stderr
            )
            return 1
        future = client.call_async(Trigger.Request())
        end = time.monotonic() + PATIENCE
        while not future.done() and time.monotonic() < end:
            rclpy.spin_once(node, timeout_sec=0.1)
        if not future.done():
            print(f"record mark: {name} did not answer within {PATIENCE:.0f} s", file=sys.stderr)
            return 1
        answer = future.result()
        print(answer.message, file=sys.stdout if answer.success else sys.stderr)
        return 0 if answer.success else 1
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    raise SystemExit(main())

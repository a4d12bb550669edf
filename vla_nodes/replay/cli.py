"""Replay a recording through the live pipeline, without ROS: a report, a picture, and a bag with the results.

    python -m vla_nodes replay recording/                      the package's policy, the recorded instruction
    python -m vla_nodes replay recording/ --checkpoint new/ --instruction "pick up the red block"
    python -m vla_nodes replay recording/ --golden good.json   a test: exits 1 with the first difference
    python -m vla_nodes replay recording/ --compare new/       two policies side by side

Same recording, checkpoint and settings: the same bytes in report/, but for timings.json.
Exits 0; 1 where a golden file differs, the recording ends in damage or no step could be taken; 2 where there is
nothing to replay.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import sys
import time
from pathlib import Path

from vla_nodes.replay import golden as goldens
from vla_nodes.replay.parameter_files import ParameterError, load
from vla_nodes.replay.progress import Progress
from vla_nodes.replay.session import LATENCY, ReplayError, Session
from vla_nodes.rosbag.read import BagError, open_bag
from vla_nodes.rosbag.timeline import KINDS


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m vla_nodes replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("bag", type=Path, help="rosbag2 folder, or one .mcap or .db3 file")
    add("--checkpoint", type=Path, help="checkpoint folder (default: the package's own)")
    add("--instruction", default="", help="put in force at the start, in place of the recorded ones")
    add("--out", type=Path, default=Path("report"), help="folder for report.json, timeline.png, bag/ (default: report)")
    add("--engine", help="torch, openvino, onnxruntime, or auto: the first of openvino, onnxruntime and torch that is "
        "installed and runs the policy; for --golden the one that wrote the file, and to write one torch")  # fmt: skip
    add("--latency", type=float, default=LATENCY, help=f"s of bag time a policy step takes (default: {LATENCY})")
    add("--clock", choices=KINDS, default="auto", help="what bag time is; see vla_nodes/rosbag/timeline.py")
    add("--remap", action="append", default=[], metavar="TOPIC:=BAG_TOPIC", help="the bag's name for a node's topic")
    add("--namespace", default="", help="namespace that the nodes' topics were recorded in")
    add("--camera-pose", type=float, nargs=7, metavar=("X", "Y", "Z", "QX", "QY", "QZ", "QW"),
        help="colour optical frame in base, for a bag without camera/pose")  # fmt: skip
    add("--params", type=Path, help="parameter file of the live nodes (default: config/panda/params.yaml)")
    add("--set", action="append", default=[], metavar="NODE.PARAMETER=VALUE", help="one parameter, such as "
        "policy_node.use_depth=false")  # fmt: skip
    add("--images", action="store_true", help="copy the recorded images into the results' bag too")
    add("--golden", type=Path, help="compare with this file, or write it with --update")
    add("--update", action="store_true", help="write the golden file")
    add("--tolerance", type=float, help="rad allowed by --golden (default: 0 on the machine that wrote it, else "
        f"{goldens.TOLERANCE:g})")  # fmt: skip
    add("--compare", type=Path, metavar="CHECKPOINT", help="a second checkpoint, side by side with the first")
    add("--loop", type=int, default=1, metavar="N", help="replay N times; each pass must give the same bytes")
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (BagError, ReplayError, ParameterError, goldens.GoldenError) as error:
        print(f"replay: {error}", file=sys.stderr)
    except ValueError as error:  # a parameter out of range, a joint_map or camera_pose that is none
        print(f"replay: {error}", file=sys.stderr)
    except OSError as error:
        print(f"replay: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("replay: interrupted", file=sys.stderr)
        return 130
    return 2


def run(args: argparse.Namespace) -> int:
    """As `main`, errors raised."""
    began = time.perf_counter()
    if not 0.0 <= args.latency <= 10.0:
        raise ReplayError(f"--latency {args.latency}: 0 to 10 s")
    if args.update and args.golden is None:
        raise ReplayError("--update needs --golden FILE")
    parameters = load(args.params, args.set)
    policy = parameters["policy_node"]
    policy["engine"] = args.engine or policy["engine"]
    if args.camera_pose is not None:
        policy["camera_pose_source"], policy["camera_pose"] = "parameter", list(args.camera_pose)
    expected = goldens.read(args.golden) if args.golden and not args.update else None
    if args.golden and policy["engine"] == "auto":
        policy["engine"] = "torch" if expected is None else str(expected["settings"].get("engine", "torch")).split()[0]
    with open_bag(args.bag) as bag:
        session = Session(
            bag, parameters, args.checkpoint, args.instruction, args.latency, args.clock, args.remap, args.namespace
        )
        session.began = began
        if args.compare:
            from vla_nodes.replay.compare import compare

            return compare(session, args.compare, args.out, args.images)
        sink = goldens.GoldenSink() if args.golden or args.loop > 1 else None
        ended = passes(session, args.out, args.loop, args.images, sink)
        if args.golden:
            names = [*session.robot.joint_names, session.robot.gripper.joint]
            now = goldens.collect(sink, session.settings(), session.checkpoint, session.urdf, names)
            if args.update:
                goldens.write(args.golden, now)
                print(f"golden: written to {args.golden}")
            elif found := goldens.differences(expected, now, args.tolerance):
                print("\n".join(f"golden: {line}" for line in found))
                return 1
            else:
                print(f"golden: equal to {args.golden}")
    if ended:
        print(f"replay: {ended}", file=sys.stderr)
    return 1 if ended else 0


def passes(session: Session, out: Path, loop: int, images: bool, sink: goldens.GoldenSink | None) -> str:
    """Replay, report, and replay again as often as asked; returns "" or why it is not whole."""
    from vla_nodes.replay.write_results import one_pass

    ended = one_pass(session, out, images, [sink] if sink else [], Progress(session.bag.start, session.bag.end))
    first, before = digest(sink) if loop > 1 else "", memory()
    for number in range(2, loop + 1):
        again = goldens.GoldenSink()
        progress = Progress(session.bag.start, session.bag.end, f"pass {number} of {loop} ")
        _, _, wall = session.replay([again], progress=progress)
        progress.close()
        gc.collect()  # a pass that is over hangs in cycles, with the last images that it saw
        print(f"pass {number} of {loop}: {wall:.1f} s, {memory()} MiB, {before} MiB after the first", flush=True)
        if digest(again) != first:
            raise ReplayError(f"pass {number} gave other results than the first: this is a bug, please report it")
    return ended


def memory() -> int:
    """MiB that this process has in memory now (Linux)."""
    from vla_nodes.benchmarks.executor_cost import resident_kb

    return resident_kb() >> 10


def digest(sink: goldens.GoldenSink) -> str:
    """Checksum of all that went in and came out."""
    h = hashlib.sha256()
    for value in (sink.inputs, sink.steps, sink.holds, sink.times):
        h.update(repr(value).encode())
    for arrays in (sink.actions, sink.joints):
        for array in arrays:
            h.update(array.tobytes())
    return h.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())

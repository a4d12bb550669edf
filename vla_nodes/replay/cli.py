"""Replay a recording through the live pipeline, without ROS: a report, a picture, and a bag with the results."""

from __future__ import annotations

import gc
import hashlib
import time
from pathlib import Path

import click

from vla_nodes import cli
from vla_nodes.memory import resident_kb
from vla_nodes.policy.inference import engine as engines
from vla_nodes.replay import golden as goldens
from vla_nodes.replay.bag_progress import Progress
from vla_nodes.replay.parameter_files import load
from vla_nodes.replay.session import LATENCY, ReplayError, Session
from vla_nodes.rosbag.read import open_bag
from vla_nodes.rosbag.timeline import KINDS


def run(args: cli.Options) -> int:
    """The command."""
    began = time.perf_counter()
    if args.update and args.golden is None:
        raise click.UsageError("--update needs --golden FILE")
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
            names = [*session.robot.joint_names, *(gripper.joint for gripper in session.robot.grippers)]
            assert sink is not None and session.checkpoint is not None
            now = goldens.collect(sink, session.settings(), session.checkpoint, session.description.urdf, names)
            if args.update:
                goldens.write(args.golden, now)
                print(f"golden: written to {args.golden}")
            elif found := goldens.differences(expected or {}, now, args.tolerance):
                print("\n".join(f"golden: {line}" for line in found))
                return cli.ExitStatus.FAILED
            else:
                print(f"golden: equal to {args.golden}")
    if ended:
        raise cli.CommandError(ended, cli.ExitStatus.FAILED)
    return cli.ExitStatus.DONE


def passes(session: Session, out: Path, loop: int, images: bool, sink: goldens.GoldenSink | None) -> str:
    """Replay, report, and replay again as often as asked; returns "" or why it is not whole."""
    from vla_nodes.replay.write_results import one_pass

    ended = one_pass(session, out, images, [sink] if sink else [], Progress(session.bag.start, session.bag.end))
    first, before = digest(sink) if sink and loop > 1 else "", resident_kb() >> 10
    for number in range(2, loop + 1):
        again = goldens.GoldenSink()
        progress = Progress(session.bag.start, session.bag.end, f"pass {number} of {loop}")
        _, _, wall = session.replay([again], progress=progress)
        progress.close()
        gc.collect()  # a finished pass is held by reference cycles, with its last images
        print(
            f"pass {number} of {loop}: {wall:.1f} s, {resident_kb() >> 10} MiB, {before} MiB after the first",
            flush=True,
        )
        if digest(again) != first:
            raise ReplayError(f"pass {number} gave other results than the first: this is a bug, please report it")
    return ended


def digest(sink: goldens.GoldenSink) -> str:
    """Checksum of all that went in and came out."""
    h = hashlib.sha256()
    for value in (sink.inputs, sink.steps, sink.holds, sink.times):
        h.update(repr(value).encode())
    for arrays in (sink.actions, sink.joints):
        for array in arrays:
            h.update(array.tobytes())
    return h.hexdigest()


command = cli.Command(
    "replay",
    """
    Replay a recording through the live pipeline, without ROS: a report, a picture, and a bag with the results.

    Same recording, checkpoint and settings: the same bytes in report/, but for timings.json. The status is 1 where a
    golden file differs, the recording ends in damage or no step could be taken.
    """,
    run,
    cli.argument("BAG", "rosbag2 folder, or one .mcap or .db3 file", type=cli.PATH),
    *cli.section(
        "Policy",
        cli.checkpoint(),
        cli.engine(engines.NAMES, "what computes the policy; without it what the parameter file says; with --golden, "
                   "what wrote the file, and to write one torch", default=None),
        cli.option("--instruction", metavar="TEXT", default="", help="in force from the start, not the recorded ones"),
        cli.number("--latency", "bag time that a policy step takes [s]", LATENCY, most=10.0),
        cli.option("--params", type=cli.PATH, metavar="FILE", show_default="config/panda/params.yaml",
                   help="parameter file of the live nodes"),
        cli.option("--set", multiple=True, metavar="NODE.PARAMETER=VALUE",
                   help="one parameter, such as policy_node.use_depth=false (repeatable)"),
    ),
    *cli.section(
        "Recording",
        cli.option("--clock", type=click.Choice(KINDS), default="auto", help="which stamps are the bag's time"),
        cli.remap(),
        cli.option("--namespace", metavar="NAME", default="", help="namespace that the nodes' topics were recorded in"),
        cli.option("--camera-pose", **cli.POSE, help="colour optical frame in base, for a bag without camera/pose"),
    ),
    *cli.section(
        "Results",
        cli.out("folder for report.json, timeline.png and bag/", default="report"),
        cli.flag("--images", "copy the recorded images into the results' bag too"),
        cli.option("--golden", type=cli.PATH, metavar="FILE", help="compare with this file, or write it with --update"),
        cli.flag("--update", "write the golden file"),
        cli.number("--tolerance", "difference allowed by --golden [rad]; without it 0 on the machine that wrote the "
                   f"file, else {goldens.TOLERANCE:g}"),
        cli.option("--compare", type=cli.CHECKPOINT, metavar="DIR", help="a second checkpoint, beside the first"),
        cli.count("--loop", "replay so many times; each pass must give the same bytes", 1),
    ),
    examples="""
    python -m vla_nodes replay recording/
    python -m vla_nodes replay recording/ --checkpoint work/nano --instruction "pick up the red block"
    python -m vla_nodes replay recording/ --golden good.json
    python -m vla_nodes replay recording/ --compare work/nano
    """,
    errors=(ValueError, OSError),  # BagError and the like; a parameter out of range, a joint_map that is none
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Record the sample bag anew, and its golden replay: after the shipped checkpoint or the topics have changed.

    tools/setup && . .build/env.sh && python tools/sample_bag.py

Runs the real graph in the simulator as ./run does, records it, packs the recording as small as it goes (one zstd window
over many frames: what stands still is stored once), puts it into resource/bags/pick_red_block, and writes the golden
file beside it. Takes about a minute on an idle machine; on a busy one the policy steps are sparser.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from vla_nodes import cli
from vla_nodes.replay import cli as replay
from vla_nodes.rosbag import metadata
from vla_nodes.rosbag.repair import Scan
from vla_nodes.rosbag.write import BagWriter

ROOT = Path(__file__).resolve().parent.parent
BAG = ROOT / "resource/bags/pick_red_block"
GOLDEN = ROOT / "resource/bags/pick_red_block.golden.json"
INSTRUCTION = "pick up the red block"
LIMIT = 5_000_000
"""bytes that the sample may take in the repository."""
LEVEL = 12
CHUNK = 64 << 20
IMAGES = ("/camera/color/image_raw", "/camera/aligned_depth_to_color/image_raw")


def _stamp(item) -> bytes:
    """The header's stamp of a message, as CDR has it behind its four bytes of encapsulation."""
    return bytes(item.message.data[4:12])


def pack(source: Path, folder: Path, seconds: float) -> None:
    """The first `seconds` of a recording's one file, compressed as well as zstd can.

    A recording begins and ends amid a pair of images: what has no partner is left out.
    """
    (file,) = source.glob("*.mcap")
    custom = {k: v for k, v in metadata.read(source)["custom_data"].items() if k != "recorder"}
    scan = Scan(file)
    kept = [item for item in scan if item.message.log_time <= scan.found.start + seconds * 1e9]
    paired = set.intersection(*({_stamp(item) for item in kept if item.topic.name == name} for name in IMAGES))
    with BagWriter(folder, level=LEVEL, chunk_bytes=CHUNK, background=False, custom=custom, min_free=0) as bag:
        for item in kept:
            if item.topic.name not in IMAGES or _stamp(item) in paired:
                bag.add_topic(item.topic)
                bag.write(item.topic.name, item.message.log_time, item.message.data, item.message.publish_time)
        for name, values in scan.metadata:
            if name != "rosbag2":  # the writer's own
                bag.add_metadata(name, values)


def record(options: cli.Options) -> int:
    """The command."""
    if not options.golden_only:
        with tempfile.TemporaryDirectory() as place:
            run = [sys.executable, "-m", "vla_nodes.demo.cli", "--no-video", "--seed", str(options.seed)]
            run += ["--record", f"{place}/bags", "--out", f"{place}/out", INSTRUCTION]
            if subprocess.run(run, cwd=ROOT).returncode != 0:
                raise cli.CommandError("the run did not succeed: try another --seed", cli.ExitStatus.FAILED)
            (recorded,) = Path(place, "bags").iterdir()
            shutil.rmtree(BAG, ignore_errors=True)
            pack(recorded, BAG, options.duration)
        size = sum(f.stat().st_size for f in BAG.iterdir())
        print(f"{BAG.relative_to(ROOT)}: {size / 1e6:.2f} MB")
        if size > LIMIT:
            raise cli.CommandError(f"larger than {LIMIT / 1e6:.0f} MB: lower --duration", cli.ExitStatus.FAILED)
    with tempfile.TemporaryDirectory() as report:
        return replay.main([str(BAG), "--golden", str(GOLDEN), "--update", "--out", report])


command = cli.Command(
    "sample_bag",
    """
    Record the sample bag anew, and its golden replay: after the shipped checkpoint or the topics have changed.
    """,
    record,
    cli.seed("scene of the simulator", 3),
    cli.number("--duration", "longest recording kept [s]", 8.0),
    cli.flag("--golden-only", "keep the bag, replay it and write the golden file"),
    examples="""
    python tools/sample_bag.py --golden-only
    """,
    program="python tools/sample_bag.py",
)


if __name__ == "__main__":
    sys.exit(cli.main(command))

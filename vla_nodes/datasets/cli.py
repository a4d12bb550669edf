"""Recordings to training data, and between our episodes and LeRobot's folders.

python -m vla_nodes dataset build BAGS... --out DIR [--lerobot FOLDER]   recordings to episodes
python -m vla_nodes dataset export DIR --out FOLDER                      episodes to a LeRobotDataset v3.0 folder
python -m vla_nodes dataset import FOLDER --out DIR                      the reverse
python -m vla_nodes dataset inspect DIR_OR_BAG                           what is in it, in numbers and as a picture
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from vla_nodes.datasets import episode
from vla_nodes.datasets.episode import DataError
from vla_nodes.rosbag.read import BagError, open_bag
from vla_nodes.share import share_path

if TYPE_CHECKING:  # torch and pinocchio take seconds to import: only where a command needs them
    from vla_nodes.control.robot import RobotModel
    from vla_nodes.datasets.from_rosbag import BagResult
    from vla_nodes.policy.checkpoint import CheckpointConfig

POSE = ("X", "Y", "Z", "QX", "QY", "QZ", "QW")
CHECKPOINT = "resource/checkpoints/nano"


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        return args.run(args)
    except (OSError, ValueError) as error:  # BagError, DataError, CheckpointError, RobotError and the like: one line
        print(f"vla_nodes dataset: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m vla_nodes dataset", description=__doc__, formatter_class=shape)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str, fits: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if fits:
            text = "whose tick, horizon, image size and joints the data is for (default: the shipped one)"
            sub.add_argument("--checkpoint", type=Path, help=text)
            sub.add_argument("--urdf", default="config/panda/panda.urdf", help="default %(default)s")
        return sub

    sub = command("build", _build, "recordings to episodes, one for each instruction")
    sub.add_argument("bags", nargs="+", type=Path, metavar="BAG", help="rosbag2 folders or files, or folders of them")
    sub.add_argument("--out", type=Path, required=True, help="folder for the episodes")
    sub.add_argument("--append", action="store_true", help="go on numbering after the episodes that --out has")
    sub.add_argument("--lerobot", type=Path, metavar="FOLDER", help="also write a LeRobotDataset v3.0 folder")
    sub.add_argument("--only-success", action="store_true", help="leave out what was not marked a success")
    sub.add_argument("--instruction", default="", help="in force throughout, instead of what the bag says")
    sub.add_argument(
        "--motion",
        choices=("measured", "commanded"),
        default="measured",
        help="actions lead where the arm went, or where its controller was told to go (default measured)",
    )
    text = "colour optical frame in base, instead of the bag's camera/pose"
    sub.add_argument("--camera-pose", nargs=7, type=float, metavar=POSE, help=text)
    sub.add_argument("--no-depth", action="store_true", help="do not wait for depth images, nor use them")
    sub.add_argument("--slop", type=float, default=0.02, help="s, largest difference of colour and depth stamps")
    sub.add_argument("--clock", choices=("auto", "received", "topic", "header"), default="auto")
    sub.add_argument("--remap", action="append", default=[], metavar="TOPIC:=BAG_TOPIC")
    sub.add_argument("--namespace", default="", help="of the recorded nodes")
    sub.add_argument("--joint-map", action="append", default=[], metavar="OURS:THEIRS")

    sub = command("export", _export, "episodes to a LeRobotDataset v3.0 folder")
    sub.add_argument("data", type=Path, help="folder of episodes")
    sub.add_argument("--out", type=Path, required=True, help="folder to make")

    sub = command("import", _import, "a LeRobotDataset v3.0 folder to episodes")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--out", type=Path, required=True, help="folder for the episodes")
    sub.add_argument("--append", action="store_true", help="go on numbering after the episodes that --out has")
    sub.add_argument("--camera", default="", help="feature of the colour images (default: the only one)")
    sub.add_argument("--depth", default="", help="feature of the depth images, or none")
    sub.add_argument("--state", default="observation.state", help="feature with the joints (default %(default)s)")
    sub.add_argument("--joint", action="append", default=[], metavar="OURS:THEIRS", help="our joint, its name there")
    sub.add_argument("--gripper", default="gripper", help="its name in the state (default %(default)s)")
    sub.add_argument("--gripper-closed", type=float, default=0.0, help="its value when closed (default 0)")
    sub.add_argument("--gripper-open", type=float, default=1.0, help="and when open (default 1)")
    sub.add_argument("--degrees", action="store_true", help="joint angles are in degrees")
    sub.add_argument(
        "--intrinsics", nargs=4, type=float, metavar=("FX", "FY", "CX", "CY"), help="of the images, pixels"
    )
    sub.add_argument("--camera-pose", nargs=7, type=float, metavar=POSE, help="colour optical frame in base")

    sub = command("inspect", _inspect, "what is in episodes, a LeRobot folder or a recording", fits=False)
    sub.add_argument("path", type=Path)
    sub.add_argument("--sheet", type=Path, help="contact sheet to write (default: PATH's name + _sheet.png, here)")
    sub.add_argument("--remap", action="append", default=[], metavar="TOPIC:=BAG_TOPIC")
    return parser.parse_args(argv)


def _fit(args: argparse.Namespace) -> tuple[CheckpointConfig, RobotModel]:
    """What the data is for."""
    from vla_nodes.control.robot import RobotModel
    from vla_nodes.policy.checkpoint import read_config

    config = read_config(args.checkpoint or share_path(CHECKPOINT))
    if config.action_space != "ee_delta":
        raise DataError(f"the checkpoint acts in {config.action_space}: data is made for ee_delta")
    urdf = Path(args.urdf)
    robot = RobotModel(urdf if urdf.is_file() else share_path(args.urdf), config.tool_frame)
    if robot.joint_names != config.joint_names:
        raise DataError(f"the URDF's arm is {', '.join(robot.joint_names)}, the checkpoint's {config.joint_names}")
    if robot.gripper is None or robot.gripper.joint != config.gripper_joint:
        raise DataError(f"the robot's limits file names no gripper joint {config.gripper_joint}")
    return config, robot


class _Folder:
    """Numbers episodes in a folder. By its number an episode is drawn for measuring (every 12th) or for learning."""

    def __init__(self, folder: Path, append: bool) -> None:
        numbers = [int(path.stem) for path in folder.glob("*.safetensors") if path.stem.isdigit()]
        if numbers and not append:
            raise DataError(f"{folder}: holds {len(numbers)} episodes already: choose another folder, or --append")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.next, self.written = folder, max(numbers, default=0) + 1, []

    def write(self, writer: episode.EpisodeWriter, header: dict) -> None:
        path = self.folder / f"{self.next:07d}.safetensors"
        writer.write(path, header)
        self.next += 1
        self.written.append(path)


def _recordings(given: list[Path]) -> list[Path]:
    """Bags as they are; a folder of bags stands for those in it, except the discarded."""
    found = []
    for path in given:
        inside = sorted({p.parent for kind in ("metadata.yaml", "*.mcap", "*.db3") for p in path.glob(f"*/{kind}")})
        itself = any(any(path.glob(kind)) for kind in ("metadata.yaml", "*.mcap", "*.db3"))
        found += inside if inside and not itself else [path]
    return found


def _build(args: argparse.Namespace) -> int:
    from vla_nodes.datasets.from_rosbag import BagResult, BuildSettings, build, pose_argument
    from vla_nodes.messages.joints import JointStatesError

    config, robot = _fit(args)
    pose = None if args.camera_pose is None else pose_argument(args.camera_pose)
    settings = BuildSettings(
        args.instruction, pose, args.motion == "commanded", tuple(args.remap), args.namespace, args.clock, args.slop,
        not args.no_depth, tuple(args.joint_map), config.base_frame)  # fmt: skip
    folder = _Folder(args.out, args.append)
    bags, results, left_out = _recordings(args.bags), [], Counter()
    with tqdm(
        total=len(bags),
        unit="bag",
        disable=None,
        mininterval=0.5,
        bar_format="{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}]",
    ) as bar:
        for number, path in enumerate(bags):
            result = BagResult(path)
            try:
                with open_bag(path) as bag:
                    outcome = bag.custom.get("outcome", "unmarked")
                    if outcome == "discarded" or (args.only_success and outcome != "success"):
                        left_out[outcome] += 1
                        continue

                    def progress(share: float, number=number) -> None:
                        if number + share - bar.n > 0.01:
                            bar.update(number + share - bar.n)

                    result = build(bag, config, robot, settings, folder.write, progress)
            except (BagError, JointStatesError) as error:
                result.error = str(error)
            results.append(result)
            bar.update(number + 1 - bar.n)
    _report(results, left_out)
    count = len(folder.written)
    ticks = sum(result.ticks for result in results)
    print(f"{count} episodes, {ticks} observations ({ticks * config.tick:.1f} s) in {args.out}")
    if not count:
        raise DataError("no episode came of it")
    if args.lerobot:
        _to_lerobot(folder.written, args.lerobot, config, robot)
    return 1 if any(result.error for result in results) else 0


def _report(results: list[BagResult], left_out: Counter[str]) -> None:
    for result in results:
        print(f"{result.path}: {result.outcome}, {result.seconds:.1f} s: {result.episodes} episodes, "
              f"{result.ticks} observations")  # fmt: skip
        for reason, count in sorted(result.dropped.items()):
            print(f"  dropped {count:6d}  {reason}")
        for note in result.notes:
            print(f"  note    {note}")
        if result.error:
            print(f"  error   {result.error}")
    for outcome, count in left_out.items():
        print(f"left out {count} recordings marked {outcome}" if outcome != "unmarked" else
              f"left out {count} recordings that were not marked")  # fmt: skip


def _to_lerobot(paths: list[Path], folder: Path, config: CheckpointConfig, robot: RobotModel) -> None:
    from vla_nodes.datasets.lerobot_convert import export

    writer = export(paths, folder, config, robot.name, print)
    print(f"{folder}: LeRobotDataset v3.0, {writer.frames} frames at {writer.fps} fps")
    if writer.out_of_range:
        far = writer.coding.far
        print(f"  {writer.out_of_range} depth readings beyond {far:.3f} m were written as no reading")


def _export(args: argparse.Namespace) -> int:
    config, robot = _fit(args)
    _to_lerobot(episode.files(args.data), args.out, config, robot)
    return 0


def _import(args: argparse.Namespace) -> int:
    from vla_nodes.datasets.from_rosbag import pose_argument
    from vla_nodes.datasets.lerobot_convert import Importer, Mapping
    from vla_nodes.datasets.lerobot_read import LeRobotFolder

    config, robot = _fit(args)
    joints = dict(pair.split(":", 1) for pair in args.joint if ":" in pair)
    if len(joints) != len(args.joint) or set(joints) - set(config.joint_names):
        raise DataError(f"--joint is OURS:THEIRS with OURS one of {', '.join(config.joint_names)}")
    if args.gripper_closed == args.gripper_open:
        raise DataError("--gripper-closed and --gripper-open are the same")
    k = None
    if args.intrinsics is not None:
        fx, fy, cx, cy = args.intrinsics
        k = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    pose = None if args.camera_pose is None else pose_argument(args.camera_pose)
    mapping = Mapping(args.camera, args.depth, args.state, joints, args.gripper, args.gripper_closed,
                      args.gripper_open, args.degrees, k, pose)  # fmt: skip
    source = LeRobotFolder(args.folder)
    reader, folder = Importer(source, mapping, config, robot), _Folder(args.out, args.append)
    skipped = 0
    for index in tqdm(range(len(source)), unit="episode", disable=None):
        try:
            writer, header = reader.read(index)
            folder.write(writer, header)
        except DataError as error:
            if index == 0:
                raise  # what is wrong with the first is wrong with all: a flag is missing
            skipped += 1
            tqdm.write(f"skipped: {error}")
    for reason, count in sorted(reader.dropped.items()):
        print(f"  dropped {count:6d}  {reason}")
    if not reader.depth:
        print("  note    the folder has no depth: the policy will see none")
    print(f"{len(folder.written)} episodes in {args.out}, {skipped} skipped")
    return 1 if skipped else 0


def _inspect(args: argparse.Namespace) -> int:
    from vla_nodes.datasets.inspect_dataset import contact_sheet, inspect

    strips = inspect(args.path, print, args.remap)
    sheet = args.sheet or Path(f"{args.path.resolve().name}_sheet.png")
    if strips:
        contact_sheet(strips, sheet)
        print(f"\n{sheet}: contact sheet")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Recordings to training data, and between our episodes and LeRobot's folders: build, export, import, inspect."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from vla_nodes import cli
from vla_nodes.datasets import episode
from vla_nodes.datasets.episode import DataError
from vla_nodes.progress import progress, say
from vla_nodes.rosbag.read import BagError, open_bag
from vla_nodes.rosbag.timeline import KINDS
from vla_nodes.share import SHIPPED_CHECKPOINT, share_path

if TYPE_CHECKING:  # torch and pinocchio take seconds to import: only where a command needs them
    from vla_nodes.control.robot import RobotModel
    from vla_nodes.datasets.from_rosbag import BagResult
    from vla_nodes.policy.checkpoint import CheckpointConfig


def _fit(args: cli.Options) -> tuple[CheckpointConfig, RobotModel]:
    """The checkpoint and the robot that the data is made for."""
    from vla_nodes.pipeline.policy_loop import misfits
    from vla_nodes.pipeline.robot_description import RobotDescription
    from vla_nodes.policy.checkpoint import read_config

    config = read_config(args.checkpoint or share_path(SHIPPED_CHECKPOINT))
    if config.contract.actions.space != "ee_delta":
        raise DataError(f"the checkpoint acts in {config.contract.actions.space}: data is made for ee_delta")
    contract = Path(args.contract)
    description = RobotDescription(contract.resolve() if contract.is_file() else args.contract)
    if table := misfits(config.contract, description):
        raise DataError(f"{description.path}: the checkpoint does not fit this robot:\n{table}")
    return config, description.model()


class _Folder:
    """Numbers the episodes of a folder. Training holds every 12th one out, by this number."""

    def __init__(self, folder: Path, append: bool) -> None:
        numbers = [int(path.stem) for path in folder.glob("*.safetensors") if path.stem.isdigit()]
        if numbers and not append:
            raise DataError(f"{folder}: holds {len(numbers)} episodes already: choose another folder, or --append")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.next = folder, max(numbers, default=0) + 1
        self.written: list[Path] = []

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


def _build(args: cli.Options) -> int:
    from vla_nodes.datasets.from_rosbag import BagResult, BuildSettings, build, pose_argument
    from vla_nodes.messages.joints import JointStatesError

    config, robot = _fit(args)
    pose = None if args.camera_pose is None else pose_argument(args.camera_pose)
    settings = BuildSettings(
        args.instruction, pose, args.motion == "commanded", args.remap, args.namespace, args.clock, args.slop,
        not args.no_depth, args.joint_map)  # fmt: skip
    folder = _Folder(args.out, args.append)
    bags, results = _recordings(args.bags), []
    left_out: Counter[str] = Counter()
    with progress(
        total=len(bags),
        bar="{l_bar}{bar}| {n:.1f}/{total} bags [{elapsed}<{remaining}]",
        line="{n:.1f} of {total} bags, {elapsed} gone, {remaining} to go",
    ) as bar:
        for number, path in enumerate(bags):
            result = BagResult(path)
            try:
                with open_bag(path) as bag:
                    outcome = bag.custom.get("outcome", "unmarked")
                    if outcome == "discarded" or (args.only_success and outcome != "success"):
                        left_out[outcome] += 1
                        continue

                    def moved(share: float, number: int = number) -> None:
                        if number + share - bar.n > 0.01:
                            bar.update(number + share - bar.n)

                    result = build(bag, config, robot, settings, folder.write, moved)
            except (BagError, JointStatesError) as error:
                result.error = str(error)
            results.append(result)
            bar.update(number + 1 - bar.n)
    _report(results, left_out)
    count = len(folder.written)
    ticks = sum(result.ticks for result in results)
    print(f"{count} episodes, {ticks} observations ({ticks * config.contract.tick:.1f} s) in {args.out}")
    if not count:
        errors = [result.error for result in results if result.error]
        raise DataError(f"no episode came of it{f': {errors[0]}' if errors else ''}")
    if args.lerobot:
        _to_lerobot(folder.written, args.lerobot, config, robot)
    return cli.ExitStatus.FAILED if any(result.error for result in results) else cli.ExitStatus.DONE


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

    each = progress(paths, unit="episodes", label="to LeRobot")
    writer = export(each, folder, config, robot.name, say)
    print(f"{folder}: LeRobotDataset v3.0, {writer.frames} frames at {writer.fps} fps")
    if writer.out_of_range:
        far = writer.coding.far
        print(f"  {writer.out_of_range} depth readings beyond {far:.3f} m were written as no reading")


def _export(args: cli.Options) -> int:
    config, robot = _fit(args)
    _to_lerobot(episode.files(args.data), args.out, config, robot)
    return 0


def _import(args: cli.Options) -> int:
    from vla_nodes.datasets.from_rosbag import pose_argument
    from vla_nodes.datasets.lerobot_convert import Importer, Mapping
    from vla_nodes.datasets.lerobot_read import LeRobotFolder

    config, robot = _fit(args)
    joints = dict(pair.split(":", 1) for pair in args.joint_map if ":" in pair)
    if len(joints) != len(args.joint_map) or set(joints) - set(config.contract.robot.joints):
        raise DataError(f"--joint-map is OURS:THEIRS with OURS one of {', '.join(config.contract.robot.joints)}")
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
    for index in progress(range(len(source)), unit="episodes"):
        try:
            writer, header = reader.read(index)
            folder.write(writer, header)
        except DataError as error:
            if index == 0:
                raise  # an error of the first episode is one of all episodes: an option is missing
            skipped += 1
            say(f"skipped: {error}")
    for reason, count in sorted(reader.dropped.items()):
        print(f"  dropped {count:6d}  {reason}")
    if not reader.depth:
        print("  note    the folder has no depth: the policy will see none")
    print(f"{len(folder.written)} episodes in {args.out}, {skipped} skipped")
    return cli.ExitStatus.FAILED if skipped else cli.ExitStatus.DONE


def _inspect(args: cli.Options) -> int:
    from vla_nodes.datasets.inspect_dataset import contact_sheet, inspect

    strips = inspect(args.path, print, args.remap)
    sheet = args.out or Path(f"{args.path.resolve().name}_sheet.png")
    if strips:
        contact_sheet(strips, sheet)
        print(f"\n{sheet}: contact sheet")
    return 0


def _made_for() -> list[cli.Option]:
    return cli.section(
        "What the data is for",
        cli.checkpoint("policy whose tick, horizon, image size and joints the data is for"),
        cli.option("--contract", metavar="FILE", default="config/panda/contract.yaml", help="the robot"),
    )


def _append() -> cli.Option:
    return cli.flag("--append", "go on numbering after the episodes that --out has")


def _joint_map(of: str) -> cli.Option:
    return cli.option("--joint-map", multiple=True, metavar="OURS:THEIRS", help=f"a joint's name {of} (repeatable)")


def _camera_pose() -> cli.Option:
    return cli.option("--camera-pose", **cli.POSE, help="colour optical frame in base, not what the recording says")


ERRORS = (OSError, ValueError)  # BagError, DataError, CheckpointError, RobotError and the like

command = cli.Group(
    "dataset",
    """
    Recordings to training data, and between our episodes and LeRobot's folders.
    """,
    [
        cli.Command(
            "build",
            """
            Recordings to episodes, one for each instruction.

            Recordings marked discarded are left out. The status is 1 where one is damaged; the others are built.
            """,
            _build,
            cli.argument("BAGS...", "rosbag2 folders or files, or folders of them", type=cli.PATH, nargs=-1,
                         required=True),
            cli.out("folder for the episodes", required=True),
            _append(),
            cli.option("--lerobot", type=cli.PATH, metavar="DIR", help="also write a LeRobotDataset v3.0 folder"),
            *_made_for(),
            *cli.section(
                "Recordings",
                cli.flag("--only-success", "leave out what was not marked a success"),
                cli.option("--instruction", metavar="TEXT", default="", help="in force throughout, not the bag's"),
                cli.option("--motion", type=click.Choice(("measured", "commanded")), default="measured",
                           help="actions lead where the arm went, or where its controller was told to go"),
                _camera_pose(),
                cli.flag("--no-depth", "do not wait for depth images, nor use them"),
                cli.number("--slop", "largest difference of colour and depth stamps [s]", 0.02),
                cli.option("--clock", type=click.Choice(KINDS), default="auto", help="which stamps are the bag's time"),
                cli.remap(),
                cli.option("--namespace", metavar="NAME", default="", help="namespace of the recorded nodes"),
                _joint_map("in the bag"),
            ),
            examples="""
            python -m vla_nodes dataset build recordings/ --out data --only-success
            python -m vla_nodes dataset build recordings/ --out data --lerobot data_lerobot
            """,
            errors=ERRORS,
        ),
        cli.Command(
            "export",
            """
            Episodes to a LeRobotDataset v3.0 folder.
            """,
            _export,
            cli.argument("DATA", "folder of episodes", type=cli.PATH),
            cli.out("folder to make", required=True),
            *_made_for(),
            examples="""
            python -m vla_nodes dataset export data --out data_lerobot
            """,
            errors=ERRORS,
        ),
        cli.Command(
            "import",
            """
            A LeRobotDataset v3.0 folder to episodes.

            The status is 1 where an episode had to be skipped.
            """,
            _import,
            cli.argument("FOLDER", "LeRobotDataset v3.0", type=cli.PATH),
            cli.out("folder for the episodes", required=True),
            _append(),
            *_made_for(),
            *cli.section(
                "What its columns are",
                cli.option("--camera", metavar="NAME", default="", help="feature of the colour images; without it the "
                           "only one"),
                cli.option("--depth", metavar="NAME", default="", help="feature of the depth images"),
                cli.option("--state", metavar="NAME", default="observation.state", help="feature with the joints"),
                _joint_map("in the state"),
                cli.option("--gripper", metavar="NAME", default="gripper", help="the gripper's name in the state"),
                cli.number("--gripper-closed", "its value when closed", 0.0, least=None),
                cli.number("--gripper-open", "its value when open", 1.0, least=None),
                cli.flag("--degrees", "joint angles are in degrees"),
                cli.option("--intrinsics", type=float, nargs=4, metavar="FX FY CX CY", help="of the images [pixels]"),
                _camera_pose(),
            ),
            examples="""
            python -m vla_nodes dataset import data_lerobot --out data
            """,
            errors=ERRORS,
        ),
        cli.Command(
            "inspect",
            """
            What is in a folder of episodes, a LeRobot folder or a recording, in numbers and as a picture.
            """,
            _inspect,
            cli.argument("PATH", "the folder or recording", type=cli.PATH),
            cli.out("contact sheet to write; without it PATH's name and _sheet.png, here", metavar="FILE"),
            cli.remap(),
            examples="""
            python -m vla_nodes dataset inspect data --out data.png
            """,
            errors=ERRORS,
        ),
    ],
    examples="""
    python -m vla_nodes dataset build recordings/ --out data
    """,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())

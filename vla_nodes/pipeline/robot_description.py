"""One robot in one file: config/<robot>/contract.yaml, read, checked, and made into the arm's kinematics.

The file holds the robot's half of a checkpoint's contract (`policy/contract.py`), where its URDF is, and what a URDF
cannot say and control needs: limits of acceleration and jerk, the tool's and the grippers' speeds, a rest posture.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vla_nodes import bounded_yaml
from vla_nodes.policy.contract import Name, Positive, Robot, parse
from vla_nodes.share import share_path

if TYPE_CHECKING:
    from vla_nodes.control.robot import RobotModel


class RobotFileError(ValueError):
    """One line: which file, which entry, what is wrong with it."""


class JointLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one joint of the arm can do at most."""

    acceleration: Positive  # rad/s^2, or m/s^2
    jerk: Positive  # rad/s^3, or m/s^3


class RobotLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the robot can do at most, beside the position and velocity limits of its URDF."""

    joints: dict[Name, JointLimits]  # one for each joint of the arm
    tool_speed: Positive  # m/s, translation of the tool frame
    grippers: dict[Name, Positive] = {}  # largest speed of each gripper's joint, m/s or rad/s, by the gripper's name


class RobotFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The entries of a contract.yaml."""

    robot: Robot  # joints, frames, grippers, workspace: the robot's half of a checkpoint's contract
    urdf: Name  # absolute, beside the file, or below the package's share folder
    limits: RobotLimits  # beside those of the URDF
    rest: tuple[float, ...] | None = None  # rad, posture that a redundant arm is drawn to; None: the joints' middles


class RobotDescription:
    """A robot as its contract.yaml describes it.

    Attributes: path: of the file; robot: the `contract.Robot`; urdf: Path of the URDF (it may not exist yet);
    limits, rest: as in the file.
    """

    def __init__(self, path: str | Path) -> None:
        """path: absolute, or below the package's share folder. Raises RobotFileError, FileNotFoundError."""
        self.path = located(path)
        values = _entries(self.path)
        self.robot, self.limits, self.rest = values.robot, values.limits, values.rest
        self.urdf = located(values.urdf, self.path.parent)

    def model(self) -> RobotModel:
        """The arm's kinematics and limits (imports Pinocchio).

        Raises RobotFileError where the URDF and the file contradict each other; RobotError and FileNotFoundError where
        the URDF cannot be used.
        """
        from vla_nodes.control.robot import Gripper, MotionLimits, RobotError, RobotModel

        robot, limits = self.robot, self.limits
        motion = MotionLimits(
            {name: entry.acceleration for name, entry in limits.joints.items()},
            {name: entry.jerk for name, entry in limits.joints.items()},
            limits.tool_speed,
            self.rest,
        )
        grippers = [Gripper(g.name, g.joint, g.closed, g.open, limits.grippers[g.name]) for g in robot.grippers]
        try:
            model = RobotModel(self.urdf, robot.tool_frame, motion, robot.joints, grippers)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.path}: urdf: {error}") from None
        except RobotError as error:
            raise RobotFileError(f"{self.path}: {error}") from error
        if robot.base_frame not in model.base_frames:
            known = " or ".join(model.base_frames)
            raise RobotFileError(f"{self.path}: robot.base_frame is {robot.base_frame!r}, the URDF's root is {known}")
        return model


def robot_model(path: str | Path) -> RobotModel:
    """The arm of a contract.yaml; raises as `RobotDescription` and its `model`."""
    return RobotDescription(path).model()


def located(path: str | Path, folder: Path | None = None) -> Path:
    """An absolute path as it is; else the file in `folder`, if it is there, or below the package's share folder.

    Raises FileNotFoundError for a relative path that is in neither.
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    if folder is not None and (folder / path).is_file():
        return folder / path
    return share_path(str(path))


def _entries(path: Path) -> RobotFile:
    try:
        values = bounded_yaml.read(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: parameter contract names a robot's contract.yaml") from None
    except OSError as error:
        raise RobotFileError(f"{path}: {error.strerror}") from None
    except bounded_yaml.YamlError as error:
        raise RobotFileError(str(error)) from None
    try:
        found = parse(values, RobotFile)
    except ValueError as error:
        raise RobotFileError(f"{path}: {error}") from None
    if wrong := _inconsistent(found):
        raise RobotFileError(f"{path}: {wrong}")
    return found


def _inconsistent(found: RobotFile) -> str:
    """What no single entry shows, or ""."""
    robot, limits = found.robot, found.limits
    if not robot.joints:
        return "robot.joints is empty"
    for gripper in robot.grippers:
        if gripper.name == "arm" or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", gripper.name):
            return f"robot.grippers: {gripper.name!r} is no name for a gripper, whose topics are <name>_controller/..."
    for entry, given, wanted in (
        ("limits.joints", set(limits.joints), robot.joints),
        ("limits.grippers", set(limits.grippers), [gripper.name for gripper in robot.grippers]),
    ):
        if missing := [name for name in wanted if name not in given]:
            return f"{entry} lacks {missing[0]}"
        if unknown := sorted(given.difference(wanted)):
            return f"{entry}: {unknown[0]} is none of {', '.join(wanted) or 'the robot (it names none)'}"
    if found.rest is not None and len(found.rest) != len(robot.joints):
        return f"rest has {len(found.rest)} values, robot.joints has {len(robot.joints)}"
    return ""

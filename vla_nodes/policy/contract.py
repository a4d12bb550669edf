"""What a robot, its cameras and its training data fix, as one value: the contract between a policy and what it meets.

A checkpoint's `config.json` holds a `Contract`. A robot's half of it, `Robot`, is in `config/<robot>/contract.yaml`.
A node, a server, a client, replay and training compare the two before anything moves and refuse what does not fit,
with the table that `differences` and `difference_table` give.

Units are SI: metres, radians, seconds. Poses are (4, 4) homogeneous matrices named T_a_b: the pose of b in a.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1, le=1 << 16)]
Probability = Annotated[float, Meta(ge=0, le=1)]
ActionSpace = Literal["ee_delta", "ee_pose", "joint_delta", "joint_position"]


class ContractError(ValueError):
    """One line: which entry is wrong, and how."""


class _Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the contract: immutable, compared by value, unknown entries refused."""


class Box(_Value, frozen=True, kw_only=True):
    """An axis-aligned box in the base frame, m."""

    lower: tuple[float, float, float]  # x y z of the corner with the smallest coordinates
    upper: tuple[float, float, float]  # x y z of the opposite corner


class Gripper(_Value, frozen=True, kw_only=True):
    """A gripper that opens and closes by one joint. In actions and states it is its opening: 0 closed, 1 open."""

    name: Name = "gripper"  # of its column in an action chunk
    joint: Name  # in the URDF and in joint_states
    closed: float  # joint position at opening 0, m or rad
    open: float  # joint position at opening 1, m or rad; below `closed` where the joint closes upwards


class Robot(_Value, frozen=True, kw_only=True):
    """The arm that a policy was trained for."""

    name: Name  # of the robot in its URDF
    joints: tuple[Name, ...]  # of the arm, in the order of every joint vector
    base_frame: Name  # of poses, points and Cartesian actions
    tool_frame: Name  # the frame that Cartesian actions move
    grippers: tuple[Gripper, ...] = ()  # none, one or several
    workspace: Box | None = None  # where the tool may go; None: wherever the arm reaches


class StateVector(_Value, frozen=True, kw_only=True):
    """One named measurement; it enters the network as (value - offset) / scale, element by element.

    Names with a meaning, computed from the observation: joint_positions, joint_velocities, tool_position (m in base),
    tool_rotation (first two columns of the rotation matrix, 6 numbers), tool_velocity (m/s, from the change of the
    tool's position), gripper (openings), gripper_velocity (1/s). Any other name is a vector that the data bring.
    """

    name: Name  # see above
    size: Count  # numbers in it
    unit: str = ""  # of its elements, for a reader
    token: Name = "state"  # vectors with one token name enter the network as one token
    offset: tuple[float, ...] | float = 0.0  # one number, or one for each element
    scale: tuple[float, ...] | float = 1.0  # the same, above 0


class Actions(_Value, frozen=True, kw_only=True):
    """What a row of an action chunk says. Row k is to be reached (k + 1) periods after the observation."""

    space: ActionSpace  # see ActionChunk.msg
    columns: tuple[Name, ...]  # of a row, in order, grippers included
    scale: tuple[Positive, ...]  # what a normalised action of 1 stands for, by column; 1 for grippers
    offset: tuple[float, ...] | None = None  # added after the scale, by column; None: nothing
    grippers: tuple[Name, ...] = ()  # the columns that are gripper openings, 0 closed .. 1 open, absolute
    horizon: Count  # rows of a chunk
    period: Positive  # s between two rows

    @property
    def size(self) -> int:
        """Columns of a row."""
        return len(self.columns)

    @property
    def gripper_columns(self) -> tuple[int, ...]:
        """Where the grippers' openings are in a row."""
        return tuple(self.columns.index(name) for name in self.grippers)

    @property
    def motion_columns(self) -> tuple[int, ...]:
        """Where the arm's motion is in a row."""
        return tuple(i for i, name in enumerate(self.columns) if name not in self.grippers)


class Camera(_Value, frozen=True, kw_only=True):
    """One camera, in the order in which the network takes them."""

    name: Name  # its topics are <name>/color/..., <name>/aligned_depth_to_color/...
    depth: Literal["required", "optional", "none"] = "optional"  # whether depth is an input
    pose: Literal["known", "unknown"] = "known"  # whether T_base_camera is an input
    depth_range: tuple[float, float] = (0.1, 3.0)  # m; readings outside are invalid


class Thresholds(_Value, frozen=True, kw_only=True):
    """Where a policy's probabilities become decisions; tuned to one set of weights."""

    start: Probability = 0.4  # feasibility above which the robot may start
    start_late: Probability = 0.8  # the same for what comes into view after it was not found at first
    lost: Probability = 0.1  # feasibility below which a running task is given up, when it stays there
    done: Probability = 0.5  # probability above which a step counts as done
    start_observations: Count = 3  # that the first decision is averaged over
    lost_observations: Count = 20  # in a row
    done_observations: Count = 3  # in a row
    holding: tuple[Probability, Probability] = (0.1, 0.9)  # gripper openings between which something is in hand


class Contract(_Value, frozen=True, kw_only=True):
    """All that a checkpoint fixes."""

    robot: Robot  # the arm
    state: tuple[StateVector, ...]  # proprioception, in the order in which it enters the network
    actions: Actions  # what a chunk says
    cameras: tuple[Camera, ...]  # the images that the policy takes
    tick: Positive  # s between two observations in training
    thresholds: Thresholds = Thresholds()  # where probabilities become decisions


def parse(values: Any, kind: type[Any] = Contract) -> Any:
    """A `Contract`, or another class of this module, from plain values (JSON, YAML).

    Raises:
        ContractError: names the entry, what it must be and what it is.
    """
    try:
        value = msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ContractError(_one_line(str(error).replace("`$.", "`").replace("`$`", "the contract"))) from None
    if wrong := _not_finite(plain(value)) or _first_inconsistent(value):
        raise ContractError(_one_line(wrong))
    return value


def plain(value: Any) -> Any:
    """Plain values for JSON or YAML; `parse` reads them back to an equal contract."""
    return msgspec.to_builtins(value)


def _one_line(text: str) -> str:
    """Names in a message are whatever the file holds, line breaks included."""
    return " ".join(text.split())


def _not_finite(value: Any, entry: str = "") -> str:
    """The first number of plain values that is NaN or infinite (JSON as Python reads it and YAML can hold both), or "".

    A NaN passes every comparison with a bound, and would reach the arm as an action that is no number.
    """
    if isinstance(value, dict):
        parts = ((f"{entry}.{name}" if entry else name, part) for name, part in value.items())
    elif isinstance(value, list | tuple):
        parts = ((f"{entry}[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{entry} is {value}: it must be a finite number"
    else:
        return ""
    return next((wrong for name, part in parts if (wrong := _not_finite(part, name))), "")


def _first_inconsistent(value: Any) -> str:
    """What `_inconsistent` says of a value's parts, the smallest first, and of itself; "" where all is well."""
    parts: Any = ()
    if isinstance(value, msgspec.Struct):
        parts = (getattr(value, name) for name in value.__struct_fields__)
    elif isinstance(value, tuple):
        parts = value
    return next((text for part in parts if (text := _first_inconsistent(part))), "") or _inconsistent(value)


def _inconsistent(value: Any) -> str:
    """What no single entry shows: sizes that do not agree, names that stand twice. "" where all is well."""
    if isinstance(value, Contract):
        if not value.cameras:
            return "cameras: there must be one at least"
        have = [gripper.name for gripper in value.robot.grippers]
        if missing := [name for name in value.actions.grippers if name not in have]:
            return f"actions.grippers: {missing[0]!r} is no gripper of the robot; it has {', '.join(have) or 'none'}"
        cameras, vectors = [camera.name for camera in value.cameras], [vector.name for vector in value.state]
        return _doubled("cameras", cameras) or _doubled("state", vectors)
    if isinstance(value, Thresholds):
        low, high = value.holding
        return "" if low < high else f"thresholds.holding: {low} must be below {high}"
    if isinstance(value, Box):
        below = all(a < b for a, b in zip(value.lower, value.upper, strict=True))
        return "" if below else f"robot.workspace: lower {list(value.lower)} must be below upper {list(value.upper)}"
    if isinstance(value, Gripper):
        same = value.closed == value.open
        return f"robot.grippers: closed and open of {value.name} are the same" if same else ""
    if isinstance(value, Camera):
        near, far = value.depth_range
        return "" if 0 <= near < far else f"camera {value.name}: depth_range [{near}, {far}] must be 0 <= near < far"
    if isinstance(value, Robot):
        if shared := [g for g in value.grippers if g.joint in value.joints]:
            return f"robot.grippers: {shared[0].joint} of {shared[0].name} is a joint of the arm"
        return _doubled("robot.joints", value.joints) or _doubled("robot.grippers", [g.name for g in value.grippers])
    if isinstance(value, StateVector):
        for entry in ("offset", "scale"):
            numbers = getattr(value, entry)
            if isinstance(numbers, tuple) and len(numbers) != value.size:
                return f"state vector {value.name}: {entry} has {len(numbers)} numbers, its size is {value.size}"
        scales = value.scale if isinstance(value.scale, tuple) else (value.scale,)
        if not all(scale > 0 for scale in scales):
            return f"state vector {value.name}: scale must be above 0"
    if isinstance(value, Actions):
        for entry in ("scale", "offset"):
            numbers = getattr(value, entry)
            if numbers is not None and len(numbers) != value.size:
                return f"actions.{entry} has {len(numbers)} numbers, there are {value.size} columns"
        if missing := [name for name in value.grippers if name not in value.columns]:
            return f"actions.grippers: {missing[0]!r} is no column; there are {', '.join(value.columns)}"
        if not value.columns:
            return "actions.columns: there must be one at least"
        return _doubled("actions.columns", value.columns) or _doubled("actions.grippers", value.grippers)
    return ""


def _doubled(entry: str, names: Any) -> str:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    return f"{entry}: {twice[0]!r} stands twice" if twice else ""


def differences(wanted: Any, offered: Any, entry: str = "") -> list[tuple[str, Any, Any]]:
    """(entry, what the checkpoint wants, what is offered) wherever two values of the contract differ."""
    if isinstance(wanted, _Value) and type(wanted) is type(offered):
        found = []
        for name in wanted.__struct_fields__:
            found += differences(getattr(wanted, name), getattr(offered, name), f"{entry}.{name}" if entry else name)
        return found
    return [] if wanted == offered else [(entry, wanted, offered)]


def difference_table(rows: list[tuple[str, Any, Any]]) -> str:
    """What `differences` found, as a table for the log."""
    cells = [("entry", "checkpoint", "robot or camera"), *((name, str(a), str(b)) for name, a, b in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)

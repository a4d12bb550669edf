"""A replay's results as a file, and the first difference of another replay from it.

The file holds what went in (stamps and checksums of every message the pipeline reads, checksums of every tensor, the
settings) and what came out (the actions of every step, and what the controllers would have followed, 20 times a
second). So a difference is named where it began: the message, the tensor, the setting; else the stamp, the joint and
both values.

On the machine that wrote it (same processor, same libraries) all of it must be equal to the last bit. On another, sums
round otherwise, and values may differ by the tolerance: `TOLERANCE` rad for joints, the same share of its largest value
for each column of the actions.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vla_nodes.replay.open_loop import Sink, Step
from vla_nodes.rosbag.timeline import Event, nanoseconds

FORMAT = 1
TOLERANCE = 1e-3
MAX_BYTES = 256 << 20
USED = ("color", "info", "depth", "joints", "instruction", "active_instruction", "camera_pose", "tf", "tf_static",
        "clock")  # fmt: skip
VECTOR = ("sse", "ssse", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")
LIBRARIES = ("torch", "numpy", "openvino", "onnxruntime", "pin", "ruckig", "opencv-python-headless")


class GoldenError(ValueError):
    """One line: why a golden file cannot be used."""


class GoldenSink(Sink):
    """Collects what a golden file holds. Memory grows with the recording: some 10 kB a second."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[tuple[int, int, int]]] = {}
        self.steps: list[tuple[int, int]] = []
        self.holds: list[str] = []
        self.actions: list[np.ndarray] = []
        self.times: list[int] = []
        self.joints: list[np.ndarray] = []

    def message(self, event: Event) -> None:
        if event.name in USED:
            header = getattr(event.message, "header", None)
            stamp = event.received if header is None else nanoseconds(header.stamp)
            self.inputs.setdefault(event.topic, []).append((stamp, event.received, zlib.crc32(event.data)))

    def step(self, step: Step, published: bool) -> None:
        output = step.output
        self.steps.append((step.stamp, step.ended))
        given = output is not None and output.actions is not None
        self.holds.append("" if given else (output.hold_reason if output is not None else str(step.error)))
        if given:
            self.actions.append(np.asarray(output.actions, np.float32))

    def commanded(self, now: int, q: np.ndarray | None, qd: np.ndarray | None, fingers: np.ndarray) -> None:
        if q is not None:
            self.times.append(now)
            self.joints.append(np.append(q, fingers))


def collect(sink: GoldenSink, settings: dict[str, Any], checkpoint: Path, robot: Path, joint_names: list[str]) -> dict:
    """What a golden file says, as plain values and arrays."""
    shape = sink.actions[0].shape if sink.actions else (0, 0)
    return {
        "format": FORMAT,
        "settings": settings,
        "environment": environment(),
        "files": {name: _sha(path) for name, path in _files(checkpoint, robot).items()},
        "weights": tensor_checksums(checkpoint / "model.safetensors"),
        "joints": joint_names,
        "inputs": {topic: np.array(rows, np.int64) for topic, rows in sorted(sink.inputs.items())},
        "steps": np.array(sink.steps, np.int64).reshape(-1, 2),
        "holds": sink.holds,
        "actions": np.array(sink.actions, np.float32).reshape(len(sink.actions), *shape),
        "times": np.array(sink.times, np.int64),
        "commands": np.array(sink.joints, np.float64).reshape(len(sink.times), -1),
    }


def environment() -> dict[str, str]:
    """Processor and library versions: what the rounding of floating-point sums depends on."""
    libc = " ".join(platform.libc_ver())
    found = {"processor": _processor(), "python": platform.python_version(), "libc": libc}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def tensor_checksums(path: Path) -> dict[str, str]:
    """{tensor: first characters of its SHA-256} of a safetensors file. Raises GoldenError if it is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 32 << 20:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
            sums = {}
            for name, entry in sorted(header.items()):
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                sums[name] = hashlib.sha256(file.read(end - begin)).hexdigest()[:16]
            return sums
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GoldenError(f"{path}: not a safetensors file: {error}") from None


def write(path: Path, golden: dict) -> None:
    """Write a golden file: JSON, arrays packed. Raises OSError."""
    packed = json.dumps(golden, indent=1, default=_pack, allow_nan=False)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(packed + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> dict:
    """Read a golden file. Raises GoldenError if it is none, or of another format."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        golden = json.loads(path.read_text(encoding="utf-8"), object_hook=_unpack)
        if golden["format"] != FORMAT:
            raise ValueError(f"format {golden['format']}, this is format {FORMAT}: write it anew with --update")
        if not isinstance(golden["settings"], dict):
            raise ValueError("it has no settings")
        for name in ("steps", "times", "actions", "commands"):
            if not isinstance(golden[name], np.ndarray):
                raise ValueError(f"'{name}' is no array")
        if golden["commands"].ndim != 2 or len(golden["commands"]) != len(golden["times"]):
            raise ValueError("times and commands do not fit each other")
        if len(golden["holds"]) != len(golden["steps"]) or golden["holds"].count("") != len(golden["actions"]):
            raise ValueError("steps and actions do not fit each other")
        return golden
    except FileNotFoundError:
        raise GoldenError(f"{path}: no such golden file: write it with --update") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zlib.error, RecursionError) as error:
        raise GoldenError(f"{path}: not a golden file: {str(error)[:200]}") from None


def differences(golden: dict, now: dict, tolerance: float | None = None) -> list[str]:
    """The first difference of each kind, causes before effects; empty if there is none.

    Args: tolerance: rad; None: none on the machine that wrote the golden file, TOLERANCE on another.
    """
    same = golden["environment"] == now["environment"]
    allowed = tolerance if tolerance is not None else (0.0 if same else TOLERANCE)
    found = [
        _first_setting(golden["settings"], now["settings"]),
        _first_checksum("file", golden["files"], now["files"]),
        _first_checksum("weights: tensor", golden["weights"], now["weights"]),
        _first_message(golden["inputs"], now["inputs"]),
        _first_step(golden, now, allowed),
        _first_command(golden, now, allowed),
    ]
    return [line for line in found if line]


def _first_setting(expected: dict, got: dict) -> str:
    """Of the settings that the golden file knows: a parameter added since then is at its default, or shows in what
    comes out. Names of bag and checkpoint are no settings: their contents are compared."""
    expected, got = _flat(expected), _flat(got)
    for name in sorted(expected):
        if name not in ("bag", "checkpoint") and expected[name] != got.get(name):
            return f"setting {name}: expected {expected[name]!r}, got {got.get(name)!r}"
    return ""


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found.update(_flat(value, "" if name == "parameters" else f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found


def _first_checksum(kind: str, expected: dict, got: dict) -> str:
    for name in sorted(expected.keys() | got.keys()):
        if name not in got:
            return f"{kind} {name} is missing"
        if name not in expected:
            return f"{kind} {name} is new"
        if expected[name] != got[name]:
            return f"{kind} {name} differs: checksum expected {expected[name]}, got {got[name]}"
    return ""


def _first_message(expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> str:
    """The earliest received message that is missing, added, or changed."""
    found = []
    for topic in sorted(expected.keys() | got.keys()):
        a, b = (side.get(topic, np.zeros((0, 3), np.int64)) for side in (expected, got))
        n = min(len(a), len(b))
        unequal = np.flatnonzero((a[:n] != b[:n]).any(axis=1))
        if not len(unequal) and len(a) == len(b):
            continue
        i = int(unequal[0]) if len(unequal) else n
        if i >= len(b) or (i + 1 < len(a) and (a[i + 1] == b[i]).all()):
            found.append((a[i][1], f"{topic}: the message stamped {_stamp(a[i][0])} is missing"))
        elif i >= len(a) or (i + 1 < len(b) and (a[i] == b[i + 1]).all()):
            found.append((b[i][1], f"{topic}: the message stamped {_stamp(b[i][0])} is new"))
        elif a[i][0] != b[i][0]:
            found.append((b[i][1], f"{topic}: stamp expected {_stamp(a[i][0])}, got {_stamp(b[i][0])} (message {i})"))
        elif a[i][1] != b[i][1]:
            times = f"expected at {_stamp(a[i][1])}, got at {_stamp(b[i][1])}"
            found.append((b[i][1], f"{topic}: the message stamped {_stamp(a[i][0])} was received {times}"))
        else:
            found.append((b[i][1], f"{topic}: the message stamped {_stamp(a[i][0])} has other contents"))
    return min(found, key=lambda entry: int(entry[0]))[1] if found else ""


def _first_step(golden: dict, now: dict, tolerance: float) -> str:
    a, b = golden["steps"], now["steps"]
    expected, got = golden["actions"], now["actions"]
    scale = np.abs(expected).max(axis=(0, 1)) if expected.size else np.zeros(0)
    k = 0  # steps with actions so far
    for i in range(min(len(a), len(b))):
        if (a[i] != b[i]).any():
            return f"step {i}: expected on stamp {_stamp(a[i][0])}, got on stamp {_stamp(b[i][0])}"
        x, y = golden["holds"][i], now["holds"][i]
        if (x == "") != (y == "") or (tolerance == 0.0 and x != y):
            return f"stamp {_stamp(a[i][0])}: expected {x or 'actions'}, got {y or 'actions'}"
        if x == "":
            if expected.shape[1:] != got.shape[1:]:
                return f"actions: expected {expected.shape[1:]}, got {got.shape[1:]} values a step"
            off = ~(np.abs(expected[k] - got[k]) <= tolerance * scale)
            if off.any():
                row, column = (int(v) for v in np.argwhere(off)[0])
                values = f"expected {float(expected[k][row, column])!r}, got {float(got[k][row, column])!r}"
                return f"stamp {_stamp(a[i][0])}: action row {row}, column {column}: {values}"
            k += 1
    if len(a) != len(b):
        longer, word = (a, "missing") if len(a) > len(b) else (b, "new")
        return f"the step on stamp {_stamp(longer[min(len(a), len(b))][0])} is {word}"
    return ""


def _first_command(golden: dict, now: dict, tolerance: float) -> str:
    a, b = golden["times"], now["times"]
    names = [*golden["joints"]]
    for i in range(min(len(a), len(b))):
        if a[i] != b[i]:
            return f"commanded joints: expected at {_stamp(a[i])}, got at {_stamp(b[i])}"
        x, y = golden["commands"][i], now["commands"][i]
        if x.shape != y.shape:
            return f"stamp {_stamp(a[i])}: expected {len(x)} joints, got {len(y)}"
        off = ~((np.abs(x - y) <= tolerance) | (np.isnan(x) & np.isnan(y)))
        if off.any():
            j = int(np.argmax(off))
            name = names[j] if j < len(names) else f"joint {j}"
            far = f"{abs(x[j] - y[j]):.3g} rad apart, allowed {tolerance:g}"
            return f"stamp {_stamp(a[i])}: {name}: expected {float(x[j])!r}, got {float(y[j])!r} ({far})"
    if len(a) != len(b):
        longer, word = (a, "missing") if len(a) > len(b) else (b, "new")
        return f"commanded joints at {_stamp(longer[min(len(a), len(b))])} are {word}"
    return ""


def _files(checkpoint: Path, robot: Path) -> dict[str, Path]:
    return {**{name: checkpoint / name for name in ("config.json", "tokenizer.json")}, "robot description": robot}


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _processor() -> str:
    """Name, generation and vector instructions: clouds give different processors one name, and libraries choose their
    arithmetic by the instructions."""
    entry: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            entry[key.strip()] = value.strip()
    except OSError:
        pass
    name = entry.get("model name") or platform.processor() or platform.machine()
    kind = " ".join(f"{key} {entry[key]}" for key in ("cpu family", "model", "stepping") if key in entry)
    flags = (entry.get("flags") or entry.get("Features", "")).split()
    vector = sorted(flag for flag in flags if flag.startswith(VECTOR))
    return ", ".join(part for part in (name, kind, " ".join(vector)) if part)


def _pack(value: Any) -> dict:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"cannot write {type(value).__name__}")
    array = np.ascontiguousarray(value)
    data = np.diff(array, axis=0, prepend=np.zeros_like(array[:1])) if array.dtype == np.int64 else array
    packed = base64.b85encode(zlib.compress(data.astype(data.dtype.newbyteorder("<")).tobytes(), 9)).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "packed": packed}


def _unpack(entry: dict) -> Any:
    if set(entry) != {"dtype", "shape", "packed"}:
        return entry
    dtype = {"int64": "<i8", "float32": "<f4", "float64": "<f8"}[entry["dtype"]]
    raw = zlib.decompressobj().decompress(base64.b85decode(entry["packed"]), MAX_BYTES)
    array = np.frombuffer(raw, dtype).reshape(entry["shape"])
    return np.cumsum(array, axis=0) if entry["dtype"] == "int64" else array


def _stamp(ns: Any) -> str:
    ns = int(ns)
    return f"{ns // 10**9}.{ns % 10**9:09d}"

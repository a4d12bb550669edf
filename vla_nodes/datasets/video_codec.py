"""Colour and depth as video files, with PyAV: how a LeRobotDataset v3.0 folder keeps its images.

Colour is H.264 (4:2:0, so chroma is halved: the only loss of a round trip). Depth is what LeRobot defines since 0.6:
12-bit grey HEVC, lossless, whose codes are either linear or logarithmic between `near` and `far`. Ours are linear over
0 .. 4.095 m, so that one code is one millimetre and nothing is lost; code 0 is "no reading".

PyAV is imported where it is used: pip install 'vla_nodes[lerobot]'.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_nodes.datasets.episode import MAX_PIXELS, DataError

QMAX = 4095  # 12 bits
KEYFRAMES = 2  # a key frame every so many frames, as LeRobot's own, so that a random frame is quick to reach


@dataclass(frozen=True)
class DepthCoding:
    """Metres to 12-bit codes and back, as LeRobot's `video.depth_min`, `depth_max`, `shift` and `use_log` say."""

    near: float = 0.0
    far: float = QMAX * 1e-3
    shift: float = 0.0
    log: bool = False

    def __post_init__(self) -> None:
        values = (self.near, self.far, self.shift)
        if not np.isfinite(values).all() or not 0 <= self.near < self.far or (self.log and self.near + self.shift <= 0):
            raise DataError(f"depth coding {self} is impossible: 0 <= near < far, and near + shift > 0 with log")

    def encode(self, depth: np.ndarray) -> tuple[np.ndarray, int]:
        """Depth (H, W) m, 0 = no reading, to codes (H, W) uint16; and how many readings beyond `far` became none."""
        lost = depth > self.far + 0.5 * (self.far - self.near) / QMAX
        kept = np.where(lost, 0.0, depth)
        if self.log:
            low, high = np.log(self.near + self.shift), np.log(self.far + self.shift)
            scaled = (np.log(np.maximum(kept, self.near) + self.shift) - low) / (high - low)
        else:
            scaled = (kept - self.near) / (self.far - self.near)
        return np.rint(scaled * QMAX).clip(0, QMAX).astype(np.uint16), int(lost.sum())

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes (H, W) to depth (H, W) float32 m; the lowest code is "no reading", 0."""
        scaled = codes.astype(np.float64) / QMAX
        if self.log:
            low, high = np.log(self.near + self.shift), np.log(self.far + self.shift)
            depth = np.exp(low + scaled * (high - low)) - self.shift
        else:
            depth = self.near + scaled * (self.far - self.near)
        return np.where(codes == 0, 0.0, depth).astype(np.float32)


def import_av() -> Any:
    """PyAV, or a DataError that says how to get it."""
    try:
        import av
    except ImportError:
        raise DataError("video needs PyAV: pip install 'vla_nodes[lerobot]' (or pip install av)") from None
    return av


class VideoWriter:
    """One .mp4 file. `kind` is "color" ((H, W, 3) uint8 RGB) or "depth" ((H, W) uint16 codes)."""

    def __init__(self, path: Path, fps: int, height: int, width: int, kind: str, crf: int = 18) -> None:
        if kind == "color" and (height % 2 or width % 2):
            raise DataError(f"{path.name}: video needs an even height and width, the images are {height} x {width}")
        av = import_av()
        self._av, self.kind, self.frames, self.bytes = av, kind, 0, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = av.open(str(path), "w", format="mp4")
        if kind == "color":
            codec, self._format, options = "libx264", "yuv420p", {"crf": str(crf), "preset": "medium", "bf": "0"}
            # The same bytes for the same images: x264's macroblock-tree gives other results now and then where the
            # processor has AVX-512 (and looks ahead, which a key frame every KEYFRAMES frames leaves no room for); and
            # without cpu-independent it uses other arithmetic with AVX2 than without.
            options["x264-params"] = "no-mbtree=1:cpu-independent=1"
        else:
            # Lossless, so the images are always the same; the bytes are not quite: x265 coding grey pictures decides a
            # little differently from run to run, even with one thread.
            rules = f"lossless=1:bframes=0:keyint={KEYFRAMES}:pools=none:frame-threads=1:log-level=none"
            codec, self._format, options = "libx265", "gray12le", {"x265-params": rules}
        options["g"] = str(KEYFRAMES)
        try:
            self._stream = self._file.add_stream(codec, rate=fps, options=options)
        except (av.FFmpegError, ValueError) as error:
            self._file.close()
            raise DataError(f"this PyAV has no encoder {codec} ({error}): install av from PyPI") from None
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, self._format
        self._stream.codec_context.thread_count = 1

    def add(self, image: np.ndarray) -> None:
        if self.kind == "color":
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        else:
            height, width = image.shape
            frame = self._av.VideoFrame(width, height, self._format)
            plane = frame.planes[0]  # rows are padded to line_size bytes
            rows = np.frombuffer(plane, np.uint16).reshape(-1, plane.line_size // 2)
            rows[:height, :width] = image
        frame.pts = self.frames
        self.frames += 1
        self._mux(self._stream.encode(frame))

    def _mux(self, packets: list[Any]) -> None:
        self.bytes += sum(packet.size for packet in packets)
        self._file.mux(packets)

    def close(self) -> None:
        self._mux(self._stream.encode(None))
        self._file.close()


def read_video(path: Path, start: float, count: int, kind: str, fps: float) -> Iterator[np.ndarray]:
    """`count` frames from `start` s on: (H, W, 3) uint8 RGB, or (H, W) uint16 codes for kind "depth".

    Raises: DataError naming the file when it is no mp4, damaged, too large in pixels, or too short.
    """
    av = import_av()
    given = 0
    try:
        # The demuxer is named, so that a playlist in disguise is not followed to other files.
        with av.open(str(path), "r", format="mp4") as file:
            if not file.streams.video:
                raise DataError(f"{path}: holds no video")
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1
            if not 0 < stream.codec_context.width * stream.codec_context.height <= MAX_PIXELS:
                raise DataError(f"{path}: its images have more than {MAX_PIXELS} pixels, or none")
            first = start - 0.5 / fps
            if start > 0:
                file.seek(max(0, round(first / stream.time_base)), stream=stream, backward=True)
            for frame in file.decode(stream):
                if given == count:
                    break
                if frame.pts is None or float(frame.pts * stream.time_base) < first:
                    continue
                if frame.width * frame.height > MAX_PIXELS:
                    raise DataError(f"{path}: frame {given} has more than {MAX_PIXELS} pixels")
                yield _pixels(frame, kind)
                given += 1
    except (av.FFmpegError, ValueError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable video ({error})") from None
    if given < count:
        raise DataError(f"{path}: {given} frames from {start:.3f} s on, {count} are wanted: it is cut short")


def _pixels(frame: Any, kind: str) -> np.ndarray:
    if kind == "color":
        return frame.to_ndarray(format="rgb24")
    if frame.format.name not in ("gray12le", "yuv420p12le"):
        raise DataError(f"depth video is {frame.format.name}: 12-bit grey is read (gray12le)")
    plane = frame.planes[0]  # the first plane is the grey one in both
    rows = np.frombuffer(plane, np.uint16).reshape(-1, plane.line_size // 2)
    return rows[: frame.height, : frame.width].copy()

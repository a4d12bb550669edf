"""sensor_msgs/Image bytes to numpy and back, without ROS.

The functions take the fields of a `sensor_msgs/Image` (`data` may be bytes, bytearray, memoryview,
`array.array('B')` or a uint8 array) so that nodes, replay and tests decode with the same code.
Encodings are those of `sensor_msgs/image_encodings.hpp`; depth follows REP 118 (32FC1 metres, 16UC1
millimetres) and REP 117 (NaN and infinities mean "no reading"). What is not known here is given to
`cv_bridge` where that is installed (Bayer patterns and the like), and is otherwise an error that says so.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

MAX_PIXELS = 4096 * 4096
"""Largest image taken, in pixels: a header claiming more is refused before anything is allocated."""
MAX_CHANNEL_BYTES = 16
"""Largest size of one pixel, in bytes (four float channels)."""

COLOR_ENCODINGS = ("rgb8", "bgr8", "rgba8", "bgra8", "mono8", "yuv422_yuy2", "yuyv")
DEPTH_ENCODINGS = ("32FC1", "16UC1")

_CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "yuv422_yuy2": 2, "yuyv": 2}


class ImageError(ValueError):
    """An image message that cannot be decoded; the text names the encoding or the field at fault."""


def decode_color(data: Any, height: int, width: int, step: int, encoding: str, is_bigendian: int = 0) -> np.ndarray:
    """Colour image as RGB.

    Args:
        data: `step * height` bytes, row after row; rows may be padded.
        height, width: pixels.
        step: bytes from one row to the next.
        encoding: one of `COLOR_ENCODINGS`, or any that cv_bridge converts to rgb8.
        is_bigendian: of no consequence for 8-bit encodings; passed on to cv_bridge.

    Returns:
        (height, width, 3) uint8 RGB. For rgb8 and rgba8 a view into `data` (read-only if `data` is), else a copy.

    Raises:
        ImageError: empty or unknown encoding, a size that does not fit the data, or an image too large.
    """
    _check_encoding(encoding, COLOR_ENCODINGS)
    if encoding in DEPTH_ENCODINGS:
        raise ImageError(f"encoding '{encoding}' is depth, expected colour: check the remap")
    if encoding not in _CHANNELS:
        return _by_cv_bridge(data, height, width, step, encoding, is_bigendian)
    pixels = _rows(data, height, width, step, encoding, np.dtype(np.uint8), _CHANNELS[encoding])
    if encoding in ("rgb8", "rgba8"):
        return pixels[:, :, :3]
    if encoding in ("bgr8", "bgra8"):
        return np.ascontiguousarray(pixels[:, :, 2::-1])
    if encoding == "mono8":
        return np.repeat(pixels, 3, axis=2)
    return _yuyv_to_rgb(pixels)


def decode_depth(data: Any, height: int, width: int, step: int, encoding: str, is_bigendian: int = 0) -> np.ndarray:
    """Depth image in metres, 0 where the camera has no reading.

    Args: as `decode_color`; `encoding` is 32FC1 (metres; NaN, infinities and values <= 0 mean no reading)
        or 16UC1 (millimetres; 0 means no reading). `is_bigendian` is honoured.

    Returns:
        (height, width) float32, finite and >= 0. A view into `data` if it is 32FC1 in this machine's byte order with
        every pixel valid, else a copy.

    Raises:
        ImageError: an encoding that is not depth (mono16 is an intensity, never taken as depth), or a bad size.
    """
    _check_encoding(encoding, DEPTH_ENCODINGS)
    order = ">" if is_bigendian else "<"
    if encoding == "16UC1":
        raw = _rows(data, height, width, step, encoding, np.dtype(order + "u2"), 1)[:, :, 0]
        return raw.astype(np.float32) * np.float32(0.001)
    if encoding == "32FC1":
        raw = _rows(data, height, width, step, encoding, np.dtype(order + "f4"), 1)[:, :, 0]
        depth = raw.astype(np.float32, copy=False)  # also converts a foreign byte order
        valid = np.isfinite(depth) & (depth >= 0)
        if not valid.all():
            depth = np.where(valid, depth, np.float32(0))
        return depth
    if encoding == "mono16":
        raise ImageError("encoding 'mono16' is an intensity image, not depth: have the driver publish 16UC1 or 32FC1")
    raise ImageError(f"encoding '{encoding}' is not depth: expected {' or '.join(DEPTH_ENCODINGS)}")


def decode_compressed_color(data: Any, format: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a `sensor_msgs/CompressedImage`, JPEG or PNG (what image_transport's "compressed" sends).

    Raises:
        ImageError: not a JPEG or PNG, too large, damaged, or a depth image.
    """
    if "16UC1" in format or "32FC1" in format or "compressedDepth" in format:
        raise ImageError(f"compressed image of format '{format}' is depth, expected colour: check the remap")
    pixels = _unpack(_bytes(data), format, grey=False)
    return np.ascontiguousarray(pixels[:, :, ::-1])  # OpenCV decodes to BGR, whatever was encoded


def decode_compressed_depth(data: Any, format: str) -> np.ndarray:
    """(H, W) float32 m, 0 = no reading, of a CompressedImage from image_transport's "compressedDepth" (PNG).

    After 12 bytes of header comes a 16-bit PNG: millimetres for 16UC1; for 32FC1 inverse depth, quantised with the two
    floats of the header (compressed_depth_image_transport, codec.cpp): depth = a / (value - b), 0 = no reading.

    Raises:
        ImageError: another encoding (RVL), too short, too large or damaged.
    """
    flat = _bytes(data)
    if "rvl" in format.lower():
        raise ImageError(f"compressed depth of format '{format}': RVL is not decoded here: record with format png")
    encoding = format.split(";")[0].strip()
    if encoding not in DEPTH_ENCODINGS or "compressedDepth" not in format:
        raise ImageError(f"compressed image of format '{format}' is not compressedDepth of 16UC1 or 32FC1")
    if flat.size < 12:
        raise ImageError(f"compressed depth of {flat.size} bytes has no header")
    raw = _unpack(flat[12:], format, grey=True)
    if raw.dtype != np.uint16:
        raise ImageError(f"compressed depth of format '{format}' holds {raw.dtype} values, expected uint16")
    if encoding == "16UC1":
        return raw.astype(np.float32) * np.float32(0.001)
    a, b = (float(x) for x in flat[4:12].view("<f4"))
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = a / (raw.astype(np.float64) - b)
    return np.where((raw > 0) & np.isfinite(depth) & (depth > 0), depth, 0.0).astype(np.float32)


def _unpack(flat: np.ndarray, format: str, grey: bool) -> np.ndarray:
    """JPEG or PNG bytes to pixels; the size in the file's header is checked before anything is allocated."""
    import cv2

    head = flat[:24].tobytes()
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) == 24:
        width, height = (int.from_bytes(head[i : i + 4], "big") for i in (16, 20))
        if not 0 < width * height <= MAX_PIXELS:
            raise ImageError(f"compressed image of {width}x{height} pixels: 1 to {MAX_PIXELS} are accepted")
    elif not head.startswith(b"\xff\xd8\xff"):  # JPEG: at most 65535 on a side, and OpenCV has its own bound
        raise ImageError(f"compressed image of format '{format}' is neither JPEG nor PNG")
    try:
        pixels = cv2.imdecode(flat, cv2.IMREAD_UNCHANGED if grey else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ImageError(f"compressed image of format '{format}' cannot be decoded: {error.err}") from None
    if pixels is None or pixels.ndim != (2 if grey else 3):
        raise ImageError(f"compressed image of format '{format}' is damaged")
    if pixels.shape[0] * pixels.shape[1] > MAX_PIXELS:
        raise ImageError(f"compressed image of {pixels.shape[1]}x{pixels.shape[0]} pixels is larger than {MAX_PIXELS}")
    return pixels


def encode_depth(depth: np.ndarray, encoding: str) -> tuple[memoryview, int]:
    """Depth in metres to message bytes.

    Args:
        depth: (H, W) float metres; 0, NaN and infinities mean no reading.
        encoding: 32FC1 (no reading becomes NaN, REP 117) or 16UC1 (millimetres, rounded; no reading and what exceeds
            65.535 m becomes 0).

    Returns:
        (data, step): little-endian bytes and bytes per row.

    Raises:
        ImageError: unknown encoding or shape.
    """
    depth = np.asarray(depth)
    if depth.ndim != 2:
        raise ImageError(f"depth has shape {depth.shape}, expected (height, width)")
    valid = np.isfinite(depth) & (depth > 0)
    if encoding == "32FC1":
        out = np.where(valid, depth, np.nan).astype("<f4")
    elif encoding == "16UC1":
        millimetres = np.rint(np.where(valid, depth, 0.0) * 1000.0)
        out = np.where(millimetres <= 65535, millimetres, 0).astype("<u2")
    else:
        raise ImageError(f"depth encoding '{encoding}' is unknown: use {' or '.join(DEPTH_ENCODINGS)}")
    return memoryview(out.reshape(-1).view(np.uint8)), out.shape[1] * out.itemsize


def _check_encoding(encoding: str, known: tuple[str, ...]) -> None:
    if not encoding:
        raise ImageError(f"the image has an empty encoding: the publisher must set one of {', '.join(known)}")


def _rows(data: Any, height: int, width: int, step: int, encoding: str, dtype: np.dtype, channels: int) -> np.ndarray:
    """(height, width, channels) strided view on the message's bytes; honours row padding, checks every size first."""
    if height <= 0 or width <= 0:
        raise ImageError(f"image of {width}x{height} pixels ({encoding}): both sides must be positive")
    if height * width > MAX_PIXELS:
        raise ImageError(f"image of {width}x{height} pixels ({encoding}) is larger than the {MAX_PIXELS} accepted")
    if encoding in ("yuv422_yuy2", "yuyv") and width % 2:
        raise ImageError(f"encoding '{encoding}' needs an even width, got {width}")
    row = width * channels * dtype.itemsize
    if step < row:
        raise ImageError(f"step is {step} bytes, but a row of {width} pixels of {encoding} takes {row}")
    if step > row + MAX_PIXELS:
        raise ImageError(f"step of {step} bytes is absurd for a row of {row} bytes ({encoding})")
    flat = _bytes(data)
    # Some drivers leave the last row's padding out; any other size than step * height is a broken message.
    if not step * (height - 1) + row <= flat.size <= step * height:
        raise ImageError(
            f"data holds {flat.size} bytes, but {height} rows of step {step} ({encoding}) take {step * height}"
        )
    return np.ndarray(
        (height, width, channels), dtype, buffer=flat, strides=(step, channels * dtype.itemsize, dtype.itemsize)
    )


def _bytes(data: Any) -> np.ndarray:
    """Flat uint8 view of any bytes-like object, without a copy; a plain list (rare) is converted."""
    if isinstance(data, list | tuple):
        return np.asarray(data, dtype=np.uint8)
    return np.frombuffer(data, dtype=np.uint8)


def _yuyv_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 2) uint8 Y0 U Y1 V to RGB: BT.601 limited range in 20-bit fixed point, as OpenCV's COLOR_YUV2RGB_YUY2."""
    y = np.maximum(pixels[:, :, 0].astype(np.int32) - 16, 0) * 1220542 + (1 << 19)
    u = np.repeat(pixels[:, 0::2, 1].astype(np.int32) - 128, 2, axis=1)
    v = np.repeat(pixels[:, 1::2, 1].astype(np.int32) - 128, 2, axis=1)
    rgb = np.empty(pixels.shape[:2] + (3,), np.uint8)
    for channel, value in enumerate((y + 1673527 * v, y - 852492 * v - 409993 * u, y + 2116026 * u)):
        np.clip(value >> 20, 0, 255, out=rgb[:, :, channel], casting="unsafe")
    return rgb


def _by_cv_bridge(data: Any, height: int, width: int, step: int, encoding: str, is_bigendian: int) -> np.ndarray:
    """Colour encodings outside `COLOR_ENCODINGS`, by cv_bridge's own conversion to rgb8."""
    try:
        from cv_bridge import CvBridge
    except ImportError:
        raise ImageError(
            f"encoding '{encoding}' is not decoded here ({', '.join(COLOR_ENCODINGS)}) and cv_bridge is not installed: "
            "install it (ros-jazzy-cv-bridge) or have the driver publish rgb8"
        ) from None
    if height <= 0 or width <= 0 or height * width > MAX_PIXELS or step > width * MAX_CHANNEL_BYTES:
        raise ImageError(f"image of {width}x{height} pixels, step {step} ({encoding}) is out of the accepted size")
    message = SimpleNamespace(
        data=bytes(_bytes(data)), height=height, width=width, step=step, encoding=encoding, is_bigendian=is_bigendian
    )
    try:
        return np.asarray(CvBridge().imgmsg_to_cv2(message, "rgb8"))
    except Exception as error:  # cv_bridge raises its own, OpenCV's and numpy's errors
        raise ImageError(f"encoding '{encoding}': cv_bridge cannot convert it to rgb8: {error}") from error

"""Image decoding: every encoding against an independent reference, padding, byte order, and hostile headers."""

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.messages.images import (
    COLOR_ENCODINGS,
    MAX_PIXELS,
    ImageError,
    decode_color,
    decode_depth,
    encode_depth,
)

sides = st.integers(1, 12)
pads = st.integers(0, 9)


def pack(rows: np.ndarray, pad: int, cut_last: bool = False) -> tuple[bytes, int]:
    """(H, row_bytes) uint8 to message bytes with `pad` bytes of garbage behind each row."""
    garbage = np.full((rows.shape[0], pad), 0xA5, np.uint8)
    data = np.concatenate([rows, garbage], axis=1).tobytes()
    return (data[: len(data) - pad] if cut_last and pad else data), rows.shape[1] + pad


def random_rgb(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@settings(deadline=None, max_examples=60)
@given(sides, sides, pads, st.booleans(), st.integers(0, 999), st.sampled_from(["rgb8", "bgr8", "rgba8", "bgra8"]))
def test_color_channel_order_and_padding(height, width, pad, cut_last, seed, encoding):
    rgb = random_rgb(height, width, seed)
    pixels = rgb if encoding.startswith("rgb") else rgb[:, :, ::-1]
    if encoding.endswith("a8"):
        pixels = np.concatenate([pixels, np.full((height, width, 1), 77, np.uint8)], axis=2)
    data, step = pack(pixels.reshape(height, -1), pad, cut_last)
    for form in (data, bytearray(data), memoryview(data), array("B", data), np.frombuffer(data, np.uint8), list(data)):
        assert np.array_equal(decode_color(form, height, width, step, encoding), rgb)


@settings(deadline=None, max_examples=30)
@given(sides, sides, pads, st.integers(0, 999))
def test_mono8_is_grey(height, width, pad, seed):
    grey = random_rgb(height, width, seed)[:, :, 0]
    data, step = pack(grey, pad)
    out = decode_color(data, height, width, step, "mono8")
    assert out.shape == (height, width, 3)
    assert all(np.array_equal(out[:, :, c], grey) for c in range(3))


@settings(deadline=None, max_examples=30)
@given(sides, st.integers(1, 6), pads, st.integers(0, 999), st.sampled_from(["yuv422_yuy2", "yuyv"]))
def test_yuyv_equals_opencv(height, half_width, pad, seed, encoding):
    cv2 = pytest.importorskip("cv2")
    yuyv = np.random.default_rng(seed).integers(0, 256, (height, 2 * half_width, 2), np.uint8)
    data, step = pack(yuyv.reshape(height, -1), pad)
    expected = cv2.cvtColor(yuyv, cv2.COLOR_YUV2RGB_YUY2)
    assert np.array_equal(decode_color(data, height, 2 * half_width, step, encoding), expected)


def test_rgb8_is_a_view_and_others_own_their_pixels():
    rgb = random_rgb(8, 8, 0)
    data = array("B", rgb.tobytes())
    out = decode_color(data, 8, 8, 24, "rgb8")
    data[0] ^= 0xFF
    assert out[0, 0, 0] == data[0]
    assert decode_color(data, 8, 8, 24, "bgr8").flags["C_CONTIGUOUS"]


@settings(deadline=None, max_examples=60)
@given(sides, sides, pads, st.booleans(), st.booleans(), st.integers(0, 999))
def test_depth_16uc1(height, width, pad, cut_last, big, seed):
    millimetres = np.random.default_rng(seed).integers(0, 65536, (height, width), np.uint16)
    raw = millimetres.astype(">u2" if big else "<u2")
    data, step = pack(raw.view(np.uint8).reshape(height, -1), pad, cut_last)
    depth = decode_depth(data, height, width, step, "16UC1", int(big))
    assert depth.dtype == np.float32 and depth.dtype.isnative
    np.testing.assert_allclose(depth, millimetres / 1000.0, rtol=1e-6)
    assert ((depth == 0) == (millimetres == 0)).all()


@settings(deadline=None, max_examples=60)
@given(sides, sides, pads, st.booleans(), st.integers(0, 999))
def test_depth_32fc1_invalid_becomes_zero(height, width, pad, big, seed):
    random = np.random.default_rng(seed)
    metres = random.uniform(0.1, 9.0, (height, width)).astype(np.float32)
    bad = random.choice([np.nan, np.inf, -np.inf, -1.0], (height, width))
    hole = random.random((height, width)) < 0.4
    sent = np.where(hole, bad, metres).astype(">f4" if big else "<f4")
    data, step = pack(sent.view(np.uint8).reshape(height, -1), pad)
    depth = decode_depth(data, height, width, step, "32FC1", int(big))
    assert depth.dtype == np.float32 and depth.dtype.isnative
    assert np.array_equal(depth, np.where(hole, 0, metres))


def test_valid_32fc1_is_a_view():
    metres = np.full((4, 4), 0.5, np.float32)
    data = array("B", metres.tobytes())
    depth = decode_depth(data, 4, 4, 16, "32FC1")
    assert np.shares_memory(depth, np.frombuffer(data, np.uint8))


@settings(deadline=None, max_examples=40)
@given(sides, sides, st.integers(0, 999), st.sampled_from(["32FC1", "16UC1"]))
def test_encode_decode_depth(height, width, seed, encoding):
    random = np.random.default_rng(seed)
    depth = random.uniform(0.05, 20.0, (height, width)).astype(np.float32)
    depth[random.random((height, width)) < 0.3] = 0
    data, step = encode_depth(depth, encoding)
    back = decode_depth(data, height, width, step, encoding)
    np.testing.assert_allclose(back, depth, atol=0 if encoding == "32FC1" else 0.00051)


def test_encode_16uc1_gives_no_reading_beyond_its_range():
    data, step = encode_depth(np.array([[65.535, 65.6, np.inf, np.nan]]), "16UC1")
    assert decode_depth(data, 1, 4, step, "16UC1")[0, 1:].tolist() == [0, 0, 0]
    with pytest.raises(ImageError, match="8UC1"):
        encode_depth(np.zeros((2, 2)), "8UC1")


@pytest.mark.parametrize(
    "decode, encoding, word",
    [
        (decode_depth, "mono16", "mono16.*not depth"),
        (decode_depth, "rgb8", "rgb8.*not depth"),
        (decode_depth, "", "empty encoding"),
        (decode_color, "", "empty encoding"),
        (decode_color, "16UC1", "16UC1.*is depth"),
        (decode_color, "32FC1", "32FC1.*is depth"),
    ],
)
def test_wrong_encoding_is_named(decode, encoding, word):
    with pytest.raises(ImageError, match=word):
        decode(bytes(4 * 4 * 4), 4, 4, 16, encoding)


def test_exotic_encoding_without_cv_bridge_names_the_remedy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cv_bridge", None)
    with pytest.raises(ImageError, match="bayer_rggb8.*cv_bridge"):
        decode_color(bytes(16), 4, 4, 4, "bayer_rggb8")


def test_exotic_encoding_goes_to_cv_bridge(monkeypatch):
    import sys
    from types import ModuleType

    class Bridge:
        def imgmsg_to_cv2(self, message, encoding):
            assert (message.encoding, encoding) == ("bayer_rggb8", "rgb8")
            return np.full((message.height, message.width, 3), message.data[0], np.uint8)

    module = ModuleType("cv_bridge")
    module.CvBridge = Bridge
    monkeypatch.setitem(sys.modules, "cv_bridge", module)
    assert (decode_color(bytes([9] * 16), 4, 4, 4, "bayer_rggb8") == 9).all()


@pytest.mark.parametrize(
    "height, width, step, size",
    [
        (4, 4, 11, 44),  # step smaller than a row
        (4, 4, 12, 47),  # truncated
        (4, 4, 12, 49),  # too long
        (4, 4, 12, 0),
        (0, 4, 12, 0),
        (4, 0, 0, 0),
        (MAX_PIXELS, 2, 6, 6),  # a header that claims more than it carries
        (65536, 65536, 196608, 16),
        (1, 1, 2**31, 3),
    ],
)
def test_hostile_sizes_are_errors(height, width, step, size):
    with pytest.raises(ImageError):
        decode_color(bytes(size), height, width, step, "rgb8")


@settings(deadline=None, max_examples=200)
@given(
    st.binary(max_size=200),
    st.integers(-2, 2**32),
    st.integers(-2, 2**32),
    st.integers(-2, 2**32),
    st.sampled_from((*COLOR_ENCODINGS, "32FC1", "16UC1", "mono16", "", "nonsense")),
    st.booleans(),
)
def test_arbitrary_headers_decode_or_raise_image_error(data, height, width, step, encoding, big):
    for decode in (decode_color, decode_depth):
        try:
            out = decode(data, height, width, step, encoding, big)
        except ImageError:
            continue
        assert out.shape[:2] == (height, width)

"""Pairing by stamp: properties over random arrival orders, losses, delays and clock jumps."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.messages.sync import KEEP, CameraStreams, ObservationSync


def feed_joints(sync, until, start=0.0, rate=100.0):
    for k in range(int(start * rate), int(until * rate) + 2):
        sync.add_joints(k / rate, np.array([k / rate]), np.array([1.0]))


def complete(sync, stamp, skew=0.0):
    sync.add_color(stamp, ("color", stamp))
    sync.add_depth(stamp + skew, ("depth", stamp))
    sync.add_info(stamp, ("info", stamp))


def test_a_complete_set_is_taken_once():
    sync = ObservationSync()
    feed_joints(sync, 1.0)
    complete(sync, 0.5)
    pair = sync.take()
    assert (pair.stamp, pair.first.color, pair.first.depth) == (0.5, ("color", 0.5), ("depth", 0.5))
    np.testing.assert_allclose(pair.joints.position, 0.5)
    assert sync.take() is None
    assert sync.why_not() == "no new colour image"


def test_newest_wins_and_the_rest_is_counted():
    sync = ObservationSync()
    feed_joints(sync, 1.0)
    for stamp in (0.1, 0.15, 0.2):
        complete(sync, stamp)
    assert sync.take().stamp == 0.2
    assert sync.dropped["color: superseded"] == 2
    assert sync.take() is None


def test_an_incomplete_newest_does_not_hide_the_complete_one_before():
    sync = ObservationSync()
    feed_joints(sync, 1.0)
    complete(sync, 0.1)
    sync.add_color(0.2, None)
    assert sync.take().stamp == 0.1
    assert sync.why_not() == "no new depth image"
    sync.add_depth(0.3, None)
    assert sync.why_not() == "no depth image within 20 ms of the colour image (newest +0.100 s)"
    sync.add_depth(0.2, None)
    assert sync.take().stamp == 0.2


def test_without_depth():
    sync = ObservationSync(cameras=[CameraStreams(depth=False)])
    feed_joints(sync, 1.0)
    sync.add_color(0.5, "c")
    sync.add_info(0.5, "i")
    assert sync.take().first.depth is None


def test_why_not_names_what_is_missing():
    sync = ObservationSync()
    assert sync.why_not() == "no colour image"
    sync.add_color(0.5, None)
    assert sync.why_not() == "no depth image"
    sync.add_depth(0.5, None)
    assert sync.why_not() == "no camera_info"
    sync.add_info(0.5, None)
    assert sync.why_not() == "no joint_states"
    feed_joints(sync, 0.3)
    assert sync.why_not().startswith("no joint_states around")
    feed_joints(sync, 0.6, start=0.3)
    assert sync.why_not() == ""


def test_a_lost_camera_info_costs_no_frame():
    sync = ObservationSync()
    feed_joints(sync, 1.0)
    complete(sync, 0.1)
    sync.take()
    sync.add_color(0.2, None)
    sync.add_depth(0.2, None)
    assert sync.take().first.info == ("info", 0.1)


def test_clock_set_back_drops_everything_and_starts_anew():
    sync = ObservationSync()
    feed_joints(sync, 10.0)
    complete(sync, 9.0)
    assert sync.take().stamp == 9.0
    sync.add_color(0.05, "new")
    assert sync.jumps == 1
    sync.add_depth(0.05, "new")
    sync.add_info(0.05, "new")
    assert sync.take() is None  # joints of the old time do not count
    feed_joints(sync, 0.2)
    assert sync.take().first.color == "new"
    assert sync.jumps == 1


def test_joints_alone_notice_the_clock():
    sync = ObservationSync()
    feed_joints(sync, 5.0)
    complete(sync, 4.0)
    sync.add_joints(0.0, np.zeros(1), None)
    assert sync.jumps == 1 and sync.take() is None


kinds = st.sampled_from(["color", "depth", "info", "joints", "take"])
messages = st.lists(st.tuples(kinds, st.integers(0, 40), st.floats(-0.03, 0.03)), max_size=120)


@settings(deadline=None, max_examples=150)
@given(messages, st.booleans())
def test_any_stream_keeps_the_promises(events, use_depth):
    """Bounded memory, pairs within slop, stamps strictly rising between jumps, and every message accounted for."""
    sync = ObservationSync(slop=0.02, cameras=[CameraStreams(depth=use_depth)], jump_back=0.5)
    last, jumps, colors = -np.inf, 0, 0
    for kind, tick, jitter in events:
        stamp = tick * 0.05 + (jitter if kind == "depth" else 0.0)
        if kind == "take":
            pair = sync.take()
            if pair is None:
                continue
            if sync.jumps != jumps:
                last, jumps = -np.inf, sync.jumps
            assert pair.stamp > last
            last = pair.stamp
            frame = pair.first
            assert frame.color == pair.stamp
            if use_depth:
                assert abs(frame.depth - pair.stamp) <= 0.02 + 1e-9
                assert abs(frame.depth_skew - (frame.depth - pair.stamp)) < 1e-12
            assert abs(frame.info - pair.stamp) <= 1.0 + 1e-9
            np.testing.assert_allclose(pair.joints.position, pair.stamp, atol=1e-9)
        elif kind == "joints":
            sync.add_joints(stamp, np.array([stamp]), np.array([1.0]))
        else:
            colors += kind == "color"
            getattr(sync, f"add_{kind}")(stamp, stamp)
        assert all(len(stream) <= KEEP for stream in sync._streams.values())
    counted = sum(n for reason, n in sync.dropped.items() if reason.startswith("color"))
    lost_to_jumps = colors - counted - sync.taken - len(sync._streams["camera", "color"])
    assert lost_to_jumps >= 0 and (sync.jumps > 0 or lost_to_jumps == 0)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0, 0.3), st.floats(0.0, 0.09))
def test_with_losses_and_delays_the_newest_possible_is_always_taken(seed, loss, delay):
    """A stream at 20 Hz with random losses and delays: what is taken lags the newest complete set by nothing."""
    random = np.random.default_rng(seed)
    arrivals = []
    for k in range(60):
        stamp = k * 0.05
        for kind in ("color", "depth", "info"):
            if random.random() >= loss:
                arrivals.append((stamp + random.uniform(0, delay), kind, stamp))
    sync = ObservationSync()
    seen = {"color": set(), "depth": set(), "info": set()}
    best, joints_until = -np.inf, 0.0
    for arrival, kind, stamp in sorted(arrivals):
        feed_joints(sync, arrival + 0.02, start=joints_until)
        joints_until = arrival
        getattr(sync, f"add_{kind}")(stamp, stamp)
        seen[kind].add(stamp)
        pair = sync.take()
        possible = [s for s in seen["color"] & seen["depth"] if s > best and seen["info"]]
        if possible:
            assert pair is not None and pair.stamp == max(possible)
            best = pair.stamp
        else:
            assert pair is None


TWO = (CameraStreams("front"), CameraStreams("wrist", depth=False, info=False))


def test_two_cameras_one_of_colour_alone_are_paired_by_stamp():
    sync = ObservationSync(slop=0.02, cameras=TWO)
    feed_joints(sync, 1.0)
    sync.add_color(0.5, "front", "front")
    assert sync.why_not() == "no front depth image"
    sync.add_depth(0.51, "depth", "front")
    sync.add_info(0.5, "info", "front")
    assert sync.why_not() == "no wrist colour image" and sync.take() is None
    sync.add_color(0.45, "early", "wrist")
    apart = "no wrist colour image within 20 ms of the front colour image (newest -0.050 s)"
    assert sync.why_not() == apart and sync.take() is None
    sync.add_color(0.485, "wrist", "wrist")
    sync.add_depth(0.485, "not awaited", "wrist")
    pair = sync.take()
    assert list(pair.frames) == ["front", "wrist"] and pair.stamp == 0.5 == pair.joints.stamp
    front, wrist = pair.frames.values()
    assert (front.color, front.depth, front.info) == ("front", "depth", "info")
    assert (wrist.color, wrist.depth, wrist.info, wrist.stamp) == ("wrist", None, None, 0.485)
    assert sync.dropped == {"wrist color: superseded": 1} and sync.unused_images() == 1
    assert sync.why_not() == "no new front colour image"


streams = st.sampled_from(["front", "wrist", "front depth", "front info", "joints", "take"])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(streams, st.integers(0, 40), st.floats(-0.03, 0.03)), max_size=150))
def test_any_streams_of_two_cameras_keep_the_promises(events):
    """As for one camera: bounded memory, within slop, rising stamps, and every image accounted for."""
    sync = ObservationSync(slop=0.02, cameras=TWO, jump_back=0.5)
    last, jumps, images, used = -np.inf, 0, 0, 0
    for kind, tick, jitter in events:
        stamp = tick * 0.05 + (jitter if kind in ("wrist", "front depth") else 0.0)
        camera, _, what = kind.partition(" ")
        if kind == "take":
            pair = sync.take()
            if pair is None:
                continue
            if sync.jumps != jumps:
                last, jumps = -np.inf, sync.jumps
            assert pair.stamp > last
            last, used = pair.stamp, used + 2
            front, wrist = pair.frames["front"], pair.frames["wrist"]
            assert front.color == front.stamp == pair.stamp and wrist.color == wrist.stamp
            assert abs(wrist.stamp - front.stamp) <= 0.02 + 1e-9 and abs(front.depth - front.stamp) <= 0.02 + 1e-9
            assert abs(front.info - front.stamp) <= 1.0 + 1e-9 and wrist.depth is None is wrist.info
        elif kind == "joints":
            sync.add_joints(stamp, np.array([stamp]), np.array([1.0]))
        elif what:
            getattr(sync, f"add_{what}")(stamp, stamp, camera)
        else:
            images += 1
            sync.add_color(stamp, stamp, camera)
        assert all(len(stream) <= KEEP for stream in sync._streams.values())
    waiting = sum(len(stream) for (_, kind), stream in sync._streams.items() if kind == "color")
    lost_to_jumps = images - sync.unused_images() - used - waiting
    assert lost_to_jumps >= 0 and (sync.jumps > 0 or lost_to_jumps == 0)

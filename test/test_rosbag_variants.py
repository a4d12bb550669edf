"""MCAP files as other writers leave them, and the test bags of rosbag2 with the same things left out."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import mcap_variants
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vla_nodes.rosbag import mcap_records
from vla_nodes.rosbag.message_definitions import topic
from vla_nodes.rosbag.read import BagError, open_bag, typestore
from vla_nodes.rosbag.repair import Scan

TEXT = "std_msgs/msg/String"
ROOT = Path(__file__).resolve().parents[1]
PUBLIC = next((f for f in (p / "shared/bags" for p in ROOT.parents) if f.is_dir()), None)
"""Recordings from rosbag2's own tests, where the checkout has them near it."""


def text(value: str) -> bytes:
    store = typestore()
    return bytes(store.serialize_cdr(store.types[TEXT](data=value), TEXT))


def rows(seed: int = 0, count: int = 130) -> list[mcap_variants.Row]:
    """Messages of three topics whose log times go back now and then, also across the borders of chunks."""
    random_, topics = random.Random(seed), [topic(f"/t{k}", TEXT) for k in range(3)]
    return [
        (random_.choice(topics), 10**9 + k * 1000 + random_.randrange(30_000), text(str(k) * random_.randrange(20)))
        for k in range(count)
    ]


def in_order(made: list[mcap_variants.Row]) -> list[tuple[str, int, bytes]]:
    return sorted(((t.name, stamp, data) for t, stamp, data in made), key=lambda row: row[1])


def same(got, expected) -> None:
    """The same messages, by time; those of one time in any order."""
    assert [row[1] for row in got] == [row[1] for row in expected]
    assert sorted(got) == sorted(expected)


@pytest.mark.parametrize("compression", mcap_records.COMPRESSIONS)
@pytest.mark.parametrize("option", mcap_variants.OPTIONS)
def test_what_a_writer_may_leave_out_is_found_out(tmp_path, option, compression):
    made = rows()
    with open_bag(mcap_variants.write(tmp_path / "a.mcap", made, [option], compression)) as bag:
        same(list(bag.raw()), in_order(made))
        assert sum(bag.counts.values()) == len(made) and not bag.notes
        assert (bag.start, bag.end) == (in_order(made)[0][1], in_order(made)[-1][1])
        assert set(bag.readable()) == {"/t0", "/t1", "/t2"}
        same(list(bag.raw(["/t1"])), [row for row in in_order(made) if row[0] == "/t1"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    no=st.sets(st.sampled_from(mcap_variants.OPTIONS)),
    compression=st.sampled_from(mcap_records.COMPRESSIONS),
    per=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_whatever_is_left_out_together(tmp_path, no, compression, per, seed):
    made = rows(seed, 50)
    with open_bag(mcap_variants.write(tmp_path / "a.mcap", made, no, compression, per)) as bag:
        same(list(bag.raw()), in_order(made))


def test_stamps_beyond_all_years_are_read(tmp_path):
    declared = topic("/a", TEXT)
    made = [(declared, stamp, text("x")) for stamp in (0, 2**63, 2**64 - 1)]
    with open_bag(mcap_variants.write(tmp_path / "a.mcap", made)) as bag:
        assert [stamp for _, stamp, _ in bag.messages()] == [0, 2**63, 2**64 - 1]


# -- the test bags of rosbag2 --------------------------------------------------------------------------------------
TOPICS = {
    "talker": {"/rosout": 10, "/topic": 10, "/parameter_events": 0},
    "wbag": {"AAA": 804, "BBB": 742, "CCC": 742, "DDD": 753, "EEE": 804, "FFF": 772, "GGG": 731, "HHH": 726},
    "cdr_test": {"/test_topic": 3, "/array_topic": 4},
}
public = pytest.mark.skipif(PUBLIC is None, reason="the test bags of rosbag2 are not here")
BAGS = [("mcap", "talker"), ("mcap", "wbag"), ("mcap", "cdr_test"), ("sqlite3", "talker"), ("sqlite3", "wbag")]


@public
@pytest.mark.parametrize("storage, name", BAGS)
def test_a_bag_of_rosbag2_opens_with_and_without_metadata(tmp_path, storage, name):
    with open_bag(PUBLIC / storage / name) as bag:
        assert bag.counts == TOPICS[name]
        expected = list(bag.raw())
        assert len(expected) == sum(TOPICS[name].values()) or bag.notes
    folder = tmp_path / name
    folder.mkdir()
    for file in (PUBLIC / storage / name).iterdir():
        if file.name != "metadata.yaml":
            shutil.copyfile(file, folder / file.name)
    with open_bag(folder) as bag:
        same(list(bag.raw()), expected)
        assert bag.counts == TOPICS[name] and "no metadata.yaml" in bag.notes[0]


@public
@pytest.mark.parametrize("name", TOPICS)
@pytest.mark.parametrize("no", [[], *([option] for option in mcap_variants.OPTIONS), ["noSummary", "noChunking"]])
def test_a_bag_of_rosbag2_with_something_left_out_gives_the_same(tmp_path, name, no):
    made = []
    for file in sorted((PUBLIC / "mcap" / name).glob("*.mcap")):
        made += [(item.topic, item.message.log_time, item.message.data) for item in Scan(file)]
    with open_bag(mcap_variants.write(tmp_path / f"{name}.mcap", made, no)) as bag:
        same(list(bag.raw()), in_order(made))
        assert bag.counts == {topic: count for topic, count in TOPICS[name].items() if count}


@public
def test_what_the_bags_of_rosbag2_lack_is_one_line():
    with pytest.raises(BagError, match=r"the bag holds no messages \(2 topics\)"):
        open_bag(PUBLIC / "sqlite3/empty_bag")
    with open_bag(PUBLIC / "mcap/cdr_test") as bag:
        assert bag.readable() == []
        with pytest.raises(BagError, match="test_msgs/msg/BasicTypes, which is no type of ROS 2 Jazzy or of vla_nodes"):
            bag.check("/test_topic")

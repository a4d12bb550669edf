"""The sample bag of the repository: small, complete, and replayed to the golden result."""

from pathlib import Path

import pytest

from vla_nodes.replay import cli
from vla_nodes.rosbag.read import open_bag
from vla_nodes.rosbag.repair import Scan

FOLDER = Path(__file__).resolve().parent.parent / "resource/bags"
BAG, GOLDEN = FOLDER / "pick_red_block", FOLDER / "pick_red_block.golden.json"


def test_the_sample_is_small_and_whole():
    assert sum(file.stat().st_size for file in BAG.iterdir()) <= 5_000_000
    (file,) = BAG.glob("*.mcap")
    scan = Scan(file)
    assert all(item.topic.definition for item in scan)
    assert scan.found.intact
    names = {name for name, _ in scan.metadata}
    assert {"parameters/policy_node", "parameters/action_node", "checkpoint", "robot_description"} <= names
    with open_bag(BAG) as bag:
        assert not bag.notes and bag.duration > 4 and bag.custom["outcome"] == "success"
        frames = bag.counts["/camera/color/image_raw"]
        assert frames == bag.counts["/camera/aligned_depth_to_color/image_raw"] > 15 * bag.duration


@pytest.mark.timeout(900)
def test_golden_replay(tmp_path, capsys):
    """After new weights: python tools/sample_bag.py (see its docstring)."""
    status = cli.main([str(BAG), "--golden", str(GOLDEN), "--out", str(tmp_path)])
    assert status == 0, capsys.readouterr().out[-2000:]

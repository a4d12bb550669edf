"""Replay: the whole way from a recording to report, golden file and exit status, on short simulated recordings."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import replay_support as support
from rosbags.rosbag2 import CompressionMode, StoragePlugin
from safetensors.numpy import load_file, save_file

from vla_nodes.control.trajectory import sample
from vla_nodes.messages.convert import trajectory_from
from vla_nodes.replay import golden
from vla_nodes.replay.cli import main
from vla_nodes.rosbag.read import open_bag


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A recording of 2 s, a small policy, and the golden file of the one with the other."""
    folder = tmp_path_factory.mktemp("replay")
    support.write(folder / "bag", support.recording())
    support.write_checkpoint(folder / "policy")
    assert replay(folder, "--golden", folder / "golden.json", "--update") == 0
    return folder


def replay(folder, *arguments, bag="bag", policy="policy", out="report"):
    words = [str(folder / bag), "--checkpoint", str(folder / policy), "--out", str(folder / out)]
    words += [] if "--engine" in arguments else ["--engine", "torch"]
    words += ["--set", "action_node.tracking_tolerance=3.0"]  # the recorded arm does not follow: nobody resumes here
    return main([*words, *(str(a) for a in arguments)])


def test_the_report_says_what_happened(world):
    made = json.loads((world / "report/report.json").read_text())
    assert made["complete"] and made["messages"]["color"] == 40
    assert 18 <= made["policy"]["steps"] <= 21
    assert made["policy"]["chunks"] == made["policy"]["steps"] - 2  # the first two are for looking
    assert made["chunks"]["carried_out"] + sum(made["chunks"]["refused"].values()) == made["policy"]["chunks"]
    assert made["chunks"]["carried_out"] >= 5
    assert made["frames"]["paired"] >= made["policy"]["steps"]
    assert made["seams"]["seam_position"]["max"] < 1e-3 < made["seams"]["gap"]["max"]
    assert 0 < made["commanded_minus_recorded_rad"]["panda_joint1"]["max"] < 1.0
    clock = json.loads((world / "report/timings.json").read_text())
    assert clock["stages_ms"]["policy"]["p50"] > 0 and clock["stages_ms"]["executor"]["p50"] > 0
    assert (world / "report/timeline.png").read_bytes().startswith(b"\x89PNG")


def test_the_results_are_a_bag_beside_the_recorded_topics(world):
    with open_bag(world / "report/bag") as bag:
        assert bag.topics["/replay/vla/action_chunk"] == "vla_nodes/msg/ActionChunk"
        assert {"/joint_states", "/instruction", "/arm_controller/joint_trajectory"} <= bag.topics.keys()
        assert "/camera/color/image_raw" not in bag.topics
        made = json.loads((world / "report/report.json").read_text())
        assert bag.counts["/replay/vla/action_chunk"] == made["policy"]["chunks"]
        arms = [m for _, _, m in bag.messages(["/replay/arm_controller/joint_trajectory"])]
        plans = [trajectory_from(m) for m in arms]
        for before, after in zip(plans, plans[1:], strict=False):  # each begins where the one before is then
            at = after.stamp + float(after.times[0])
            assert np.abs(after.positions[0] - sample(before, at - before.stamp)[0]).max() < 1e-3
            assert np.abs(after.velocities[-1]).max() < 1e-9
        stamps = [t for _, t, _ in bag.messages(["/replay/vla/status"])]
        assert bag.start <= stamps[0] and stamps == sorted(stamps)


def test_three_replays_give_the_same_bytes_whatever_the_load(world):
    import threading

    stop = threading.Event()
    for out in ("again", "loaded"):
        if out == "loaded":
            for _ in range(3):
                threading.Thread(target=lambda: [np.linalg.svd(np.eye(60)) for _ in iter(stop.is_set, True)]).start()
        try:
            assert replay(world, out=out) == 0
        finally:
            if out == "loaded":
                stop.set()
        for file in ("report.json", "timeline.png", "bag/bag.mcap", "bag/metadata.yaml"):
            assert (world / out / file).read_bytes() == (world / "report" / file).read_bytes(), (out, file)


def test_golden_is_equal_to_itself_and_names_no_place_of_this_machine(world, capsys):
    assert replay(world, "--golden", world / "golden.json", out="equal") == 0
    assert "equal to" in capsys.readouterr().out
    assert str(world) not in (world / "golden.json").read_text()


def differs(world, capsys, *words, status=1, **places):
    assert replay(world, "--golden", world / "golden.json", out="differs", **places) == status
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("golden: ")]
    assert said
    for word in words:
        assert any(word in line for line in said), said
    return said


def changed_bag(world, name, change):
    shutil.rmtree(world / name, ignore_errors=True)
    (world / name).mkdir()
    return support.write(world / name / "bag", support.recording(), change=change)


def test_golden_names_the_dropped_frame(world, capsys):
    frames = [row for row in support.recording() if row[0] == support.COLOR]
    victim = frames[20]
    changed_bag(world, "dropped", lambda row: [] if row is victim else [row])
    stamp = victim[3].header.stamp
    differs(world, capsys, f"{support.COLOR}: the message stamped {stamp.sec}.{stamp.nanosec:09d} is missing",
            bag="dropped/bag")  # fmt: skip


def test_golden_names_the_changed_stamp(world, capsys):
    joints = [row for row in support.recording() if row[0] == support.JOINTS]
    victim = joints[100]
    topic, kind, received, message = victim
    before = message.header.stamp
    moved = support.joint_state(message.name, message.position, message.velocity,
                                before.sec * 10**9 + before.nanosec + 1000)  # fmt: skip
    changed_bag(world, "moved", lambda row: [(topic, kind, received, moved)] if row is victim else [row])
    expected = f"stamp expected {before.sec}.{before.nanosec:09d}, got {before.sec}.{before.nanosec + 1000:09d}"
    differs(world, capsys, support.JOINTS, expected, bag="moved/bag")


def test_golden_names_a_changed_pixel(world, capsys):
    frames = [row for row in support.recording() if row[0] == support.DEPTH]
    victim = frames[5]
    topic, kind, received, message = victim
    raw = bytearray(support.STORE.serialize_cdr(message, kind))
    raw[-100] ^= 1
    changed_bag(world, "pixel", lambda row: [(topic, kind, received, bytes(raw))] if row is victim else [row])
    differs(world, capsys, f"{support.DEPTH}: the message stamped", "other contents", bag="pixel/bag")


def test_golden_names_the_tensor_of_one_changed_bit(world, capsys):
    shutil.copytree(world / "policy", world / "flipped/policy")
    file = world / "flipped/policy/model.safetensors"
    data = bytearray(file.read_bytes())
    names = sorted(golden.tensor_checksums(file))
    victim = next(name for name in names if name.startswith("core"))
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[victim]
    data[8 + length + entry["data_offsets"][0]] ^= 1
    file.write_bytes(data)
    said = differs(world, capsys, f"weights: tensor {victim} differs", policy="flipped/policy")
    assert sum("weights" in line for line in said) == 1


def test_golden_names_stamp_joint_expected_and_got(world, capsys):
    """A policy that moves otherwise: besides its weights, what it commands is named."""
    shutil.copytree(world / "policy", world / "other/policy")
    file = world / "other/policy/model.safetensors"
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(file)
    tensors["head.shared.bias"] = tensors["head.shared.bias"] + torch.tensor(0.01, dtype=torch.bfloat16)
    save_torch(tensors, file)
    said = differs(world, capsys, "weights: tensor head.shared.bias", "action row", policy="other/policy")
    line = next(line for line in said if "panda_joint" in line)
    assert "expected" in line and "got" in line and "rad apart" in line and "stamp 1760" in line


def test_golden_tolerates_rounding_of_another_machine_and_no_more(world):
    def other(scale):
        made = golden.read(world / "golden.json")
        made["environment"] = {**made["environment"], "processor": "another one"}
        made["commands"] = made["commands"] + scale
        return made

    now = golden.read(world / "golden.json")
    assert golden.differences(other(0.5 * golden.TOLERANCE), now) == []
    (line,) = golden.differences(other(2.0 * golden.TOLERANCE), now)
    assert "panda_joint1: expected" in line and "allowed 0.001" in line
    same = golden.read(world / "golden.json")
    same["commands"] = same["commands"] + 1e-12
    assert golden.differences(same, now) != []


def test_golden_names_a_changed_setting(world, capsys):
    assert replay(world, "--golden", world / "golden.json", "--latency", "0.07", out="differs") == 1
    assert "setting latency_s: expected 0.05, got 0.07" in capsys.readouterr().out
    assert replay(world, "--golden", world / "golden.json", "--set", "policy_node.slop=0.03", out="differs") == 1
    assert "setting policy_node.slop: expected 0.02, got 0.03" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', '{"format": 7}', "x" * 100, '{"a": {"dtype": "q"}}'])
def test_a_broken_golden_file_is_one_line(world, tmp_path, capsys, text):
    (tmp_path / "broken.json").write_text(text)
    assert replay(world, "--golden", tmp_path / "broken.json") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert replay(world, "--golden", tmp_path / "absent.json") == 2
    assert "--update" in capsys.readouterr().err


def test_loops_give_the_same_results_in_flat_memory(world, capsys):
    assert replay(world, "--loop", "4", out="loop") == 0
    said = [line.split(" s, ")[1] for line in capsys.readouterr().out.splitlines() if "MiB" in line]
    memory = [[int(part.split()[0]) for part in line.split(", ")] for line in said]
    assert len(memory) == 3 and memory[-1][0] - memory[0][0] < 16 and all(first > 50 for _, first in memory)


def test_two_checkpoints_side_by_side(world, capsys):
    support.write_checkpoint(world / "second/other", seed=1)
    assert replay(world, "--compare", world / "second/other", out="compare") == 0
    made = json.loads((world / "compare/compare.json").read_text())["difference"]
    assert made["both_acted"] > 10 and made["end_of_chunk_apart"]["max"] > 0
    assert made["commanded_joints_apart_rad"]["max"] > 0
    out = capsys.readouterr().out
    assert "policy " in out and "other " in out
    assert (world / "compare/first/report.json").is_file() and (world / "compare/second/timeline.png").is_file()
    assert replay(world, "--compare", world / "policy", out="same") == 0
    made = json.loads((world / "same/compare.json").read_text())["difference"]
    assert made["end_of_chunk_apart"]["max"] == 0 and made["commanded_joints_apart_rad"]["max"] == 0


def test_sqlite_and_mcap_of_every_compression_give_the_same_results(world):
    expected = (world / "report/report.json").read_text()
    kinds = [(StoragePlugin.SQLITE3, 9, CompressionMode.NONE), (StoragePlugin.MCAP, 9, CompressionMode.MESSAGE)]
    for k, (plugin, version, mode) in enumerate(kinds):
        support.write(world / f"kind{k}/bag", support.recording(), plugin, version, mode)
        assert replay(world, bag=f"kind{k}/bag", out=f"out{k}") == 0
        assert (world / f"out{k}/report.json").read_text() == expected


def test_compressed_images_are_replayed(world):
    import cv2

    kind = "sensor_msgs/msg/CompressedImage"

    def change(row):
        topic, _, received, message = row
        if topic == support.COLOR:
            pixels = message.data.reshape(message.height, message.width, 3)
            data = cv2.imencode(".png", pixels[:, :, ::-1])[1].reshape(-1)
            packed = support.make(kind, header=message.header, format="rgb8; png compressed bgr8", data=data)
            return [(f"{topic}/compressed", kind, received, packed)]
        if topic == support.DEPTH:
            metres = message.data.view("<f4").reshape(message.height, message.width)
            png = cv2.imencode(".png", np.rint(metres * 1000).astype(np.uint16))[1].reshape(-1)
            data = np.concatenate([np.zeros(12, np.uint8), png])
            packed = support.make(kind, header=message.header, format="16UC1; compressedDepth png", data=data)
            return [(f"{topic}/compressedDepth", kind, received, packed)]
        return [row]

    changed_bag(world, "packed", change)
    assert replay(world, bag="packed/bag", out="packed_out") == 0
    made = json.loads((world / "packed_out/report.json").read_text())
    first = json.loads((world / "report/report.json").read_text())
    assert made["policy"]["chunks"] == first["policy"]["chunks"] > 10
    assert any("compressedDepth" in note for note in made["notes"])


def test_safetensors_checksums_follow_the_values(tmp_path):
    save_file({"a": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    one = golden.tensor_checksums(tmp_path / "x.safetensors")
    values = load_file(tmp_path / "x.safetensors")
    values["b"] = values["b"].copy()
    values["b"][1] = 1e-30
    save_file(values, tmp_path / "x.safetensors")
    two = golden.tensor_checksums(tmp_path / "x.safetensors")
    assert one["a"] == two["a"] and one["b"] != two["b"]

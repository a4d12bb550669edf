"""A checkpoint comes back bit for bit in another process; anything else is refused in one line."""

import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from policy_tiny import CONFIG, CONTRACT, edit_config, observation, write_checkpoint
from safetensors.torch import load_file, save_file

from vla_nodes.policy import checkpoint
from vla_nodes.policy.checkpoint import CheckpointError
from vla_nodes.policy.runtime import PolicyRuntime

CHUNKS = """
import sys
sys.path[:0] = sys.argv[3:]
import numpy as np
from policy_tiny import observation
from vla_nodes.policy.runtime import PolicyRuntime
runtime = PolicyRuntime.load(sys.argv[1], "cpu", 1, "torch")
runtime.set_instruction("pick up the red block")
runtime.gate.start()
np.save(sys.argv[2], np.stack([runtime.step(observation(i)).actions for i in range(5)]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(folder, *words):
    """The one line it was refused with."""
    with pytest.raises(CheckpointError) as info:
        checkpoint.load(folder)
    line = str(info.value)
    assert "\n" not in line and len(line) < 1000, line
    for word in words:
        assert word in line, line
    return line


def test_fresh_process_gives_the_same_bits(saved, tmp_path):
    found = []
    for run in range(2):
        out = tmp_path / f"{run}.npy"
        tests = Path(__file__).parent
        subprocess.run([sys.executable, "-c", CHUNKS, str(saved), str(out), str(tests), str(tests.parent)], check=True)
        found.append(np.load(out))
    runtime = PolicyRuntime.load(saved, "cpu", 1, "torch")
    runtime.set_instruction("pick up the red block")
    runtime.gate.start()
    here = np.stack([runtime.step(observation(i)).actions for i in range(5)])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], here)
    assert np.ptp(here) > 0


def test_save_load_save_is_a_fixed_point(saved, tmp_path):
    model, config = checkpoint.load(saved)
    checkpoint.save(tmp_path / "again", model, config, saved / "tokenizer.json")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    again, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", saved))
    assert again == before
    assert config.contract == CONTRACT and config.policy == CONFIG


def test_mismatch_names_the_first_tensors(folder):
    edit_config(folder, policy__head_width=48)
    line = refused(folder, "head.trunk.0.weight is (32, ", "asks for (48, ", " more")
    assert line.count("asks for") == 3


def test_missing_and_unknown_tensors_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["strange.weight"] = tensors.pop("head.shared.bias")
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "head.shared.bias is missing", "strange.weight is unknown")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, name, "missing")


def test_missing_folder(tmp_path):
    refused(tmp_path / "none", "no such checkpoint folder")


@pytest.mark.parametrize("kept", [0, 5, 8, 200, 0.5, -1])
def test_truncated(folder, kept):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    refused(folder, "model.safetensors")


def forge(folder, change):
    """Rewrites the header and keeps the data."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


HUGE = 100 << 30


def claim_offsets(header):
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    begin = header[last]["data_offsets"][0]
    header[last] = {"dtype": "BF16", "shape": [HUGE // 2], "data_offsets": [begin, begin + HUGE]}


def claim_shape(header):
    header["head.shared.bias"]["shape"] = [HUGE // 2]


def overlap(header):
    a, b = header["head.shared.weight"], header["head.trunk.0.weight"]
    a["data_offsets"] = [b["data_offsets"][0], b["data_offsets"][0] + a["data_offsets"][1] - a["data_offsets"][0]]


@pytest.mark.parametrize("change", [claim_offsets, claim_shape, overlap])
def test_forged_headers_are_refused_before_memory_is_touched(folder, change):
    forge(folder, change)
    tracemalloc.start()
    refused(folder, "model.safetensors" if change is not overlap else str(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_header_that_claims_100_gb(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", HUGE) + path.read_bytes()[8:])
    refused(folder, "truncated or not a safetensors file")


def test_sparse_file_of_100_gb(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(HUGE)
    refused(folder, "100 GiB")


@pytest.mark.parametrize("data", [b"\x80\x04\x95pickle" * 100, b"PK\x03\x04" + bytes(5000), b"\x00" * 4096])
def test_foreign_weights(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["head.shared.bias"][3] = value
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "head.shared.bias", "NaN or infinite")


@pytest.mark.parametrize("text", ["", "{", "[" * 100000, "[]", '{"format": 99}', '"x"', '{"architectures": ["GPT2"]}'])
def test_foreign_config(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


@pytest.mark.parametrize("change", [
    {"policy__d_model": -1}, {"policy__d_model": "128"}, {"policy__n_layer": 60000}, {"policy__mixer": "lstm"},
    {"policy__language__n_layer": 1 << 19}, {"policy__vision_blocks": 60000}, {"policy__twin_of": "lstm"},
    {"policy__vision_widths": [1, 2]}, {"policy__vision_widths": ["a", "b", "c", "d"]}, {"policy__headdim": 0},
    {"policy__feature_width": 15}, {"policy__vision_widths": [4, 8, 8, 15]},
    {"policy__surprise": 1}, {"policy": None}, {"surprise": 1}], ids=str)  # fmt: skip
def test_nonsense_in_config(folder, change):
    edit_config(folder, **change)
    refused(folder, "config.json")


def test_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json")


def test_half_precision_on_disk_float32_in_memory(saved):
    stored = load_file(saved / "model.safetensors")["head.shared.weight"]
    model, _ = checkpoint.load(saved)
    assert stored.dtype == torch.bfloat16 and model.head.shared.weight.dtype == torch.float32
    assert torch.equal(stored.float(), model.head.shared.weight)

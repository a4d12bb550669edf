"""A checkpoint of vla_nodes 0.1 is refused with the command that converts it; converted, it is the shipped one."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import policy_tiny
import pytest
from safetensors.torch import load_file, save_file

from vla_nodes import cli
from vla_nodes.policy import checkpoint
from vla_nodes.policy.runtime import PolicyRuntime

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "resource/checkpoints/nano"
OLD_NAMES = {  # prefixes of format 2 and what format 1 had in their place
    "queries.appearance.": "roles.color.", "queries.category.": "roles.kind.", "queries.step_present.": "roles.wanted.",
    "queries.": "roles.", "vision.encoder.appearance.": "vision.encoder.look.",
    "vision.encoder.category.": "vision.encoder.shape.", "object_center.": "middle.", "placement_head.": "offset.",
    "feasibility_head.": "judge.", "embed_state.position.": "embed_state.", "embed_state.velocity.": "embed_change.",
    "embed_image.": "embed_view.", "embed_instruction.": "embed_summary.", "token_type": "kind",
    "head.decoders": "head.parts",
}  # fmt: skip


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools/convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def old_name(name):
    for prefix, old in OLD_NAMES.items():
        if name.startswith(prefix):
            return old + name.removeprefix(prefix)
    return name


@pytest.fixture
def old(tmp_path):
    """The shipped checkpoint as vla_nodes 0.1 wrote it."""
    folder = tmp_path / "old"
    folder.mkdir()
    new = json.loads((SHIPPED / "config.json").read_text())
    policy, contract = dict(new["policy"]), new["contract"]
    robot, actions = contract["robot"], contract["actions"]
    del policy["space"]
    policy |= {"free_roles": policy.pop("free_queries"), "horizon": actions["horizon"], "action_dim": 7, "joints": 7}
    config = {
        "format": 1, "policy": policy, "provenance": new["provenance"], "joint_names": robot["joints"],
        "gripper_joint": robot["grippers"][0]["joint"], "action_space": "ee_delta", "period": actions["period"],
        "tick": contract["tick"], "camera": contract["cameras"][0]["name"],
        "depth_range": contract["cameras"][0]["depth_range"], "tool_frame": robot["tool_frame"],
        "base_frame": robot["base_frame"], "gripper_polarity": "0 closed, 1 open",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {old_name(name): tensor for name, tensor in load_file(SHIPPED / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(SHIPPED / "tokenizer.json", folder)
    return folder


def test_it_is_refused_with_the_command_that_converts_it(old):
    with pytest.raises(checkpoint.CheckpointError, match=r"python tools/convert_checkpoint\.py"):
        checkpoint.load(old)


@pytest.mark.parametrize("in_place", [False, True])
def test_it_is_converted_to_the_shipped_one(tool, old, tmp_path, in_place):
    out = old if in_place else tmp_path / "new"
    tool.convert(old, out)
    assert json.loads((out / "config.json").read_text()) == json.loads((SHIPPED / "config.json").read_text())
    found, shipped = load_file(out / "model.safetensors"), load_file(SHIPPED / "model.safetensors")
    assert set(found) == set(shipped) and all(found[name].equal(tensor) for name, tensor in shipped.items())
    checkpoint.load(out)


def test_the_command_writes_one_that_gives_the_same_chunks(tool, old, tmp_path, capsys):
    assert cli.main(tool.command, [str(old), "--out", str(tmp_path / "new")]) == 0
    chunks = []
    for folder in (SHIPPED, tmp_path / "new"):
        runtime = PolicyRuntime.load(folder, "cpu", 1, "torch")
        runtime.set_instruction("pick up the red block")
        runtime.gate.start()
        chunks.append([runtime.step(policy_tiny.observation(tick)).actions for tick in range(3)])
    np.testing.assert_array_equal(*chunks)
    assert cli.main(tool.command, [str(tmp_path / "new")]) == cli.ExitStatus.USAGE  # it is of format 2 now
    assert "this tool converts format 1" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"format": 2}, {"action_space": "joint_delta"}, {"period": None}])
def test_what_it_cannot_convert_it_leaves_alone(tool, old, change):
    path = old / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = path.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"config\.json"):
        tool.convert(old, old)
    assert path.read_bytes() == before

"""A policy for any contract: other arms, cameras and actions, with random weights; nothing here knows a task family."""

import dataclasses
import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_tiny import CONFIG as TARGETS
from policy_tiny import CONTRACT as WITH_TARGETS
from policy_tiny import edit_config, tiny_model, write_checkpoint

from vla_nodes.policy import checkpoint
from vla_nodes.policy.configuration import preset
from vla_nodes.policy.contract import Actions, Camera, Contract, Gripper, Robot, StateVector, parse, plain
from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.inference import graphs
from vla_nodes.policy.mamba import mixers
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.policy.processing import CameraImage, Observation, StateLayout, state_vectors
from vla_nodes.policy.runtime import PolicyRuntime

CONFIG = dataclasses.replace(
    preset("nano-general"), image_size=64, vision_widths=(4, 8, 8, 16), feature_width=16, free_queries=3, d_model=32,
    n_layer=2, d_state=8, headdim=16, head_width=32, language=TARGETS.language)  # fmt: skip
FRONT = Camera(name="front", depth="required", pose="known")
WRIST = Camera(name="wrist", depth="none", pose="unknown")
JOINTS = tuple(f"{name}_joint" for name in ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3"))
SPACES = {"ee_delta": ("dx", "dy", "dz", "rx", "ry", "rz"), "joint_delta": JOINTS}


def contract(space="joint_delta", cameras=(FRONT,), grippers=(), before=0, state=None, horizon=5) -> Contract:
    """A UR5e's, one gripper's column behind `before` of those that move the arm, another's before the last."""
    names = tuple(gripper.name for gripper in grippers)
    motion = SPACES[space]
    columns = (*motion[:before], *names[:1], *motion[before:-1], *names[1:], *motion[-1:])
    vectors = (
        StateVector(name="joint_positions", size=6, unit="rad", offset=(0.0, -1.5, 1.5, 0.0, 0.0, 0.0), scale=2.0),
        StateVector(name="tool_position", size=3, unit="m", offset=(0.4, 0.0, 0.3), scale=(0.3, 0.4, 0.3)),
        StateVector(name="joint_velocities", size=6, unit="rad/s", token="velocity"),
    )
    if names:
        vectors += (StateVector(name="gripper", size=len(names), offset=0.5, scale=0.5),)
    return Contract(
        robot=Robot(name="ur5e", joints=JOINTS, base_frame="base_link", tool_frame="tool0", grippers=grippers),
        state=vectors if state is None else state,
        actions=Actions(space=space, columns=columns, scale=tuple(1.0 if c in names else 0.02 for c in columns),
                        offset=None if names else (0.001,) * len(columns), grippers=names, horizon=horizon,
                        period=0.1),
        cameras=cameras,
        tick=0.2,
    )  # fmt: skip


LEFT, RIGHT = (Gripper(name=name, joint=f"{name}_finger", closed=0.8, open=0.0) for name in ("left", "right"))
CONTRACTS = {
    "six joints, no gripper": contract(),
    "Cartesian": contract("ee_delta"),
    "two cameras, one of colour alone": contract("ee_delta", (FRONT, WRIST)),
    "colour alone": contract(cameras=(WRIST,)),
    "depth without a pose": contract(cameras=(Camera(name="hand", depth="optional", pose="unknown"),)),
    "two grippers, one of them first": contract(grippers=(LEFT, RIGHT)),
    "two grippers, amid the motion": contract("ee_delta", grippers=(LEFT, RIGHT), before=3),
    "no proprioception": contract(state=()),
    "a vector that the data bring": contract(state=(StateVector(name="force", size=2, scale=10.0),), horizon=1),
}

SHIFTED = np.eye(4)
SHIFTED[:3, 3] = 0.1


def observation(of: Contract, tick: int, seed: int = 0, size: int = 64) -> Observation:
    g = np.random.default_rng([seed, tick])
    down = np.array([[0, -0.6, 0.8, -0.1], [-1, 0, 0, 0.02], [0, -0.8, -0.6, 0.7], [0, 0, 0, 1]], np.float64)
    pose, images = np.eye(4), {}
    pose[:3, 3] = 0.4, 0.01 * tick, 0.3
    for camera in of.cameras:
        images[camera.name] = CameraImage(
            g.integers(0, 256, (size, size, 3), dtype=np.uint8),
            None if camera.depth == "none" else g.uniform(0.3, 2.0, (size, size)).astype(np.float32),
            np.array([[58.0, 0, size / 2], [0, 58.0, size / 2], [0, 0, 1]]),
            down if camera.pose == "known" else None)  # fmt: skip
    joints, velocities = g.normal(0, 0.5, 6), g.normal(0, 0.5, 6)
    extra = {v.name: g.normal(0, 1, v.size) for v in of.state if v.name == "force"}
    return Observation(0.2 * tick, images, joints, velocities, g.uniform(size=len(of.robot.grippers)), pose, extra)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("general")
    return {
        name: write_checkpoint(folder / str(i), CONFIG, contract=c) for i, (name, c) in enumerate(CONTRACTS.items())
    }


def run(folder, ticks=4, seed=0, text="pick up the red block", **changes):
    runtime = PolicyRuntime.load(folder, "cpu", 1, "torch")
    runtime.set_instruction(text)
    seen = [dataclasses.replace(observation(runtime.config.contract, i, seed), **changes) for i in range(ticks)]
    return [runtime.step(o) for o in seen]


@pytest.mark.parametrize("name", CONTRACTS)
def test_it_loads_and_gives_chunks_in_the_columns_of_its_contract(folders, name):
    """The same ones in every run, from the first tick on; another instruction or history gives others."""
    actions = CONTRACTS[name].actions
    first, again = run(folders[name]), run(folders[name])
    for out, other in zip(first, again, strict=True):
        assert out.actions.shape == (actions.horizon, actions.size) and np.isfinite(out.actions).all()
        assert np.array_equal(out.actions, other.actions) and out.hold_reason == ""
        assert np.isnan(out.feasibility) and np.isnan(out.done) and np.isnan(out.target).all() and out.primitive == ""
    openings = first[-1].actions[:, list(actions.gripper_columns)]
    assert ((openings > 0) & (openings < 1)).all()
    assert not np.allclose(first[-1].actions, run(folders[name], text="open the drawer")[-1].actions, atol=1e-7)
    fresh = PolicyRuntime.load(folders[name], "cpu", 1, "torch")
    fresh.set_instruction("pick up the red block")
    alone = fresh.step(observation(CONTRACTS[name], 3))  # without the history
    assert not np.allclose(first[-1].actions, alone.actions, atol=1e-7)


@pytest.mark.parametrize("name", CONTRACTS)
def test_what_the_contract_asks_for_matters(folders, name):
    """Every camera's colour and depth, every state vector: another one is another chunk."""
    of = CONTRACTS[name]
    plain_chunk = run(folders[name], 1)[0].actions
    for camera in of.cameras:
        image = observation(of, 0).cameras[camera.name]
        changes = [dataclasses.replace(image, color=255 - image.color)]
        if image.depth is not None:
            changes.append(dataclasses.replace(image, depth=image.depth + 0.3))
        if image.pose is not None:
            changes.append(dataclasses.replace(image, pose=image.pose @ SHIFTED))
        for changed in changes:
            images = {**observation(of, 0).cameras, camera.name: changed}
            assert not np.allclose(run(folders[name], 1, cameras=images)[0].actions, plain_chunk, atol=1e-8)
    given = state_vectors(observation(of, 0), None)
    for vector in of.state:
        changed = {vector.name: np.asarray(given[vector.name]) + 0.3}
        assert not np.allclose(run(folders[name], 1, vectors=changed)[0].actions, plain_chunk, atol=1e-8), vector.name


@pytest.mark.parametrize(("name", "change", "words"), [
    ("two cameras, one of colour alone", {"cameras": {}}, "camera front"),
    ("six joints, no gripper", {"joint_positions": np.zeros(7)}, "joint_positions"),
    ("a vector that the data bring", {"vectors": {}}, "force"),
])  # fmt: skip
def test_what_an_observation_lacks_is_named(folders, name, change, words):
    with pytest.raises(ValueError, match=words):
        run(folders[name], 1, **change)


@pytest.mark.parametrize(("change", "words"), [
    ({"depth": None}, "camera front has no depth"), ({"pose": None}, "camera front has no pose"),
    ({"intrinsics": None}, "camera front has no pose or no calibration"),
    ({"color": np.zeros((64, 64), np.uint8)}, "uint8"),
])  # fmt: skip
def test_what_an_image_lacks_is_named(folders, change, words):
    name = "two cameras, one of colour alone"
    images = observation(CONTRACTS[name], 0).cameras
    with pytest.raises(ValueError, match=words):
        run(folders[name], 1, cameras={**images, "front": dataclasses.replace(images["front"], **change)})


def joined(values, size=1):
    """Values of several ticks or streams as one, along that axis."""
    rest = [iter(engines.flatten(value)) for value in values[1:]]
    return mixers.map_state(lambda x: torch.cat([x, *(next(other) for other in rest)], size), values[0])


@pytest.mark.parametrize("name", CONTRACTS)
@torch.no_grad()
def test_streaming_equals_the_whole_history(name):
    model, ticks = tiny_model(CONFIG, contract=CONTRACTS[name]), 5
    step = engines.example_instruction(model)
    seen = [engines.example(model, tick) for tick in range(ticks)]
    view = joined([engines.one_tick(model.encode_observation(images, tool, step)[0]) for images, tool, _ in seen])
    states = joined([state for *_, state in seen])
    whole, _ = model(states, view, step.summary, None)
    carried = None
    for t in range(ticks):
        state, now = mixers.map_state(lambda x, t=t: x[:, t : t + 1], (states, view))
        out, carried = model(state, now, step.summary, carried)
        torch.testing.assert_close(out.actions[:, 0], whole.actions[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not graphs.version("openvino"), reason="openvino is not installed")
@pytest.mark.parametrize("name", ["two cameras, one of colour alone", "two grippers, amid the motion",
                                  "no proprioception", "colour alone"])  # fmt: skip
def test_openvino_gives_the_same(folders, name):
    """Proven on made-up ticks when it is loaded, and here through the runtime."""
    chunks = {}
    for which in ("torch", "openvino"):
        runtime = PolicyRuntime.load(folders[name], "cpu", 1, which)
        assert runtime.engine.name == which
        runtime.set_instruction("pick up the red block")
        chunks[which] = np.stack([runtime.step(observation(CONTRACTS[name], i)).actions for i in range(6)])
    scale = np.abs(chunks["torch"]).max(axis=(0, 1))
    assert (np.abs(chunks["openvino"] - chunks["torch"]).max(axis=(0, 1)) <= 1e-3 * scale).all()


def batch(model, rows=3, ticks=2):
    """Images, instructions, states and wanted actions of a few streams."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.language.vocabulary, (rows, 5), generator=g)
    seen = [engines.example(model, seed) for seed in range(rows * ticks)]
    images = joined([images for images, *_ in seen], 0)
    state = mixers.map_state(lambda x: x.flatten(0, 1).unflatten(0, (rows, ticks)), joined([s for *_, s in seen], 0))
    wanted = 0.5 * torch.randn(rows, ticks, *_rows(model), generator=g)
    return ids, images, state, wanted


def _rows(model):
    return model.contract.actions.horizon, model.contract.actions.size


def loss(model, ids, images, state, wanted):
    rows, ticks = wanted.shape[:2]
    instruction = model.encode_instruction(model.language(ids, torch.ones_like(ids, dtype=torch.bool)))
    step = instruction.at(0)
    each = type(step)(*(part.repeat_interleave(ticks, 0) for part in step))
    view, _ = model.encode_observation(images, None, each)
    view = mixers.map_state(lambda part: part.unflatten(0, (rows, ticks)), view)
    return (model(state, view, step.summary, None)[0].actions - wanted).abs().mean()


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_gradient_reaches_every_parameter(name):
    torch.manual_seed(0)
    model = VlaPolicy(CONFIG, CONTRACTS[name])
    loss(model, *batch(model)).backward()
    sentence = ("language.weigh", "language.project")  # of the sentence's embedding, which is distilled, not used
    learns = {n: p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters()}
    dead = [n for n, alive in learns.items() if not alive and not n.startswith(sentence)]
    assert not dead


def test_it_learns_a_batch_by_heart():
    """From images, instruction and proprioception together, without any label but the actions."""
    torch.manual_seed(0)
    model = VlaPolicy(CONFIG, CONTRACTS["two cameras, one of colour alone"]).train()
    data = batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = None
    for _ in range(150):
        value = loss(model, *data)
        first = float(value.detach()) if first is None else first
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.1 * first


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), st.integers(1, 4), st.randoms(use_true_random=False))
def test_actions_in_any_layout_come_back_from_their_normalised_form(grippers, horizon, random):
    """Grippers anywhere, with and without offsets."""
    names = [f"g{i}" for i in range(grippers)]
    columns = [*JOINTS, *names]
    random.shuffle(columns)
    model = VlaPolicy.__new__(VlaPolicy)
    torch.nn.Module.__init__(model)
    model.contract = msgspec.structs.replace(CONTRACTS["Cartesian"], actions=Actions(
        space="joint_position", columns=tuple(columns), grippers=tuple(names), horizon=horizon, period=0.1,
        scale=tuple(random.uniform(0.01, 3) for _ in columns),
        offset=random.choice([None, tuple(random.uniform(-2, 2) for _ in columns)])))  # fmt: skip
    logits = torch.randn(2, horizon, len(columns), dtype=torch.float64)
    rows = model.denormalize(logits)
    again = model.normalize(rows)
    openings = list(model.contract.actions.gripper_columns)
    again[..., openings] = again[..., openings].logit()
    torch.testing.assert_close(again, logits)
    assert ((rows[..., openings] > 0) & (rows[..., openings] < 1)).all()


def test_a_contract_survives_its_file(folders):
    for name, folder in folders.items():
        config = checkpoint.read_config(folder)
        assert config.contract == CONTRACTS[name] == parse(json.loads(json.dumps(plain(CONTRACTS[name]))))


def test_state_is_normalised_element_by_element():
    of = CONTRACTS["six joints, no gripper"]
    values = state_vectors(observation(of, 1), observation(of, 0))
    first, second = StateLayout(of).tokens(values).values()
    assert first.shape == (9,) and second.shape == (6,) and first.dtype == np.float32
    np.testing.assert_allclose(first[1], (values["joint_positions"][1] + 1.5) / 2, rtol=1e-5)
    np.testing.assert_allclose(first[6:], (values["tool_position"] - [0.4, 0, 0.3]) / [0.3, 0.4, 0.3], rtol=1e-4)
    np.testing.assert_allclose(values["tool_velocity"], [0, 0.05, 0], atol=1e-9)  # 1 cm in 0.2 s


@pytest.mark.parametrize("change", [
    {"cameras": (WRIST,)},
    {"state": tuple(v for v in WITH_TARGETS.state if v.name != "tool_position")}], ids=str)  # fmt: skip
def test_grounding_in_targets_says_what_it_needs(change):
    with pytest.raises(ValueError, match="needs|tool_position"):
        VlaPolicy(TARGETS, msgspec.structs.replace(WITH_TARGETS, **change))


@pytest.mark.parametrize("change", [
    {"contract__cameras": []}, {"contract__tick": 0}, {"contract__actions__horizon": "6"},
    {"contract__actions__grippers": ["hook"]}, {"contract__robot__surprise": 1}, {"contract": None},
    {"contract__state": [{"name": "force", "size": 2, "token": "keys"}]},
    {"contract__state": [{"name": "force", "size": 2, "token": "a.b"}]},
    {"contract__state": 2 * [{"name": "force", "size": 2}]}], ids=str)  # fmt: skip
def test_nonsense_in_a_contract_is_one_line(folders, change, tmp_path):
    folder = Path(shutil.copytree(folders["Cartesian"], tmp_path / "copy"))
    edit_config(folder, **change)
    with pytest.raises(checkpoint.CheckpointError, match="config.json") as info:
        checkpoint.load(folder)
    assert "\n" not in str(info.value)

"""A policy of a few thousand weights, a tokeniser of a few words, and observations, for tests."""

import json

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from vla_nodes.policy import checkpoint
from vla_nodes.policy.checkpoint import CheckpointConfig
from vla_nodes.policy.configuration import PolicyConfig, SpaceConfig
from vla_nodes.policy.contract import Contract, parse
from vla_nodes.policy.language import LanguageConfig
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.policy.processing import CameraImage, Observation

torch.set_num_threads(1)
WORDS = "pick up the red blue block cube put it in bowl open drawer please and then place on left".split()
CONFIG = PolicyConfig(
    image_size=64, vision_widths=(4, 8, 8, 16), feature_width=16, d_model=32, n_layer=2, d_state=8, headdim=16,
    head_width=32,
    space=SpaceConfig(center=(0.48, 0.0, 0.15), ground_height=0.0, tool_probes=((0.0, 0.0, 0.0), (0.0, 0.0, -0.05))),
    language=LanguageConfig(vocabulary=32, embedding=8, d_model=32, n_layer=1, d_state=8, headdim=16, sentence=12),
)  # fmt: skip


def contract(joints=7, horizon=6) -> Contract:
    """An arm with one gripper before one RGB-D camera, moved by increments of its tool."""
    columns = ["dx", "dy", "dz", "rx", "ry", "rz", "gripper"]
    return parse({
        "robot": {"name": "panda", "joints": [f"panda_joint{i}" for i in range(1, joints + 1)],
                  "base_frame": "panda_link0", "tool_frame": "panda_hand_tcp",
                  "grippers": [{"joint": "panda_finger_joint1", "closed": 0.0, "open": 0.04}]},
        "state": [
            {"name": "tool_position", "size": 3, "token": "position", "offset": [0.48, 0.0, 0.15], "scale": 0.25},
            {"name": "tool_rotation", "size": 6, "token": "position"},
            {"name": "gripper", "size": 1, "token": "position", "offset": 0.5, "scale": 0.5},
            {"name": "joint_positions", "size": joints, "token": "position", "scale": 2.0},
            {"name": "tool_velocity", "size": 3, "token": "velocity", "scale": 0.2},
            {"name": "gripper_velocity", "size": 1, "token": "velocity", "scale": 4.0},
            {"name": "joint_velocities", "size": joints, "token": "velocity"}],
        "actions": {"space": "ee_delta", "columns": columns, "scale": [0.016] * 3 + [0.05] * 3 + [1.0],
                    "grippers": ["gripper"], "horizon": horizon, "period": 0.05},
        "cameras": [{"name": "camera"}],
        "tick": 0.1})  # fmt: skip


CONTRACT = contract()


def write_tokenizer(path):
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path))
    return tokenizer


def tiny_model(config=CONFIG, seed=0, tokenizer=None, contract=CONTRACT) -> VlaPolicy:
    """Weights away from initialisation, so that no part is zero or the identity."""
    torch.manual_seed(seed)
    model = VlaPolicy(config, contract, tokenizer).eval()
    for p in model.parameters():
        p.requires_grad_(False).add_(0.15 * torch.randn_like(p))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
    return model


def robot(policy=CONFIG, contract=CONTRACT) -> CheckpointConfig:
    return CheckpointConfig(policy, contract)


def write_checkpoint(folder, config=CONFIG, seed=0, contract=CONTRACT):
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder.parent / "words.json")
    model = tiny_model(config, seed, contract=contract)
    checkpoint.save(folder, model, robot(config, contract), folder.parent / "words.json")
    return folder


def observation(tick: int, size=64, seed=0) -> Observation:
    g = np.random.default_rng([seed, tick])
    pose = np.eye(4)
    pose[:3, 3] = 0.45, 0.01 * tick, 0.2
    camera = np.array([[0, -0.6, 0.8, -0.1], [-1, 0, 0, 0.02], [0, -0.8, -0.6, 0.7], [0, 0, 0, 1]], np.float64)
    image = CameraImage(
        g.integers(0, 256, (size, size, 3), dtype=np.uint8), g.uniform(0.3, 2.0, (size, size)).astype(np.float32),
        np.array([[58.0, 0, size / 2], [0, 58.0, size / 2], [0, 0, 1]]), camera)  # fmt: skip
    joints, velocities = g.normal(0, 0.5, 7), g.normal(0, 0.5, 7)
    return Observation(0.1 * tick, {"camera": image}, joints, velocities, np.array([g.uniform()]), pose)


def edit_config(folder, **changes):
    """Overwrites entries of config.json; policy__d_model=8 sets the entry d_model inside policy."""
    values = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        part = values
        *path, last = name.split("__")
        for step in path:
            part = part[step]
        part[last] = value
    (folder / "config.json").write_text(json.dumps(values))

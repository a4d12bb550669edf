"""Checkpoints and episodes small enough to train on within a test."""

from dataclasses import replace

import numpy as np
import policy_tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from vla_nodes.datasets.episode import EpisodeWriter
from vla_nodes.policy import checkpoint

HORIZON = policy_tiny.CONTRACT.actions.horizon
THINGS = ["red block", "blue can", "bowl", "drawer"]
SIZE, CELLS = 64, 16
LETTERS = "abcdefghijklmnopqrstuvwxyz,.;'"
CONFIG = replace(
    policy_tiny.CONFIG, language=replace(policy_tiny.CONFIG.language, vocabulary=64, max_tokens=256)
)  # fmt: skip


def write_checkpoint(folder):
    """A tiny policy whose tokeniser spells, so that it can read any sentence."""
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "?", *LETTERS, *(f"##{c}" for c in LETTERS)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=60))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder.parent / "letters.json"))
    checkpoint.save(folder, policy_tiny.tiny_model(CONFIG), policy_tiny.robot(CONFIG), folder.parent / "letters.json")
    return folder


def write_episode(path, ticks=6, labels=True, **header):
    """Noise to look at, a slow walk to imitate."""
    rng, writer = np.random.default_rng(int(path.stem)), EpisodeWriter()
    camera = np.array([[0, -0.6, 0.8, -0.1], [-1, 0, 0, 0.02], [0, -0.8, -0.6, 0.7], [0, 0, 0, 1]], np.float32)
    for t in range(ticks):
        segmentation = np.zeros((CELLS, CELLS), np.uint8)
        for index in range(len(THINGS)):
            segmentation[3 * index + 1, 4:7] = index + 1
        pose = np.eye(4, dtype=np.float32)
        pose[:3, 3] = 0.45 + 0.002 * t, 0.0, 0.2
        row = {"segmentation": segmentation, "primitive": t % 3, "step": 0, "done": t == ticks - 1,
               "thing_positions": rng.uniform(0.3, 0.6, (len(THINGS), 3)).astype(np.float32),
               "drawer_opening": 0.0} if labels else {}  # fmt: skip
        writer.add(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), rng.uniform(0.5, 1.0, (SIZE, SIZE)),
                   stamp=0.1 * t, joint_positions=np.zeros(7), joint_velocities=np.zeros(7), gripper=1.0, ee_pose=pose,
                   actions=np.tile(np.float32([0.002, 0, 0, 0, 0, 0, t % 2]), (HORIZON, 1)), **row)  # fmt: skip
    k = [[58.0, 0, SIZE / 2], [0, 58.0, SIZE / 2], [0, 0, 1]]
    writer.write(path, {"instruction": "pick up the red block", "intrinsics": k, "camera_pose": camera.tolist(),
                        **({"things": THINGS} if labels else {}), **header})  # fmt: skip


def write_data(folder, count=6, ticks=6, labels=True):
    for number in range(count):
        write_episode(folder / f"{number:03d}.safetensors", ticks, labels)
    return folder

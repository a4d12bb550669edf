"""The path from recordings to a better robot, from end to end and in small."""

import numpy as np
import pytest
import torch
from dataset_support import demonstration, write
from policy_tiny import CONTRACT
from replay_support import write_checkpoint

from vla_nodes.datasets import cli
from vla_nodes.datasets import episode as episodes
from vla_nodes.policy import checkpoint as checkpoints
from vla_nodes.policy.processing import CameraImage, Observation
from vla_nodes.policy.runtime import PolicyRuntime
from vla_nodes.training import losses_action, token_cache
from vla_nodes.training.cli import main as train

SENTENCE = "pick up the red block"


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "tiny" / "policy")


def test_recordings_fine_tune_a_policy(checkpoint, tmp_path, capsys):
    """Bags of the simulated robot -> episodes -> train -> a checkpoint that loads, acts, and fits the data better."""
    for seed in (0, 1):
        recorded, _ = demonstration(seed, seconds=1.5)
        write(tmp_path / "bags" / f"{seed}", recorded, outcome="success")
    data, out = tmp_path / "data", tmp_path / "run"
    args = ["build", str(tmp_path / "bags"), "--out", str(data), "--checkpoint", str(checkpoint)]
    assert cli.main(args) == 0, capsys.readouterr()
    paths = episodes.files(data)
    assert len(paths) == 2 and episodes.read_header(paths[0])["gripper"] == "commanded"
    code = train(
        [
            "--data",
            str(data),
            "--out",
            str(out),
            "--steps",
            "25",
            "--minutes",
            "2",
            "--set",
            f"start={checkpoint}",
            "--set",
            "batch=4",
            "--set",
            "window_ticks=8",
            "--set",
            "learning_rate=5e-3",
            "--set",
            "cache_workers=1",
            "--set",
            "device=cpu",
        ]
    )
    assert code == 0, capsys.readouterr()

    def loss(folder) -> float:
        model, _ = checkpoints.load(folder)
        rng = np.random.default_rng(0)
        tokens = [token_cache.tokens_of(model, episodes.read(path), rng) for path in paths]
        tokens = [{key: torch.as_tensor(value) for key, value in t.items()} for t in tokens]
        with torch.no_grad():
            terms, _ = losses_action.losses(
                model, losses_action.stack([losses_action.window(t, 10, np.random.default_rng(1)) for t in tokens])
            )
        assert float(terms["primitive"]) == 0  # nobody named any
        return float(sum(terms.values()))

    before, after = loss(checkpoint), loss(out / "checkpoint")
    assert after < 0.9 * before, (before, after)
    runtime = PolicyRuntime.load(out / "checkpoint", device="cpu")
    runtime.set_instruction(SENTENCE)
    episode = episodes.read(paths[0])
    arrays = episode.arrays
    output = runtime.step(
        Observation(
            float(arrays["stamp"][0]),
            {
                "camera": CameraImage(
                    episode.color(0),
                    episode.depth(0),
                    np.array(episode.header["intrinsics"]),
                    np.array(episode.header["camera_pose"]),
                )
            },
            arrays["joint_positions"][0],
            arrays["joint_velocities"][0],
            arrays["gripper"][:1],
            arrays["ee_pose"][0],
        )
    )
    assert np.isfinite(output.feasibility) and (
        output.actions is None or output.actions.shape == (CONTRACT.actions.horizon, 7)
    )

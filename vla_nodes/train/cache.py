"""Stage 2's examples: episodes seen once through the frozen eyes of stage 1: the core trains on tokens, not images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from vla_nodes.data import episodes
from vla_nodes.policy.model import Prepared, VisualTokens, VlaPolicy, proprioception
from vla_nodes.sim import language
from vla_nodes.sim.tasks import Task
from vla_nodes.train.frames import augment

PHRASINGS = 4  # sentences for the same task; the first is the one the eyes looked for


def differences(values: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """Rate of change since the tick before, zero at the first: (T, ...) per second."""
    gaps = np.diff(stamps, prepend=stamps[0] - 1.0).reshape(-1, *[1] * (values.ndim - 1))
    rates = np.diff(values, axis=0, prepend=values[:1]) / gaps
    return rates.astype(np.float32)


@torch.no_grad()
def tokens_of(
    model: VlaPolicy, episode: episodes.Episode, rng: np.random.Generator, batch: int = 16
) -> dict[str, np.ndarray]:
    """Everything the core's training needs of an episode, as arrays over its ticks."""
    header, arrays = episode.header, episode.arrays
    episode.require("instruction", "intrinsics", "camera_pose")
    episode.require("ee_pose", "gripper", "joint_positions", "joint_velocities", "actions", "primitive")
    texts = [header["instruction"]]
    if "task" in header:
        texts += [language.phrase(Task.from_dict(header["task"]), rng) for _ in range(PHRASINGS - 1)]
    asked = model.prepare(model.language.encode(texts))
    count = len(episode)
    step = torch.as_tensor(arrays.get("step", np.zeros(count)), dtype=torch.long)
    parts: list[VisualTokens] = []
    for start in range(0, count, batch):
        ticks = range(start, min(start + batch, count))
        images = [augment(episode.color(t), episode.depth(t), rng) if rng.random() < 0.5 else
                  (episode.color(t).astype(np.float32) / 255, episode.depth(t)) for t in ticks]  # fmt: skip
        rows, at = len(images), step[ticks.start : ticks.stop]

        def repeated(value, rows=rows) -> Tensor:
            return torch.as_tensor(np.asarray(value, np.float32)).expand(rows, -1, -1)

        view, _ = model.look(
            torch.from_numpy(np.stack([i[0] for i in images])).permute(0, 3, 1, 2),
            torch.from_numpy(np.stack([i[1] for i in images])),
            repeated(header["intrinsics"]), repeated(header["camera_pose"]),
            torch.as_tensor(arrays["ee_pose"][ticks.start : ticks.stop, :3, 3], dtype=torch.float32),
            Prepared(asked.queries[0, at], asked.summary[0, at]),
        )  # fmt: skip
        parts.append(view)
    pose = torch.as_tensor(arrays["ee_pose"], dtype=torch.float32)
    body = proprioception(
        pose, torch.as_tensor(arrays["gripper"], dtype=torch.float32),
        torch.as_tensor(arrays["joint_positions"], dtype=torch.float32),
        torch.as_tensor(arrays["joint_velocities"], dtype=torch.float32),
        torch.as_tensor(differences(arrays["ee_pose"][:, :3, 3], arrays["stamp"])),
        torch.as_tensor(differences(arrays["gripper"], arrays["stamp"])))  # fmt: skip
    views = {f"view_{name}": torch.cat([getattr(p, name) for p in parts]).numpy() for name in VisualTokens._fields}
    return {**views, "state": body.state.numpy(), "change": body.change.numpy(), "summary": asked.summary.numpy(),
            "actions": model.normalised(torch.as_tensor(arrays["actions"])).numpy(),
            "primitive": arrays["primitive"].astype(np.int64), "step": step.numpy(),
            "done": arrays.get("done", np.zeros(count)).astype(np.float32)}  # fmt: skip


def fill(model: VlaPolicy, data: Path, cache: Path, seed: int = 0, report=print) -> list[Path]:
    """Tokens of every episode of a folder, made where missing. Damaged episodes are reported and skipped."""
    cache.mkdir(parents=True, exist_ok=True)
    done = []
    for path in episodes.files(data):
        target = cache / path.name
        if not target.exists():
            try:
                episode = episodes.read(path)
                partial = target.with_suffix(".partial")  # a kill must not leave half a file that looks done
                save_file(tokens_of(model, episode, np.random.default_rng([seed, int(path.stem)])), partial)
                os.replace(partial, target)
            except episodes.DataError as error:
                report(f"skipped: {error}")
                continue
        done.append(target)
    return done


def load(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}

"""Stage 2's examples: episodes seen once through the frozen eyes of stage 1: the core trains on tokens, not images."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from vla_nodes.datasets import episode as episodes
from vla_nodes.policy.modeling import CameraInput, StepQueries, VisualTokens, VlaPolicy
from vla_nodes.policy.processing import tool_vectors
from vla_nodes.progress import progress, say
from vla_nodes.training.examples import augment, number

EYES = ("language", "queries", "vision", "object_center")  # what tokens depend on; place positions are renewed in use
FORMAT = 5  # of the cached arrays; another one makes the cache stale
MADE_BY = "made_by.json"  # in the cache folder: what the tokens in it depend on
PHRASINGS = 4  # sentences for the same task at most; the first is the one the eyes looked for


def differences(values: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """Rate of change since the tick before, zero at the first: (T, ...) per second."""
    gaps = np.diff(stamps, prepend=stamps[0] - 1.0).reshape(-1, *[1] * (values.ndim - 1))
    rates = np.diff(values, axis=0, prepend=values[:1]) / gaps
    return rates.astype(np.float32)


@torch.no_grad()
def tokens_of(
    model: VlaPolicy, episode: episodes.Episode, rng: np.random.Generator, batch: int = 16, depth: bool = True
) -> dict[str, np.ndarray]:
    """Everything the core's training needs of an episode, as arrays over its ticks.

    An episode without the labels of a simulation gets primitive -1, done NaN and step 0.
    """
    header, arrays = episode.header, episode.arrays
    episode.require("instruction", "intrinsics", "camera_pose")
    episode.require("ee_pose", "gripper", "joint_positions", "joint_velocities", "actions")
    horizon, rows = model.contract.actions.horizon, arrays["actions"].shape[1]
    if rows < horizon:
        raise episodes.DataError(f"{episode.path}: its chunks have {rows} rows and the policy's {horizon}: collect or "
                                 f"build the data with --horizon {horizon}")  # fmt: skip
    texts = [header["instruction"], *header.get("paraphrases", [])][:PHRASINGS]
    asked = model.encode_instruction(model.language.encode(texts))
    count = len(episode)
    step = torch.as_tensor(arrays.get("step", np.zeros(count)), dtype=torch.long)
    parts: list[VisualTokens] = []
    for start in range(0, count, batch):
        ticks = range(start, min(start + batch, count))
        images = [augment(episode.color(t), episode.depth(t), rng) if rng.random() < 0.5 else
                  (episode.color(t).astype(np.float32) / 255, episode.depth(t)) for t in ticks]  # fmt: skip
        rows, at = len(images), step[ticks.start : ticks.stop]

        if not depth:
            images = [(color, np.zeros_like(there)) for color, there in images]

        def repeated(value, rows=rows) -> Tensor:
            return torch.as_tensor(np.asarray(value, np.float32)).expand(rows, -1, -1)

        view, _ = model.encode_observation(
            (CameraInput(
                torch.from_numpy(np.stack([i[0] for i in images])).permute(0, 3, 1, 2),
                torch.from_numpy(np.stack([i[1] for i in images])),
                repeated(header["intrinsics"]), repeated(header["camera_pose"])),),
            torch.as_tensor(arrays["ee_pose"][ticks.start : ticks.stop, :3, 3], dtype=torch.float32),
            StepQueries(asked.queries[0, at], asked.summary[0, at]),
        )  # fmt: skip
        parts.append(view)
    state = model.layout.tokens(
        {
            "joint_positions": arrays["joint_positions"],
            "joint_velocities": arrays["joint_velocities"],
            "gripper": arrays["gripper"].reshape(count, -1),
            "gripper_velocity": differences(arrays["gripper"].reshape(count, -1), arrays["stamp"]),
            "tool_velocity": differences(arrays["ee_pose"][:, :3, 3], arrays["stamp"]),
            **tool_vectors(arrays["ee_pose"]),
        }
    )
    views = {f"view_{name}": torch.cat([getattr(p, name) for p in parts]).numpy()
             for name in VisualTokens._fields if getattr(parts[0], name) is not None}  # fmt: skip
    return {**views, **{f"state_{token}": values for token, values in state.items()},
            "summary": asked.summary.numpy(),
            "actions": model.normalize(torch.as_tensor(arrays["actions"][:, :horizon])).numpy(),
            "primitive": arrays.get("primitive", np.full(count, -1)).astype(np.int64), "step": step.numpy(),
            "done": arrays.get("done", np.full(count, np.nan)).astype(np.float32)}  # fmt: skip


def made_by(model: VlaPolicy, seed: int = 0, depth: bool = True) -> str:
    """A fingerprint of all that the tokens depend on but the episodes: the weights that look, and how they are used."""
    digest = hashlib.sha256(f"{FORMAT} {PHRASINGS} {seed} {depth} {model.config.image_size} {model.contract}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] in EYES:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def freshen(cache: Path, fingerprint: str, report: Callable[[str], None] = print) -> None:
    """Empty the cache when other weights made it."""
    cache.mkdir(parents=True, exist_ok=True)
    try:
        known = json.loads((cache / MADE_BY).read_text())["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        known = None
    if known == fingerprint:
        return
    stale = sorted(cache.glob("*.safetensors"))
    for path in stale:
        path.unlink()
    if stale:
        report(f"{cache}: {len(stale)} episodes seen by other stage 1 weights thrown away; they are looked at again")
    (cache / MADE_BY).write_text(json.dumps({"fingerprint": fingerprint}) + "\n")  # last: till then it is stale


_model: VlaPolicy | None = None  # of a worker process


def _begin(model: VlaPolicy) -> None:
    global _model
    torch.set_num_threads(1)
    _model = model


def _apply(job: tuple) -> Any:
    function, argument = job
    return function(_model, argument)


@contextmanager
def answers(function: Callable, model: VlaPolicy, jobs: list, workers: int) -> Iterator[Iterator]:
    """``function(model, job)`` of every job, as they come, from so many processes."""
    if workers < 2 or len(jobs) < 2:
        yield (function(model, job) for job in jobs)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs)), _begin, (model,)) as pool:
        yield pool.imap_unordered(_apply, [(function, job) for job in jobs])


def _look(model: VlaPolicy, job: tuple[Path, Path, int, bool]) -> str:
    """ "" or why the episode was skipped."""
    path, target, seed, depth = job
    partial = target.with_suffix(".partial")  # a kill must not leave half a file that looks done
    try:
        rng = np.random.default_rng([seed, number(path)])
        save_file(tokens_of(model, episodes.read(path), rng, depth=depth), partial)
        os.replace(partial, target)
    except episodes.DataError as error:
        return f"skipped: {error}"
    finally:
        partial.unlink(missing_ok=True)
    return ""


def fill(
    model: VlaPolicy, data: Path, cache: Path, seed: int = 0, report: Callable[[str], None] = say,
    fingerprint: str = "", workers: int = 1, depth: bool = True,
) -> list[Path]:  # fmt: skip
    """Tokens of every episode of a folder, made where missing or older than the episode.

    Damaged episodes are reported and skipped. ``fingerprint`` is `made_by`'s; another one empties the cache first.
    """
    freshen(cache, fingerprint, report)
    found = [(path, cache / path.name) for path in episodes.files(data)]
    jobs = [(path, target, seed, depth) for path, target in found
            if not target.exists() or target.stat().st_mtime_ns < path.stat().st_mtime_ns]  # fmt: skip
    with answers(_look, model, jobs, workers) as reasons:
        for reason in progress(reasons, total=len(jobs), unit="episodes", label=f"looking at {data}", show=bool(jobs)):
            if reason:
                report(reason)
    return [target for _, target in found if target.exists()]


def load(path: Path) -> dict[str, Tensor]:
    """The tokens of one episode. SafetensorError when the file is damaged: delete it to have it made again."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}

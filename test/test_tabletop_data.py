"""What training reads: demonstrations made from a seed, frames drawn from them, and their cache."""

import os

import numpy as np
import policy_tiny
import pytest
import torch

from vla_nodes.datasets import episode as episodes
from vla_nodes.datasets.episode import DataError, EpisodeWriter
from vla_nodes.envs import base as envs
from vla_nodes.envs.tabletop import labels
from vla_nodes.envs.tabletop.disturbance import Disturbance
from vla_nodes.envs.tabletop.environment import Tabletop
from vla_nodes.envs.tabletop.instructions import parse
from vla_nodes.envs.tabletop.scene import Scene
from vla_nodes.envs.tabletop.tasks import Task, destination
from vla_nodes.evaluation import collect
from vla_nodes.policy.language import EncodedText
from vla_nodes.policy.modeling import Instruction, VisualTokens
from vla_nodes.policy.processing import StateLayout
from vla_nodes.training import examples, grounding_data, token_cache

LABELS = envs.grounding("tabletop")
SIZE, CELLS, THINGS = 24, 6, ["red block", "bowl", "drawer"]


def tiny(path, ticks=4, **header):
    rng = np.random.default_rng(0)
    writer = EpisodeWriter()
    for t in range(ticks):
        segmentation = np.zeros((CELLS, CELLS), np.uint8)
        segmentation[1, 1:3], segmentation[4, 4] = 1, 2
        color, depth = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), rng.uniform(0.5, 1, (SIZE, SIZE))
        writer.add(color, depth, stamp=0.1 * t, joint_positions=np.zeros(7), joint_velocities=np.zeros(7), gripper=1.0,
                   ee_pose=np.eye(4), actions=np.zeros((16, 7), np.float32), primitive=0, segmentation=segmentation,
                   thing_positions=np.arange(9, dtype=np.float32).reshape(3, 3), drawer_opening=0.12,
                   step=int(t > 2), done=t == 2)  # fmt: skip
    writer.write(path, {"instruction": "grab the red block", "things": THINGS, "intrinsics": np.eye(3).tolist(),
                        "camera_pose": np.eye(4).tolist(), **header})  # fmt: skip
    return path


def test_a_seed_makes_the_same_episode_twice(tmp_path):
    """Small pictures and a drawer already in reach keep this quick; nothing else differs from a real collection."""
    env = Tabletop(image=32, cells=8)
    env.afterwards = 0.1
    for name in ("a", "b"):
        assert collect.collect_one(env, 3, tmp_path / f"{name}.safetensors", env.contract) == ""
    env.close()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    episode = episodes.read(tmp_path / "a.safetensors")
    header = episode.header
    assert parse(header["instruction"]) == Task.from_dict(header["task"])
    assert all(parse(text) == Task.from_dict(header["task"]) for text in header["paraphrases"])
    assert [t.name for t in Scene.from_json(header["scene"]).things] == header["things"][:-1]
    assert episode.color(0).shape == (32, 32, 3) and episode.arrays["actions"].shape[1:] == (16, 7)
    np.testing.assert_allclose(np.diff(episode.arrays["stamp"]), Tabletop.contract.tick, atol=1e-6)
    assert header["things"][-1] == "drawer" and episode.arrays["segmentation"].max() <= len(header["things"])


def test_collecting_goes_on_where_it_stopped(tmp_path):
    """Written seeds and failed ones are done; a line that a kill cut off is not."""
    (tmp_path / "0000004.safetensors").write_bytes(b"")
    rows = ['{"seed": 5, "policy": false, "reason": "x"}', '{"seed": 6, "policy": true, "reason": "x"}', '{"seed": 7']
    (tmp_path / collect.THROWN_AWAY).write_text("\n".join(rows))
    jobs, failed = collect.open_jobs(tmp_path, range(4, 9), None)
    assert [job[0] for job in jobs] == [6, 7, 8] and failed == 1
    jobs, failed = collect.open_jobs(tmp_path, range(4, 9), tmp_path / "policy")
    assert [job[0] for job in jobs] == [5, 7, 8] and failed == 1


def test_disturbance_leaves_the_label_alone_and_stays_small():
    chunk = np.full((16, 7), 0.5)
    for seed in range(20):
        disturb = Disturbance(np.random.default_rng(seed), 0.05)
        for tick in range(50):
            moved = disturb(chunk, 0.1 * tick)
            assert (chunk == 0.5).all() and np.abs(moved[:, :3] - 0.5).max() < 0.05
            assert np.isin(moved[:, 6], (0.5,)).all() and (moved[:, 3:6] == 0.5).all()
            if disturb.level == 0.0:
                np.testing.assert_array_equal(moved, chunk)


def test_augment_keeps_bounds_and_its_input():
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    depth = rng.uniform(0.5, 1.5, (SIZE, SIZE)).astype(np.float32)
    depth[:4] = 0
    kept, blind = depth.copy(), 0
    for _ in range(200):
        image, noisy = examples.augment(color, depth, rng)
        assert image.dtype == noisy.dtype == np.float32 and image.shape == color.shape and noisy.shape == depth.shape
        assert image.min() >= 0 and image.max() <= 1 and noisy.min() >= 0 and noisy.max() < 1.6
        assert (noisy[:4] == 0).all()  # a hole stays a hole
        blind += not noisy.any()
    np.testing.assert_array_equal(depth, kept)
    assert 5 < blind < 60  # about one in eight comes without depth, never all


def test_frame_says_where_the_named_thing_is(tmp_path):
    sampler = grounding_data.FrameSampler(tiny(tmp_path / "0000001.safetensors").parent, LABELS)
    rng, kinds = np.random.default_rng(1), set()
    for _ in range(150):
        frame = sampler.draw(rng)
        task = parse(frame.text)
        kinds.add((bool(task), frame.grounded))
        if task is None:
            assert not frame.wanted.any() and not frame.grounded and not frame.cells.any()
            continue
        steps = list(task.steps)
        assert frame.steps == len(steps) and frame.step < frame.steps
        step = steps[frame.step]
        names = [step.target, step.reference]
        assert np.isfinite(frame.place_position).all() == frame.present[1]
        if frame.present[1]:
            np.testing.assert_allclose(frame.place_position, destination(step, frame.center[1]), rtol=1e-6)
        assert frame.wanted.tolist() == [bool(n) for n in names]
        assert frame.present.tolist() == [n in THINGS for n in names]
        assert frame.grounded == all(n in THINGS for n in names if n)
        for role, name in enumerate(names):
            assert ((frame.cells == role + 1).sum() > 0) == (name in ("red block", "bowl"))  # the drawer is out of view
            if name in THINGS:
                np.testing.assert_allclose(frame.center[role], 3 * THINGS.index(name) + np.arange(3))
    assert kinds == {(True, True), (True, False), (False, False)}


def test_a_scene_without_graspables_still_gives_sentences():
    rng = np.random.default_rng(0)
    for _ in range(60):
        text, _ = labels.random_instruction(["tray", "drawer"], rng)
        assert text


def test_sampler_drops_damaged_and_unlabelled_episodes(tmp_path):
    tiny(tmp_path / "0000001.safetensors")
    (tmp_path / "0000002.safetensors").write_bytes(b"rubbish")
    writer = EpisodeWriter()
    writer.add(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8)), stamp=0.0)
    writer.write(tmp_path / "0000003.safetensors", {"instruction": "from a real robot"})
    sampler = grounding_data.FrameSampler(tmp_path, LABELS)
    rng = np.random.default_rng(0)
    for _ in range(30):
        sampler.draw(rng)
    assert {p.stem for p in sampler.damaged} == {"0000002", "0000003"}
    (tmp_path / "0000001.safetensors").unlink()
    with pytest.raises(DataError):
        grounding_data.FrameSampler(tmp_path, LABELS).draw(rng)


class Eyes:
    """Stands in for the model: caching only asks it to look."""

    contract = policy_tiny.contract(horizon=16)
    layout = StateLayout(contract)

    def __init__(self):
        self.language = self

    def encode(self, texts):
        return EncodedText(
            torch.zeros(len(texts), 3, 4), torch.ones(len(texts), 3, dtype=torch.bool), torch.zeros(len(texts), 2)
        )

    def encode_instruction(self, text):
        rows = len(text.mask)
        return Instruction(torch.zeros(rows, 2, 4, 8), torch.zeros(rows, 2, 5), torch.zeros(rows, 2))

    def encode_observation(self, images, tool, step):
        (image,) = images
        rows = len(image.color)
        assert image.color.shape == (rows, 3, SIZE, SIZE) and image.depth.shape == (rows, SIZE, SIZE)
        assert len(step.queries) == rows
        return VisualTokens(*(torch.full((rows, 4), float(i)) for i in range(len(VisualTokens._fields)))), None

    def normalize(self, actions):
        return actions


def test_cache_skips_what_is_damaged_and_says_so(tmp_path):
    data, store, said = tmp_path / "data", tmp_path / "cache", []
    data.mkdir()
    tiny(data / "0000001.safetensors", ticks=5, paraphrases=["lift the red block", "get it", "take it", "grab it"])
    (data / "0000002.safetensors").write_bytes((data / "0000001.safetensors").read_bytes()[:300])
    raw = tiny(data / "0000003.safetensors").read_bytes()
    (data / "0000003.safetensors").write_bytes(raw.replace(b"IHDR", b"IHDX"))
    done = token_cache.fill(Eyes(), data, store, report=said.append)
    assert [p.name for p in done] == ["0000001.safetensors"]
    assert len(said) == 2 and "0000002" in said[0] and "0000003" in said[1]
    tokens = token_cache.load(done[0])
    assert tokens["state_position"].shape == (5, 17) and tokens["summary"].shape == (token_cache.PHRASINGS, 2, 5)
    assert tokens["step"].tolist() == [0, 0, 0, 1, 1] and tokens["done"].tolist() == [0, 0, 1, 0, 0]
    assert sorted(p.name for p in store.iterdir()) == ["0000001.safetensors", token_cache.MADE_BY]
    stamp = done[0].stat().st_mtime_ns
    assert token_cache.fill(Eyes(), data, store, report=said.append) == done and done[0].stat().st_mtime_ns == stamp


def test_other_eyes_make_the_cache_anew(tmp_path):
    tiny(tmp_path / "data" / "0000001.safetensors", ticks=5)
    store, said = tmp_path / "cache", []

    def filled(fingerprint: str) -> int:
        (path,) = token_cache.fill(Eyes(), tmp_path / "data", store, report=said.append, fingerprint=fingerprint)
        return path.stat().st_mtime_ns

    first = filled("one")
    assert filled("one") == first and not said
    second = filled("two")
    assert second > first and len(said) == 1 and "1 episodes seen by other stage 1 weights" in said[0]
    (store / token_cache.MADE_BY).unlink()  # killed between throwing away and noting who makes it now
    assert filled("two") > second
    later = token_cache.load(store / "0000001.safetensors")
    os.utime(tmp_path / "data" / "0000001.safetensors")  # the episode was collected again
    assert filled("two") > second and token_cache.load(store / "0000001.safetensors").keys() == later.keys()


def test_a_fingerprint_knows_the_eyes_and_nothing_else():
    model = policy_tiny.tiny_model()
    before = token_cache.made_by(model)
    model.core.layers[0].norm.weight.data += 1  # not an eye
    assert token_cache.made_by(model) == before == token_cache.made_by(policy_tiny.tiny_model())
    assert len({before, token_cache.made_by(model, depth=False), token_cache.made_by(model, seed=1)}) == 3
    for part in (model.feasibility_head, model.placement_head):  # nor these: no token comes from them
        next(part.parameters()).data.view(-1)[0] += 1e-3
        assert token_cache.made_by(model) == before
    for part in (model.vision, model.queries, model.language, model.object_center):
        next(part.parameters()).data.view(-1)[0] += 1e-3
        assert token_cache.made_by(model) != before
        before = token_cache.made_by(model)


def test_cached_tokens_say_which_labels_are_missing(tmp_path):
    writer = EpisodeWriter()
    for t in range(3):
        writer.add(np.zeros((SIZE, SIZE, 3), np.uint8), np.ones((SIZE, SIZE)), stamp=0.1 * t, gripper=1.0,
                   joint_positions=np.zeros(7), joint_velocities=np.zeros(7), ee_pose=np.eye(4),
                   actions=np.zeros((16, 7), np.float32))  # fmt: skip
    header = {"instruction": "grab it", "intrinsics": np.eye(3).tolist(), "camera_pose": np.eye(4).tolist()}
    writer.write(tmp_path / "data" / "kitchen_2.safetensors", header)
    (path,) = token_cache.fill(Eyes(), tmp_path / "data", tmp_path / "cache")
    tokens = token_cache.load(path)
    assert tokens["primitive"].tolist() == [-1, -1, -1] and tokens["done"].isnan().all()


def test_a_killed_cache_run_leaves_nothing_that_looks_done(tmp_path, monkeypatch):
    tiny(tmp_path / "0000001.safetensors")

    def killed(arrays, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(token_cache, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        token_cache.fill(Eyes(), tmp_path, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_differences_are_rates():
    stamps = np.array([0.0, 0.1, 0.3])
    rates = token_cache.differences(np.array([[0.0, 1.0], [0.1, 1.0], [0.5, 0.0]]), stamps)
    np.testing.assert_allclose(rates, [[0, 0], [1, 0], [2, -5]], atol=1e-6)

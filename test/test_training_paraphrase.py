"""Stage 1 from words alone: parts that add up, and wordings that learn to ask for what plain words ask for."""

import numpy as np
import pytest
import torch
import training_tiny
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from vla_nodes.envs import base as envs
from vla_nodes.envs.tabletop import held_out, instructions
from vla_nodes.envs.tabletop.tasks import Task
from vla_nodes.training import config, initialize, trainer
from vla_nodes.training.stages import paraphrase


@pytest.fixture
def values(tmp_path, monkeypatch):
    monkeypatch.setattr(paraphrase, "PLAIN", 400)
    start = training_tiny.write_checkpoint(tmp_path / "start")
    return config.build({"stage": "paraphrase", "env": "tabletop", "start": str(start),
                         "out": str(tmp_path / "paraphrase"), "steps": 25,
                           "batch": 16, "learning_rate": 0.01, "warmup": 2, "device": "cpu"})  # fmt: skip


@pytest.fixture
def stage(values):
    return paraphrase.ParaphraseStage(initialize.begin(values, print).model, values)


def test_parts_that_add_up_are_found():
    rng = np.random.default_rng(0)
    colors, kinds = torch.randn(5, 3), torch.randn(2, 3)
    rows = [(c, k) for c in range(5) for k in range(2) if (c, k) != (3, 1)]
    values = torch.stack([colors[c] + kinds[k] for c, k in rows for _ in range(4)])
    words = [(f"c{c}", f"k{k}") for c, k in rows for _ in range(4)]
    parts, share = paraphrase._fit(words, values)
    torch.testing.assert_close(parts["c3"] + parts["k1"], colors[3] + kinds[1], atol=1e-4, rtol=1e-4)
    assert share > 0.999
    _, share = paraphrase._fit(words, torch.from_numpy(rng.standard_normal((len(words), 3))))
    assert share < 0.7


def test_a_pair_that_was_never_seen_is_asked_for_by_the_sum_of_its_parts(stage):
    def thing(name):
        return stage.meaning.of([(Task("pick", name), 0)])[0][0, 0]

    def differ(color, one, other):
        return thing(f"{color} {one}") - thing(f"{color} {other}")

    (kind, color) = next(iter(held_out.PAIRS))
    other = {"block": "can", "can": "block"}[kind]
    torch.testing.assert_close(differ(color, kind, other), differ("red", kind, other), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(differ("pink", "mug", "can"), differ("red", "mug", "can"), atol=1e-5, rtol=1e-4)
    assert not stage.meaning.knows(Task("stroke", "red block"), 0)


def test_wordings_learn_and_nothing_else_does(values, stage):
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    whole = stage._batch([stage.grounding.unusual(np.random.default_rng([3, k])) for k in range(60)], 0)
    first = float(stage.objective(whole)[0].detach())
    assert trainer.Loop(stage, values, Accelerator(cpu=True)).run()
    assert float(stage.objective(whole)[0].detach()) < 0.9 * first
    after = load_file(values.out / "weights.safetensors")
    assert {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])} == {
        "queries"
    }
    assert {"steps right", "pairs: target right", "phrasings: target right"} <= set(stage.measure())


def test_who_goes_on_with_words_keeps_what_the_eyes_mean(values, stage, tmp_path):
    torch.nn.init.normal_(stage.model.queries.role)
    other = training_tiny.write_checkpoint(tmp_path / "second" / "start")
    save_file(stage.model.state_dict(), other / "model.safetensors")
    drifted = config.build({**config.plain(values), "start": str(other)})
    kept = config.build({**config.plain(drifted), "meaning": str(values.start)})

    own = stage.meaning.of([(Task("pick", "red block"), 0)])[0]

    def thing(values):
        stage = paraphrase.ParaphraseStage(initialize.begin(values, print).model, values, lambda _: None)
        return stage.meaning.of([(Task("pick", "red block"), 0)])[0]

    torch.testing.assert_close(thing(kept), own)
    assert (thing(drifted) - own).norm() > 0.1 * own.norm()


def test_held_out_sentences_are_held_out():
    rng, labels = np.random.default_rng(1), envs.grounding("tabletop")
    for text, (step, *_) in (labels.held_out("pairs", rng) for _ in range(50)):
        assert held_out.pair(*step.target.split()[::-1]) and instructions.parse(text) == step
    said = [labels.held_out("phrasings", rng).text for _ in range(50)]
    assert any(word in text for text in said for word in ("fetch", "seize", "shift", "want", "goes"))


def test_a_batch_follows_from_its_step(stage):
    one, same, other = stage.batch(3, 0), stage.batch(3, 0), stage.batch(4, 0)
    assert torch.equal(one.queries, same.queries) and one.noise == same.noise != other.noise
    assert sum(len(ids) for ids, _ in one.groups) == len(one.steps) <= 16

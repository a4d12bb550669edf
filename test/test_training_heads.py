"""The small parts of stage 1, learnt by themselves: examples made once, weights for inputs as they come."""

import policy_tiny
import pytest
import torch
import training_tiny
from accelerate import Accelerator
from safetensors.torch import load_file

from vla_nodes.datasets.episode import DataError
from vla_nodes.training import config, initialize, trainer
from vla_nodes.training.stages import heads


@pytest.fixture
def made(tmp_path):
    """Settings of a part by name, on tiny data, from a tiny policy."""
    start = training_tiny.write_checkpoint(tmp_path / "start")
    data = training_tiny.write_data(tmp_path / "data")

    def build(stage, **others):
        values = {"stage": stage, "env": "tabletop", "data": [str(data)], "start": str(start),
                  "out": str(tmp_path / stage),
                  "steps": 30, "examples": 2, "held_out": 3, "batch": 64, "learning_rate": 0.01,
                  "device": "cpu"}  # fmt: skip
        return config.build(values | others)

    return build


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(heads, "IMAGES", 10)
    monkeypatch.setattr(heads, "SENTENCES", 10)
    heads._sampler.cache_clear()


def stage(values):
    return heads.HeadStage(initialize.begin(values, print).model, values)


@pytest.mark.parametrize("head", ["feasibility_head", "placement_head"])
def test_a_part_learns_alone_and_its_weights_take_inputs_as_they_come(made, head):
    values, only = made(head), head
    before = initialize.begin(values, print).model.state_dict()
    begun = stage(values)
    whole = (*begun.training, torch.zeros_like(begun.training.inputs))
    first = float(begun.objective(whole)[0])
    assert trainer.Loop(begun, values, Accelerator(cpu=True)).run()
    after = load_file(values.out / "weights.safetensors")
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {only}
    assert float(begun.objective(whole)[0]) < first and "loss" in begun.measure()
    part = policy_tiny.tiny_model(begun.model.config).get_submodule(only)
    part.load_state_dict({k.removeprefix(f"{only}."): v for k, v in after.items() if k.startswith(f"{only}.")})
    inputs = begun.held.inputs
    said = begun.objective.part((inputs - begun.objective.mean) / begun.objective.spread)
    torch.testing.assert_close(part(inputs), said, rtol=1e-3, atol=1e-3)


def test_examples_are_made_once_and_anew_for_other_eyes(made):
    values = made("feasibility_head")
    model = initialize.begin(values, print).model.eval()
    wanted = heads.examples(model, values, held=False)
    files = sorted((values.out / "examples").iterdir())
    assert [f.name for f in files] == ["0000.safetensors", "0001.safetensors"]
    stamps = [f.stat().st_mtime_ns for f in files]
    files[1].unlink()  # stopped before it was made
    found = heads.examples(model, values, held=False)
    assert all(map(torch.equal, found, wanted)) and files[0].stat().st_mtime_ns == stamps[0]
    model.object_center.weight.data += 1
    other = heads.examples(model, values, held=False)
    assert files[0].stat().st_mtime_ns > stamps[0] and not torch.equal(other.inputs, wanted.inputs)


def test_the_judge_needs_something_held_out_to_be_measured_on(made):
    values = made("feasibility_head", held_out=100)
    (values.data[0] / "000.safetensors").unlink()
    with pytest.raises(DataError, match="no episode to ask about that is held out for measuring"):
        stage(values)


def test_the_offset_is_what_aims(made):
    """Its examples say what VlaPolicy.place_position would have to say."""
    values = made("placement_head")
    model = initialize.begin(values, print).model.eval()
    inputs, answers = heads.examples(model, values, held=False)
    width = inputs.shape[1] - 3
    goal = torch.randn(len(inputs), 3)
    wanted = goal + 0.1 * model.placement_head(model.placement_input(goal, inputs[:, :width]))
    torch.testing.assert_close(model.place_position(goal, inputs[:, :width]), wanted)
    assert answers.shape == (len(inputs), 3) and 0 < answers.norm(dim=1).max() < 10

"""8-bit convolutions: the arithmetic they claim to be, ranges bound to their weights, an engine that runs them."""

import dataclasses
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from policy_tiny import CONFIG, tiny_model
from torch import nn

from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.inference import graphs, quantize
from vla_nodes.policy.inference.engine import EngineError, TorchEngine

# wide enough that some convolutions are worth rounding
WIDE = dataclasses.replace(CONFIG, vision_widths=(4, 16, 16, 16))


@pytest.fixture(scope="module")
def model():
    model = tiny_model(WIDE, seed=2)  # with some seeds the judge, on random weights, turns on a hair
    for parameter in model.vision.sink.parameters():  # with random weights a role sees hardly anything, and a share of
        parameter.zero_().sub_(20 if parameter.dim() == 1 else 0)  # next to nothing cannot be compared
    return model


def frames(model, count=4):
    prepared = engines.example_instruction(model)
    # Every other one without depth, as the ticks that engines are proven on have it too: other points, other ranges.
    return [(*engines.example(model, seed, depth=seed % 2 == 0)[:2], prepared) for seed in range(count)]


@pytest.fixture(scope="module")
def ranges(model):
    return quantize.calibrate(model, frames(model))


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-2.0, 5.0), (0.5, 4.0)])
def test_it_is_integer_arithmetic(low, high):
    """Against the convolution of rounded integers, written out; zero padding stays exactly zero."""
    torch.manual_seed(1)
    conv = nn.Conv2d(16, 5, 3, 2, 1)
    layer = quantize.QuantisedConv(conv, low, high)
    x = low + (high - low) * torch.rand(2, 16, 9, 9)
    step = (high - min(low, 0.0)) / 255
    zero = round(-min(low, 0.0) / step)
    codes = (torch.round(x / step) + zero).clamp(0, 255) - zero
    scale = conv.weight.detach().abs().amax((1, 2, 3)) / 127
    weights = torch.round(conv.weight / scale[:, None, None, None])
    exact = F.conv2d(codes.double(), weights.double(), None, 2, 1) * step * scale[:, None, None].double()
    assert torch.allclose(layer(x).double(), exact + conv.bias[:, None, None], atol=1e-4)
    assert (codes == codes.round()).all() and codes.unique().numel() > 100
    assert torch.equal(layer(torch.zeros(1, 16, 4, 4))[0, :, 0, 0], conv.bias)


def test_rounding_is_fine_enough_and_clips_what_it_never_saw():
    torch.manual_seed(2)
    conv = nn.Conv2d(32, 8, 3, 1, 1)
    layer = quantize.QuantisedConv(conv, -1.0, 3.0)
    x = -1 + 4 * torch.rand(1, 32, 12, 12)
    assert float((layer(x) - conv(x)).abs().max() / conv(x).abs().max()) < 0.03
    assert torch.equal(layer(x + 100), layer(torch.full_like(x, 3.0)))


def test_folding_batch_norms_changes_nothing(model):
    folded = quantize.folded(model)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.vision.modules()) > 0
    for inputs in frames(model, 2):
        wanted, found = (m.encode_observation(*inputs)[0] for m in (model, folded))
        assert engines.difference(engines.flatten(found), engines.flatten(wanted)) <= 1e-4
    assert folded.core is model.core  # only the vision is copied


def test_the_image_layer_and_the_map_are_left_alone(model, ranges):
    names = set(ranges)
    assert names == set(quantize.heavy(model)) and len(names) >= 4
    assert not any(name.startswith("vision.encoder.mix") or name.endswith("stem.0.0") for name in names)
    low, high = ranges[sorted(names)[0]]
    assert low <= 0 < high


def test_rounded_model_stays_near(model, ranges):
    rounded = quantize.quantised(model, ranges)
    assert sum(isinstance(m, quantize.QuantisedConv) for m in rounded.modules()) == len(ranges)
    wanted, _ = engines.run_ticks(TorchEngine(model), model, 4)
    found, _ = engines.run_ticks(TorchEngine(rounded), model, 4)
    assert 1e-5 < engines.difference(found, wanted) <= engines.TOLERANCE["int8"]


def test_ranges_come_back_from_disk(model, ranges, tmp_path):
    assert quantize.load(tmp_path, model) is None
    quantize.save(tmp_path, model, ranges, {"frames": 4})
    assert quantize.load(tmp_path, model) == ranges


@pytest.mark.parametrize("damage", [
    "", "[]", "{", '{"format": 9, "ranges": {}, "vision": ""}', '{"format": 1, "ranges": {"a": [0]}, "vision": ""}',
    '{"format": 1, "ranges": {"a": [0, Infinity]}, "vision": ""}', "[" * 100000], ids=range(7))  # fmt: skip
def test_damaged_ranges_are_refused_in_one_line(model, tmp_path, damage):
    (tmp_path / quantize.FILE).write_text(damage)
    with pytest.raises(ValueError, match="calibrate") as info:
        quantize.load(tmp_path, model)
    assert "\n" not in str(info.value)


def test_ranges_of_other_weights_are_refused(model, ranges, tmp_path, caplog):
    quantize.save(tmp_path, model, ranges, {})
    other = tiny_model(WIDE, seed=9)
    with pytest.raises(ValueError, match="other weights"):
        quantize.load(tmp_path, other)
    with pytest.raises(EngineError, match="other weights"):
        engines.load(other, "openvino", 1, tmp_path, "int8")
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "version", lambda _: "")
        assert engines.load(other, "auto", 1, tmp_path).name == "torch"
    assert "not run in 8 bits" in caplog.text


def test_int8_without_ranges_says_how_to_get_them(model, tmp_path):
    with pytest.raises(EngineError, match="engine --calibrate"):
        engines.load(model, "openvino", 1, tmp_path, "int8")
    with pytest.raises(ValueError, match="another model"):
        quantize.quantised(model, {"vision.nowhere": (0.0, 1.0)})
    with pytest.raises(ValueError, match="no frames"):
        quantize.calibrate(model, [])


def test_a_processor_whose_sums_overflow_is_not_used_for_it(model, ranges, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "exact_int8", lambda: False)
    monkeypatch.setattr(graphs, "version", lambda _: "0")
    quantize.save(tmp_path, model, ranges, {})
    with pytest.raises(EngineError, match="VNNI"):
        engines.load(model, "openvino", 1, tmp_path, "int8")
    assert engines._kinds("openvino", "auto", ranges) == ("f32",)


@pytest.mark.skipif(not graphs.exact_int8(), reason="this processor has no VNNI")
def test_openvino_runs_it_and_auto_takes_it(model, ranges, tmp_path):
    pytest.importorskip("openvino")
    quantize.save(tmp_path, model, ranges, {})
    engine = engines.load(model, "openvino", 1, tmp_path)
    assert engine.precision == "int8" and 1e-5 < engine.error <= engines.TOLERANCE["int8"]
    wanted, _ = engines.run_ticks(TorchEngine(quantize.quantised(model, ranges)), model, 4)
    found, _ = engines.run_ticks(engine, model, 4)
    assert engines.difference(found, wanted) <= 2e-2  # the same rounding, but for values on an edge
    values = json.loads((tmp_path / quantize.FILE).read_text())
    values["ranges"] = {name: [0.0, 1e-3] for name in values["ranges"]}  # everything clipped: another picture
    (tmp_path / quantize.FILE).write_text(json.dumps(values))
    assert engines.load(model, "openvino", 1, tmp_path).precision == "f32"  # heard in the log, proven instead

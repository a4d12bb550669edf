"""Presets and their transformer twins, built on the meta device: sizes without memory."""

import json
import time
from functools import lru_cache

import pytest
import torch
from policy_tiny import contract

from vla_nodes.policy.configuration import PRESETS, PolicyConfig, preset
from vla_nodes.policy.modeling import VlaPolicy

TOTALS = {
    "nano": (4e6, 10e6),
    "nano-general": (4e6, 10e6),
    "mamba1-370m": (4.0e8, 4.8e8),
    "mamba2-2b": (2.0e9, 2.2e9),
    "mamba2-3b": (2.8e9, 3.2e9),
}


@lru_cache
def counts(name: str, mixer: str | None) -> tuple[int, int, float]:
    """Parameters of the policy and of its core, and the CPU seconds it took to build."""
    started = time.process_time()
    with torch.device("meta"):
        model = VlaPolicy(preset(name, mixer), contract(horizon=50))
    total, core = (sum(p.numel() for p in part.parameters()) for part in (model, model.core))
    return total, core, time.process_time() - started


@pytest.mark.parametrize("name", PRESETS)
def test_size_and_seconds(name):
    total, _, seconds = counts(name, None)
    low, high = TOTALS[name]
    assert low <= total <= high
    assert seconds < 60


@pytest.mark.parametrize("name", PRESETS)
def test_twin_is_as_large(name):
    """As a whole and in the core alone, where vision and language cannot hide a difference."""
    for own, twin in zip(counts(name, None)[:2], counts(name, "attention")[:2], strict=True):
        assert abs(twin - own) / own <= 0.05


def test_paper_scale():
    config = preset("mamba1-370m")
    assert (config.mixer, config.d_model, config.n_layer, config.d_state) == ("mamba1", 1024, 48, 16)
    assert preset("mamba1-370m", "attention").twin_of == "mamba1"
    assert preset("mamba1-370m", "mamba1") is config


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_its_own_file_format(name):
    for config in (preset(name), preset(name, "attention")):
        assert PolicyConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_errors_name_the_entry():
    with pytest.raises(ValueError, match="no preset 'huge'.*nano"):
        preset("huge")
    with pytest.raises(ValueError, match="unknown entry 'd_modle'"):
        PolicyConfig.from_dict({"d_modle": 3})
    with pytest.raises(ValueError, match="d_model"):
        PolicyConfig.from_dict({"d_model": -3})
    with pytest.raises(ValueError, match="n_layer"):
        PolicyConfig.from_dict({"n_layer": "four"})

"""Mamba-1 and Mamba-2 against the implementations in Hugging Face transformers, on the same weights.

transformers is a development dependency (CI installs it); without it these tests are skipped and say so.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from vla_nodes.policy.mamba.pretrained import load_core

transformers = pytest.importorskip("transformers", reason="parity needs `pip install transformers` (CI installs it)")
torch.set_num_threads(1)
TOLERANCE = 1e-4
WIDTH, TOKENS = 48, 45


def reference(kind: str, groups: int = 1, trained_like: bool = False):
    torch.manual_seed(7)
    common = {"vocab_size": 16, "hidden_size": WIDTH, "num_hidden_layers": 3, "state_size": 12}
    if kind == "mamba2":
        config = transformers.Mamba2Config(**common, num_heads=8, head_dim=12, n_groups=groups, chunk_size=16)
        model = transformers.Mamba2Model(config)
    else:
        model = transformers.MambaModel(transformers.MambaConfig(**common))
    model = model.float().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if trained_like:  # what training does: norms leave 1, D and A_log spread, projections grow heavy tails
            noise = torch.randn_like(p)
            p.add_(0.3 * noise if p.dim() == 1 else 0.05 * noise * noise.abs())
        elif name.endswith((".D", "norm.weight", "norm_f.weight", "conv1d.bias")):
            p.add_(0.1 * torch.randn_like(p))
    return model


def ours(model, folder):
    """Through the folder that transformers itself writes, so names and config are covered too."""
    model.save_pretrained(folder)
    return load_core(folder)


def error(a, b) -> float:
    return float((a - b).detach().abs().max() / b.abs().max())


@pytest.mark.parametrize("trained_like", [False, True], ids=["random", "trained-like"])
@pytest.mark.parametrize(("kind", "groups"), [("mamba2", 1), ("mamba2", 2), ("mamba1", 1)])
def test_prefill_and_steps_equal_transformers(kind, groups, trained_like, tmp_path):
    theirs = reference(kind, groups, trained_like)
    core = ours(theirs, tmp_path)
    x = torch.randn(2, TOKENS, WIDTH)
    cache = theirs(inputs_embeds=x[:, :30], use_cache=True)
    y, state = core(x[:, :30])
    assert error(y, cache.last_hidden_state) <= TOLERANCE
    past = cache.cache_params
    for t in range(30, TOKENS):
        step = theirs(inputs_embeds=x[:, t : t + 1], cache_params=past, use_cache=True)
        past = step.cache_params
        y, state = core(x[:, t : t + 1], state)
        assert error(y, step.last_hidden_state) <= TOLERANCE
    # what transformers has no call for on this path: several tokens from a carried state
    whole = theirs(inputs_embeds=x).last_hidden_state
    _, state = core(x[:, :10])
    y, _ = core(x[:, 10:], state)
    assert error(y, whole[:, 10:]) <= TOLERANCE


def test_gradients_equal_transformers(tmp_path):
    theirs = reference("mamba2")
    core = ours(theirs, tmp_path).requires_grad_(True)
    theirs.requires_grad_(True)
    x = torch.randn(1, 20, WIDTH)
    core(x)[0].square().sum().backward()
    theirs(inputs_embeds=x).last_hidden_state.square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, p in core.named_parameters():
        assert error(p.grad, expected[name].grad) <= 1e-3, name


def test_a_mismatch_names_the_tensors(tmp_path):
    ours(reference("mamba2"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"layers\.3\.\S+ is missing"):
        load_core(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"state_size": 6}))
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.\S+ has shape"):
        load_core(tmp_path)


def test_mamba_ssm_folders_load_and_pickles_are_refused(tmp_path):
    theirs = reference("mamba2")
    tensors = {"backbone." + n.replace("embeddings.", "embedding."): p for n, p in theirs.state_dict().items()}
    config = {"d_model": WIDTH, "n_layer": 3, "ssm_cfg": {"layer": "Mamba2", "d_state": 12, "headdim": 12}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FileNotFoundError, match="pickle"):
        load_core(tmp_path)
    save_file({n: p.contiguous() for n, p in tensors.items()}, tmp_path / "model.safetensors")
    x = torch.randn(1, 9, WIDTH)
    assert error(load_core(tmp_path)(x)[0], theirs(inputs_embeds=x).last_hidden_state) <= TOLERANCE


@pytest.mark.parametrize("kind", ["mamba2", "mamba1"])
def test_language_models_in_shards_load(kind, tmp_path):
    """MambaForCausalLM and Mamba2ForCausalLM as transformers saves them: prefix, head, embeddings, several files."""
    theirs = reference(kind)
    classes = {"mamba2": transformers.Mamba2ForCausalLM, "mamba1": transformers.MambaForCausalLM}
    whole = classes[kind](theirs.config).eval()
    whole.backbone.load_state_dict(theirs.state_dict())
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    x = torch.randn(1, 9, WIDTH)
    assert error(load_core(tmp_path)(x)[0], theirs(inputs_embeds=x).last_hidden_state) <= TOLERANCE
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    (tmp_path / "copy.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match="in another file"):
        load_core(tmp_path)
    (tmp_path / "copy.safetensors").unlink()
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated"):
        load_core(tmp_path)


@pytest.mark.parametrize(("change", "words"), [
    ({"hidden_act": "gelu"}, "hidden_act"), ({"model_type": "llama"}, "llama"), ({"use_bias": True}, "use_bias"),
    ({"time_step_limit": [0.0, 0.1]}, "time_step_limit"), ({"hidden_size": None}, "config.json"),
    ({"num_hidden_layers": "x"}, "config.json")], ids=str)  # fmt: skip
def test_what_this_core_cannot_do_is_said(change, words, tmp_path):
    config = {"model_type": "mamba2", "hidden_size": 48, "num_hidden_layers": 2, "state_size": 12, "head_dim": 12,
              "n_groups": 1, "num_heads": 8}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in (config | change).items() if v is not None}))
    with pytest.raises(ValueError, match=words):
        load_core(tmp_path)

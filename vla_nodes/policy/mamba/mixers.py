"""Mamba-2 and Mamba-1 mixers with an explicit carried state, and the residual stack built from them.

One call serves every use: `mixer(u, state) -> (y, state)` takes a whole sequence, several tokens continued from a
carried state (the tokens of one camera frame at a control tick), or one token. The state is a value: nothing is
written in place, so keeping an old one *is* a snapshot, and feeding it again is a restore.

Parameter names, shapes and projection orders are those of `mamba_ssm` 2.x, so its checkpoints load by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_nodes.policy.mamba import kernels
from vla_nodes.policy.mamba.scan import (
    causal_conv,
    selective_scan_chunked,
    selective_scan_step,
    ssd_chunked,
    ssd_step,
)


class MixerState(NamedTuple):
    """What one mixer carries from tick to tick. Constant in size however long the history is.

    conv (B, C, K-1): the last inputs of the causal convolution, oldest first, in the activations' dtype.
    ssm  (B, H, P, N) for Mamba-2, (B, E, N) for Mamba-1: the recurrent state, float32.
    """

    conv: Tensor
    ssm: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(y * silu(z)) over groups of channels: Mamba-2's output norm with norm_before_gate=False."""

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5):
        super().__init__(width, eps)
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        wide = x.float() * F.silu(gate.float())
        grouped = wide.unflatten(-1, (self.groups, -1))
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return (grouped.flatten(-2) * self.weight.float()).to(gate.dtype)


def _initial_dt_bias(size: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Tensor:
    """Inverse softplus of step sizes drawn log-uniformly, so that time scales span 10 to 1000 tokens."""
    dt = torch.exp(torch.rand(size) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


class Mamba2(nn.Module):
    """Mamba-2 mixer (SSD), arXiv 2405.21060 section 7; parameters as `mamba_ssm.modules.mamba2.Mamba2`."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        chunk_size: int = 32,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        inner = expand * d_model
        if inner % headdim or (inner // headdim) % ngroups:
            raise ValueError(f"expand*d_model = {inner} must split into heads of {headdim} in {ngroups} equal group(s)")
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, inner, d_state, d_conv
        self.headdim, self.nheads, self.ngroups, self.chunk_size = headdim, inner // headdim, ngroups, chunk_size
        self.dt_limit = dt_limit
        convolved = inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, inner + convolved + self.nheads, bias=False)  # [z, x, B, C, dt]
        self.conv1d = nn.Conv1d(convolved, convolved, d_conv, groups=convolved)  # holds weight and bias of causal_conv
        self.dt_bias = nn.Parameter(_initial_dt_bias(self.nheads))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.nheads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = GatedRMSNorm(inner, ngroups, norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> MixerState:
        """The state before the first token: zeros."""
        conv = torch.zeros(batch, self.conv1d.weight.shape[0], self.d_conv - 1, device=device, dtype=dtype)
        return MixerState(conv, torch.zeros(batch, self.nheads, self.headdim, self.d_state, device=device))

    def forward(self, u: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """u (B, L, D), L >= 1 -> y (B, L, D) and the state after token L."""
        batch, length, _ = u.shape
        if state is None:
            state = self.init_state(batch, u.device, u.dtype)
        z, xbc, dt = self.in_proj(u).split([self.d_inner, self.conv1d.weight.shape[0], self.nheads], dim=-1)
        xbc, conv = causal_conv(xbc, state.conv, self.conv1d.weight, self.conv1d.bias)
        groups = self.ngroups * self.d_state
        x, b, c = xbc.split([self.d_inner, groups, groups], dim=-1)
        x = x.reshape(batch, length, self.nheads, self.headdim)
        b = b.reshape(batch, length, self.ngroups, self.d_state)
        c = c.reshape(batch, length, self.ngroups, self.d_state)
        decay = -torch.exp(self.A_log.float())
        if kernels.use_for(u):
            y, ssm = kernels.ssd(x, dt, decay, b, c, self.D, self.dt_bias, state.ssm, self.dt_limit)
        else:
            x, b, c = x.float(), b.float(), c.float()
            dt = F.softplus(dt.float() + self.dt_bias.float())
            if self.dt_limit != (0.0, float("inf")):
                dt = dt.clamp(*self.dt_limit)
            if length == 1:
                y, ssm = ssd_step(x[:, 0], dt[:, 0], decay, b[:, 0], c[:, 0], state.ssm)
                y = y.unsqueeze(1)
            else:
                y, ssm = ssd_chunked(x, dt, decay, b, c, state.ssm, self.chunk_size)
            y = y + self.D.float().unsqueeze(-1) * x
        y = self.norm(y.reshape(batch, length, self.d_inner), z)
        return self.out_proj(y), MixerState(conv, ssm)


class Mamba1(nn.Module):
    """Mamba-1 mixer (selective scan), arXiv 2312.00752; parameters as `mamba_ssm.modules.mamba_simple.Mamba`."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        chunk_size: int = 32,
    ):
        super().__init__()
        inner = expand * d_model
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, inner, d_state, d_conv
        self.dt_rank = dt_rank or math.ceil(d_model / 16)
        self.chunk_size = chunk_size
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)  # [x, z]
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)  # [dt, B, C]
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_initial_dt_bias(inner))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> MixerState:
        """The state before the first token: zeros."""
        conv = torch.zeros(batch, self.d_inner, self.d_conv - 1, device=device, dtype=dtype)
        return MixerState(conv, torch.zeros(batch, self.d_inner, self.d_state, device=device))

    def forward(self, u: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """u (B, L, D), L >= 1 -> y (B, L, D) and the state after token L."""
        first = state is None
        if state is None:
            state = self.init_state(u.shape[0], u.device, u.dtype)
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, conv = causal_conv(x, state.conv, self.conv1d.weight, self.conv1d.bias)
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        decay = -torch.exp(self.A_log.float())
        stepping = u.shape[1] == 1 and not torch.is_grad_enabled()
        # upstream's scan starts from zero, and its step has no gradient
        if (first or stepping) and kernels.use_for(u, scan=not stepping):
            dt = F.linear(dt, self.dt_proj.weight)
            y, ssm = kernels.selective_scan(x, dt, decay, b, c, self.D, self.dt_proj.bias, z, state.ssm, first)
        else:
            dt = F.softplus(self.dt_proj(dt).float())
            wide, b, c = x.float(), b.float(), c.float()
            if u.shape[1] == 1:
                y, ssm = selective_scan_step(wide[:, 0], dt[:, 0], decay, b[:, 0], c[:, 0], state.ssm)
                y = y.unsqueeze(1)
            else:
                y, ssm = selective_scan_chunked(wide, dt, decay, b, c, state.ssm, self.chunk_size)
            y = ((y + self.D.float() * wide) * F.silu(z.float())).to(u.dtype)
        return self.out_proj(y), MixerState(conv, ssm)


class Block(nn.Module):
    """Pre-norm residual block: x + mixer(norm(x))."""

    def __init__(self, d_model: int, mixer: Mamba1 | Mamba2, norm_eps: float = 1e-5):
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.mixer: Mamba1 | Mamba2 = mixer

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> MixerState:
        return self.mixer.init_state(batch, device, dtype)

    def forward(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        y, state = self.mixer(self.norm(x), state)
        return x + y, state


class SequenceCore(nn.Module):
    """A stack of blocks with a final norm: embeddings in, embeddings out, one carried state per block.

    mixer: "mamba2", "mamba1", or "attention", the transformer twin of the `twin_of` core of the same arguments (same
    width, parameter count within 5 %; see attention.py), for comparison only.
    Names are those of `mamba_ssm`'s backbone: layers.{i}.norm.weight, layers.{i}.mixer.*, norm_f.weight.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        mixer: str = "mamba2",
        d_state: int | None = None,
        headdim: int = 64,
        expand: int = 2,
        d_conv: int = 4,
        ngroups: int = 1,
        chunk_size: int | None = None,
        norm_eps: float = 1e-5,
        twin_of: str = "mamba2",
    ):
        super().__init__()
        if twin_of not in ("mamba2", "mamba1"):
            raise ValueError(f"twin_of {twin_of!r} is not one of mamba2, mamba1")
        self.d_model, self.n_layer, self.mixer = d_model, n_layer, mixer
        blocks: Sequence[Any]  # Block, or attention.TransformerBlock
        if mixer == "mamba2":
            blocks = [
                Block(d_model, Mamba2(d_model, d_state or 128, d_conv, expand, headdim, ngroups, chunk_size or 32,
                                      norm_eps=norm_eps), norm_eps)
                for _ in range(n_layer)
            ]  # fmt: skip
        elif mixer == "mamba1":
            blocks = [
                Block(d_model, Mamba1(d_model, d_state or 16, d_conv, expand, None, chunk_size or 32), norm_eps)
                for _ in range(n_layer)
            ]
        elif mixer == "attention":
            from vla_nodes.policy.mamba.attention import twin_blocks

            entries = d_state or (16 if twin_of == "mamba1" else 128)
            blocks = twin_blocks(d_model, n_layer, entries, headdim, expand, d_conv, ngroups, norm_eps, twin_of)
        else:
            raise ValueError(f"mixer {mixer!r} is not one of mamba2, mamba1, attention")
        self.layers = nn.ModuleList(blocks)
        self.norm_f = RMSNorm(d_model, norm_eps)
        for block in blocks:  # deep residual stacks start near the identity (GPT-2; mamba_ssm _init_weights)
            with torch.no_grad():
                block.mixer.out_proj.weight /= math.sqrt(len(self.layers))

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple:
        """The state before the first token, one entry per block."""
        layers: Any = self.layers
        return tuple(block.init_state(batch, device, dtype) for block in layers)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """x (B, L, D) -> y (B, L, D) and the state after token L; state None starts a new history."""
        if state is None:
            state = (None,) * len(self.layers)
        after = []
        for block, carried in zip(self.layers, state, strict=True):
            x, carried = block(x, carried)
            after.append(carried)
        return self.norm_f(x), tuple(after)


def map_state(function: Callable[[Tensor], Any], state: Any) -> Any:
    """Applies a function to every tensor of a state (nested tuples, named tuples, dicts and None), keeping its
    structure."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: map_state(function, part) for name, part in state.items()}
    if hasattr(state, "map_tensors"):  # a state that is more than its tensors (the twin's cache)
        return state.map_tensors(function)
    parts = [map_state(function, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)

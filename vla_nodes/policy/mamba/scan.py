"""The arithmetic of selective state space models as pure functions on explicit states, in readable PyTorch.

Two recurrences, one per function pair (`*_chunked` for sequences, `*_step` for one token); both forms of a pair are
the same function of (input, state) up to rounding:

* SSD (Mamba-2; Dao & Gu, "Transformers are SSMs", arXiv 2405.21060), one scalar decay per head and token:
      S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        S in R^{P x N}
      y_t = S_t C_t + D x_t
* selective scan (Mamba-1; Gu & Dao, arXiv 2312.00752), one decay per channel and state entry:
      h_t = exp(dt_t A) * h_{t-1} + dt_t B_t x_t        h in R^{N}, one per channel
      y_t = C_t . h_t + D x_t

Letters, as in those papers: B batch, L tokens, H heads, P head width, G groups sharing B_t and C_t, N state entries,
E inner channels (= H P), K convolution taps. States are float32 whatever the activations are: they integrate over the
whole history of the robot. No function here writes into its arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution followed by SiLU, continued from the last K-1 inputs.

    x (B, L, C), state (B, C, K-1) oldest first, weight (C, 1, K), bias (C,) -> y (B, L, C), new state (B, C, K-1).
    Written as K shifted multiply-adds: for the few tokens of a control tick that is twice as fast as conv1d on a CPU.
    """
    length, taps = x.shape[1], weight.shape[-1]
    window = torch.cat([state.to(x.dtype).transpose(1, 2), x], dim=1)  # (B, L+K-1, C)
    weight = weight.to(x.dtype)
    y = torch.zeros((), dtype=x.dtype, device=x.device) if bias is None else bias.to(x.dtype)
    for k in range(taps):
        y = torch.addcmul(y, window[:, k : k + length], weight[:, 0, k])
    return F.silu(y), window[:, length:].transpose(1, 2)


def ssd_chunked(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """SSD over a sequence of any length, as matrix products inside chunks and a short recurrence between them.

    x (B, L, H, P), dt (B, L, H) >= 0, decay A (H,) < 0, b and c (B, L, G, N), state (B, H, P, N)
    -> y (B, L, H, P) without the D x term, state after the last token (B, H, P, N). All float32.
    Cost O(L Q (N + P) + L P N) per head with Q = chunk_size; the result does not depend on Q beyond rounding.
    """
    batch, length, heads, width = x.shape
    if length <= chunk_size:
        return ssd_one_chunk(x, dt, decay, b, c, state)
    groups, entries = b.shape[2:]
    per_group = heads // groups
    q = chunk_size
    chunks = -(-length // q)
    if pad := chunks * q - length:  # dt = 0 keeps the state (exp(0) = 1) and adds nothing to it
        x, dt = F.pad(x, (0, 0, 0, 0, 0, pad)), F.pad(dt, (0, 0, 0, pad))
        b, c = F.pad(b, (0, 0, 0, 0, 0, pad)), F.pad(c, (0, 0, 0, 0, 0, pad))

    # (batch, chunk, group, ...): heads of one group share B and C, so the products run once per group where they can.
    x = (x * dt.unsqueeze(-1)).view(batch, chunks, q, groups, per_group, width)
    b = b.reshape(batch, chunks, q, groups, entries).transpose(2, 3)  # (B, c, G, Q, N)
    c = c.reshape(batch, chunks, q, groups, entries).transpose(2, 3)
    log_decay = (dt * decay).view(batch, chunks, q, groups, per_group).permute(0, 1, 3, 4, 2)  # (B, c, G, R, Q)
    cumulative = log_decay.cumsum(-1)

    # 1. Inside a chunk: y_i += sum_{j <= i} exp(cum_i - cum_j) (C_i . B_j) dt_j x_j.
    future = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)
    spread = cumulative.unsqueeze(-1) - cumulative.unsqueeze(-2)  # (B, c, G, R, Q, Q)
    weights = torch.exp(spread.masked_fill(future, float("-inf"))) * (c @ b.transpose(-1, -2)).unsqueeze(3)
    y = weights @ x.permute(0, 1, 3, 4, 2, 5)  # (B, c, G, R, Q, P)
    y = y.permute(0, 1, 4, 2, 3, 5)  # (B, c, Q, G, R, P)

    # 2. What each chunk adds to the state, decayed to the chunk's end: (B, c, G, R P, N).
    to_end = torch.exp(cumulative[..., -1:] - cumulative).permute(0, 1, 4, 2, 3).unsqueeze(-1)  # (B, c, Q, G, R, 1)
    added = (x * to_end).permute(0, 1, 3, 4, 5, 2).reshape(batch, chunks, groups, per_group * width, q) @ b

    # 3. The recurrence over chunks, on states only.
    total = torch.exp(cumulative[..., -1]).reshape(batch, chunks, heads, 1, 1)
    added = added.view(batch, chunks, heads, width, entries)
    entering = []
    for kept, gained in zip(total.unbind(1), added.unbind(1), strict=True):  # unbind: its gradient is one stack
        entering.append(state)
        state = state * kept + gained

    # 4. What the state that entered a chunk contributes to its outputs.
    before = torch.stack(entering, 1).view(batch, chunks, groups, per_group * width, entries)
    carried = (c @ before.transpose(-1, -2)).view(batch, chunks, groups, q, per_group, width).transpose(2, 3)
    y = y + carried * torch.exp(cumulative).permute(0, 1, 4, 2, 3).unsqueeze(-1)
    return y.reshape(batch, chunks * q, heads, width)[:, :length], state


def ssd_one_chunk(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """SSD over one chunk, shapes as `ssd_chunked`: the few tokens of a control tick, in as few operations as there are.

    At this size a tick costs what its operations cost to start, in PyTorch and in every exported engine alike.
    """
    heads, groups = x.shape[2], b.shape[2]
    x = (x * dt.unsqueeze(-1)).transpose(1, 2)  # (B, H, L, P)
    b, c = b.transpose(1, 2), c.transpose(1, 2)  # (B, G, L, N)
    cumulative = (dt * decay).transpose(1, 2).cumsum(-1)  # (B, H, L)
    future = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).triu(1)
    spread = (cumulative.unsqueeze(-1) - cumulative.unsqueeze(-2)).masked_fill(future, float("-inf"))
    products = c @ b.transpose(-1, -2)  # (B, G, L, L), of what is shared by a group
    if groups > 1:  # one group broadcasts by itself
        products, b, c = (v.repeat_interleave(heads // groups, 1) for v in (products, b, c))
    from_start = torch.exp(cumulative).unsqueeze(-1)  # (B, H, L, 1)
    y = (torch.exp(spread) * products) @ x + (c * from_start) @ state.transpose(-1, -2)
    to_end = torch.exp(cumulative[..., -1:] - cumulative).unsqueeze(-1)
    state = state * from_start[:, :, -1:] + (x * to_end).transpose(-1, -2) @ b
    return y.transpose(1, 2), state


def ssd_step(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: x (B, H, P), dt (B, H), decay (H,), b, c (B, G, N), state (B, H, P, N) -> y (B, H, P), state."""
    per_group = x.shape[1] // b.shape[1]
    if per_group > 1:
        b, c = b.repeat_interleave(per_group, 1), c.repeat_interleave(per_group, 1)
    state = state * torch.exp(dt * decay)[..., None, None] + (x * dt.unsqueeze(-1)).unsqueeze(-1) * b.unsqueeze(-2)
    return (state @ c.unsqueeze(-1)).squeeze(-1), state


def selective_scan_chunked(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Mamba-1 scan over a sequence of any length: all chunks advance together token by token, then are chained.

    x and dt (B, L, E), decay A (E, N) < 0, b and c (B, L, N), state (B, E, N)
    -> y (B, L, E) without the D x term, state after the last token (B, E, N). All float32.
    The decay differs per state entry, so there is no matrix-product form; Q + L/Q vectorised steps instead of L.
    """
    batch, length, channels = x.shape
    entries = b.shape[-1]
    q = min(chunk_size, length)
    chunks = -(-length // q)
    if pad := chunks * q - length:
        x, dt, b, c = (F.pad(v, (0, 0, 0, pad)) for v in (x, dt, b, c))
    gain = torch.exp(dt.unsqueeze(-1) * decay).view(batch, chunks, q, channels, entries)
    drive = ((dt * x).unsqueeze(-1) * b.unsqueeze(-2)).view(batch, chunks, q, channels, entries)

    gains, drives = gain.unbind(2), drive.unbind(2)
    local, reach = [drives[0]], [gains[0]]  # state from a zero start; decay from the chunk's start
    for g, d in zip(gains[1:], drives[1:], strict=True):
        local.append(g * local[-1] + d)
        reach.append(g * reach[-1])
    entering = []
    for kept, gained in zip(reach[-1].unbind(1), local[-1].unbind(1), strict=True):
        entering.append(state)
        state = kept * state + gained
    history = torch.stack(local, 2) + torch.stack(reach, 2) * torch.stack(entering, 1).unsqueeze(2)
    y = (history.view(batch, chunks * q, channels, entries) @ c.unsqueeze(-1)).squeeze(-1)
    return y[:, :length], state


def selective_scan_step(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x, dt (B, E), decay (E, N), b, c (B, N), state (B, E, N) -> y (B, E), state."""
    state = torch.exp(dt.unsqueeze(-1) * decay) * state + (dt * x).unsqueeze(-1) * b.unsqueeze(1)
    return (state @ c.unsqueeze(-1)).squeeze(-1), state

"""The `mamba_ssm` CUDA and Triton kernels behind the mixers of ssm.py, where CUDA and the package are there.

`mamba_ssm` is an optional extra, imported on first use only. `set_backend("reference")` forces the readable PyTorch
form, `set_backend("mamba_ssm")` demands the kernels and raises with the reason where they are missing; "auto" (the
default) takes them for CUDA tensors when they import. `backend_report()` says which one runs and why.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

CHUNK = 256  # upstream's default on a GPU; the result does not depend on it
_choice = "auto"


def set_backend(name: str) -> None:
    """Chooses "auto", "reference" or "mamba_ssm" for the whole process."""
    global _choice
    if name not in ("auto", "reference", "mamba_ssm"):
        raise ValueError(f"backend {name!r} is not one of auto, reference, mamba_ssm")
    if name == "mamba_ssm" and (reason := why_unavailable()):
        raise RuntimeError(f"the mamba_ssm kernels cannot run: {reason}")
    _choice = name


@lru_cache(maxsize=2)
def why_unavailable(scan: bool = False) -> str:
    """ "" when the kernels can run here, else one line saying why not.

    scan: also Mamba-1's over a sequence, a compiled extension that a Triton-only install of mamba_ssm lacks; newer
    versions import without it and fail when it is called.
    """
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # noqa: F401
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # noqa: F401

        if scan:
            import selective_scan_cuda  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"mamba_ssm does not import: {error}"
    return ""


def backend_report() -> str:
    """One line for logs and benchmarks: what CUDA tensors run through."""
    if _choice == "reference":
        return "reference PyTorch (chosen)"
    return f"reference PyTorch ({why_unavailable()})" if why_unavailable() else "mamba_ssm kernels"


def use_for(x: Tensor, scan: bool = False) -> bool:
    """Whether this tensor's mixer runs through the kernels; scan: the one of Mamba-1 over a sequence."""
    return x.is_cuda and _choice != "reference" and not why_unavailable(scan)


def ssd(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Kernel form of `ssd_chunked` / `ssd_step` with softplus(dt + dt_bias) and D x inside; shapes as there."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inference = not torch.is_grad_enabled() and dt_limit == (0.0, float("inf"))
    if x.shape[1] == 1 and inference:  # the update kernel has no gradient and no dt limit
        _, _, heads, width = x.shape
        entries = b.shape[-1]
        state = state.clone()  # the kernel writes in place; states here are values
        y = selective_state_update(
            state,
            x[:, 0],
            dt[:, 0].unsqueeze(-1).expand(-1, -1, width),
            decay.view(-1, 1, 1).expand(heads, width, entries),
            b[:, 0],
            c[:, 0],
            d.float().unsqueeze(-1).expand(heads, width),
            dt_bias=dt_bias.float().unsqueeze(-1).expand(heads, width),
            dt_softplus=True,
        )
        return y.unsqueeze(1), state
    return mamba_chunk_scan_combined(
        x, dt, decay, b, c, CHUNK,
        D=d, dt_bias=dt_bias, initial_states=state, dt_softplus=True, dt_limit=dt_limit, return_final_states=True,
    )  # fmt: skip


def selective_scan(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    z: Tensor,
    state: Tensor,
    first: bool,
) -> tuple[Tensor, Tensor]:
    """Kernel form of the Mamba-1 scan with softplus, D x and the gate inside; x, dt, z (B, L, E).

    Over a sequence it starts from zero, and its last state has no gradient: upstream drops it. It is detached here, so
    training that carries a state from call to call is truncated back-propagation, not silently wrong.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    if x.shape[1] == 1 and not torch.is_grad_enabled():
        state = state.clone()
        y = selective_state_update(
            state, x[:, 0], dt[:, 0], decay, b[:, 0], c[:, 0], d.float(), z=z[:, 0],
            dt_bias=dt_bias.float(), dt_softplus=True,
        )  # fmt: skip
        return y.unsqueeze(1), state
    if not first:
        raise RuntimeError("the Mamba-1 kernel cannot continue a scan with gradients; use the reference backend")
    channels_first = (v.transpose(1, 2).contiguous() for v in (x, dt, b, c, z))
    u, delta, b, c, gate = channels_first
    y, state = selective_scan_fn(
        u, delta, decay, b, c, d.float(), z=gate, delta_bias=dt_bias.float(), delta_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    return y.transpose(1, 2), state.detach()

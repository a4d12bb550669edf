"""The calls into mamba_ssm's kernels, against their documented contract, without a GPU.

The kernels themselves need CUDA. What can go wrong on our side is the call: shapes, dtypes, strides, what is biased and
gated inside, where a state enters and leaves. Stand-ins with upstream's asserts (state-spaces/mamba, ops/triton and
csrc/selective_scan) compute the plain recurrence in float32; the mixers must give the same through them as without.
"""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from vla_nodes.policy.mamba import kernels as ssm_kernels
from vla_nodes.policy.mamba import mixers

torch.set_num_threads(1)
CALLS: list[str] = []


def chunk_scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
               cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
               return_varlen_states=False):  # fmt: skip
    """mamba_chunk_scan_combined's contract."""
    CALLS.append("chunk_scan")
    batch, length, heads, width = x.shape
    groups, entries = B.shape[2:]
    assert heads % groups == 0 and B.shape == (batch, length, groups, entries) == C.shape
    assert dt.shape == (batch, length, heads) and A.shape == (heads,) == dt_bias.shape == D.shape
    assert initial_states.shape == (batch, heads, width, entries) and initial_states.dtype == torch.float32
    assert x.dtype == B.dtype == C.dtype == dt.dtype and A.dtype == torch.float32
    assert chunk_size & (chunk_size - 1) == 0 and chunk_size >= 16 and dt_softplus and return_final_states and z is None
    step = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    of = torch.arange(heads) * groups // heads
    state, out = initial_states, []
    for t in range(length):
        grown = torch.einsum("bhp,bhn->bhpn", step[:, t, :, None] * x[:, t].float(), B[:, t, of].float())
        state = state * torch.exp(step[:, t] * A)[..., None, None] + grown
        y = torch.einsum("bhpn,bhn->bhp", state, C[:, t, of].float())
        out.append(y + D.float()[:, None] * x[:, t].float())
    return torch.stack(out, 1).to(x.dtype), state


def state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """selective_state_update's contract: writes the state in place."""
    CALLS.append("state_update")
    flat = state.dim() == 3
    if flat:
        assert D.shape == dt_bias.shape == (state.shape[1],) and A.shape == state.shape[1:]
        x, dt, z = (None if v is None else v.unsqueeze(1) for v in (x, dt, z))
        B, C, A, D, dt_bias = B.unsqueeze(1), C.unsqueeze(1), A.unsqueeze(0), D.unsqueeze(0), dt_bias.unsqueeze(0)
    into = state.unsqueeze(1) if flat else state
    batch, heads, width, entries = into.shape
    groups = B.shape[1]
    assert x.shape == dt.shape == (batch, heads, width) and A.shape == (heads, width, entries)
    assert B.shape == C.shape == (batch, groups, entries) and D.shape == dt_bias.shape == (heads, width)
    assert A.dtype == into.dtype == torch.float32 and dt_softplus and not torch.is_grad_enabled()
    if not flat:  # the fast path upstream takes for Mamba-2: one decay and one step a head
        assert A.stride(-1) == A.stride(-2) == dt.stride(-1) == dt_bias.stride(-1) == 0
    step = F.softplus(dt.float() + dt_bias.float())
    of = torch.arange(heads) * groups // heads
    into.mul_(torch.exp(step.unsqueeze(-1) * A))
    into.add_((step * x.float()).unsqueeze(-1) * B[:, of].float().unsqueeze(2))
    y = torch.einsum("bhpn,bhn->bhp", into, C[:, of].float()) + D.float() * x.float()
    y = y if z is None else y * F.silu(z.float())
    return (y.squeeze(1) if flat else y).to(x.dtype)


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """selective_scan_fn's contract."""
    CALLS.append("scan")
    batch, channels, length = u.shape
    assert delta.shape == z.shape == u.shape and A.shape[0] == channels and D.shape == delta_bias.shape == (channels,)
    assert B.shape == C.shape == (batch, A.shape[1], length) and A.shape[1] <= 256
    assert u.dtype == delta.dtype == B.dtype == C.dtype == z.dtype
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32 and delta_softplus and return_last_state
    assert all(v.stride(-1) == 1 for v in (u, delta, B, C, z))
    step = F.softplus(delta.float() + delta_bias[:, None])
    state, out = torch.zeros(batch, channels, A.shape[1]), []
    for t in range(length):
        grown = (step[..., t] * u[..., t].float()).unsqueeze(-1) * B[..., t].float().unsqueeze(1)
        state = torch.exp(step[..., t, None] * A) * state + grown
        out.append(torch.einsum("ben,bn->be", state, C[..., t].float()) + D * u[..., t].float())
    return (torch.stack(out, -1) * F.silu(z.float())).to(u.dtype), state


@pytest.fixture
def kernels(monkeypatch):
    """mamba_ssm as far as it is called."""
    for name, function in (("selective_scan_interface", ("selective_scan_fn", scan)),
                           ("triton.selective_state_update", ("selective_state_update", state_update)),
                           ("triton.ssd_combined", ("mamba_chunk_scan_combined", chunk_scan))):  # fmt: skip
        module = types.ModuleType(f"mamba_ssm.ops.{name}")
        setattr(module, *function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    CALLS.clear()
    switch = {"on": True}
    monkeypatch.setattr(ssm_kernels, "use_for", lambda x, scan=False: switch["on"])
    return switch


def core(mixer, dtype=torch.float32, **sizes):
    torch.manual_seed(3)
    sizes = {"d_model": 32, "n_layer": 2, "d_state": 16, "headdim": 16} | sizes
    model = mixers.SequenceCore(mixer=mixer, **sizes).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def error(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("mixer", "groups"), [("mamba2", 1), ("mamba2", 2), ("mamba1", 1)])
def test_a_stream_through_the_kernels(kernels, mixer, groups, dtype, within):
    """A start, ticks of several tokens from the carried state, single tokens: all as in the reference."""
    model = core(mixer, dtype, **({"ngroups": groups} if mixer == "mamba2" else {}))
    x = torch.randn(2, 23, 32).to(dtype)
    found = {}
    for on in (False, True):
        kernels["on"], state, out = on, None, []
        with torch.no_grad():
            for begin, end in ((0, 9), (9, 15), (15, 16), (16, 17), (17, 23)):
                y, state = model(x[:, begin:end], state)
                out.append(y)
        found[on] = [torch.cat(out, 1), *(t for layer in state for t in layer)]
    assert set(CALLS) == ({"chunk_scan", "state_update"} if mixer == "mamba2" else {"scan", "state_update"})
    for a, b in zip(found[True], found[False], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and error(a.float(), b.float()) <= within


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_states_stay_values(kernels, mixer):
    """The update kernel writes in place; the state it was given must not change."""
    model = core(mixer)
    with torch.no_grad():
        _, state = model(torch.randn(1, 5, 32))
        kept = mixers.map_state(torch.clone, state)
        token = torch.randn(1, 1, 32)
        first, _ = model(token, state)
        again, _ = model(token, state)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for x, y in zip(state, kept, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_gradients_take_a_path_that_has_them(kernels, mixer):
    """With gradients on, no in-place update and no scan from a state: and the numbers are the reference's."""
    model = core(mixer).requires_grad_(True)
    x = torch.randn(1, 6, 32)
    grads = {}
    for on in (False, True):
        kernels["on"] = on
        y, state = model(x[:, :5])
        tail, _ = model(x[:, 5:], mixers.map_state(torch.Tensor.detach, state))
        model.zero_grad()
        (y.square().sum() + tail.square().sum()).backward()
        grads[on] = [p.grad.clone() for p in model.parameters()]
    assert "state_update" not in CALLS and len(CALLS) > 0
    for a, b in zip(grads[True], grads[False], strict=True):
        assert error(a, b) <= 1e-3


def test_mamba1_kernel_truncates_gradients_at_a_call(kernels):
    """Upstream's scan drops its last state's gradient: the state says so by having none."""
    model = core("mamba1").requires_grad_(True)
    _, state = model(torch.randn(1, 5, 32))
    assert CALLS == ["scan", "scan"] and not any(layer.ssm.requires_grad for layer in state)


def test_an_install_without_the_compiled_scan_is_told_apart(monkeypatch, kernels):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    ssm_kernels.why_unavailable.cache_clear()
    try:
        assert ssm_kernels.why_unavailable() == ""
        assert "selective_scan_cuda" in ssm_kernels.why_unavailable(scan=True)
    finally:
        ssm_kernels.why_unavailable.cache_clear()

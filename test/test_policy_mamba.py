"""The SSM core against itself: every way of feeding a history gives the same numbers, and the state is a value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes.policy.mamba import mixers
from vla_nodes.policy.mamba.mixers import Mamba1, Mamba2, SequenceCore
from vla_nodes.policy.mamba.scan import selective_scan_chunked, selective_scan_step, ssd_chunked, ssd_step

torch.set_num_threads(1)
TOLERANCE = 1e-4
MIXERS = ("mamba2", "mamba1", "attention")


def core(mixer: str, seed: int = 0, **changes) -> SequenceCore:
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 16} | changes
    model = SequenceCore(mixer=mixer, **sizes).eval()
    for p in model.parameters():  # away from initialisation: trained weights are not that tame
        p.requires_grad_(False).add_(0.1 * torch.randn_like(p))
    return model


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def tensors(state) -> list[torch.Tensor]:
    found = []
    mixers.map_state(lambda t: found.append(t) or t, state)
    return found


def feed(model: SequenceCore, x: torch.Tensor, cuts: list[int], state=None):
    """Runs x in the pieces that `cuts` marks, carrying the state."""
    out, begin = [], 0
    for end in [*sorted(set(cuts) - {0}), x.shape[1]]:
        if end > begin:
            y, state = model(x[:, begin:end], state)
            out.append(y)
            begin = end
    return torch.cat(out, 1), state


@settings(max_examples=25, deadline=None)
@given(
    mixer=st.sampled_from(MIXERS), length=st.integers(1, 70), chunk=st.integers(1, 256), batch=st.integers(1, 3),
    cuts=st.lists(st.integers(1, 70), max_size=6), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_cut_and_chunk_size_equals_the_whole_sequence(mixer, length, chunk, batch, cuts, seed):
    x = torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed))
    whole, after = core(mixer, seed, chunk_size=64)(x)
    parts, after_parts = feed(core(mixer, seed, chunk_size=chunk), x, [c for c in cuts if c < length])
    assert error(parts, whole) <= TOLERANCE
    for a, b in zip(tensors(after_parts), tensors(after), strict=True):
        assert error(a, b) <= TOLERANCE


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 16, 63, 64, 65, 256])
def test_token_by_token_equals_parallel(mixer, chunk):
    model = core(mixer, chunk_size=chunk)
    x = torch.randn(2, 130, 32)
    whole, _ = model(x)
    steps, _ = feed(model, x, list(range(1, 130)))
    assert error(steps, whole) <= TOLERANCE


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd_chunked_is_the_recurrence_it_claims(groups):
    """Against the recurrence of the paper written out in float64, with groups that share B and C."""
    torch.manual_seed(groups)
    batch, length, heads, width, entries = 2, 37, 4, 6, 5
    x, b, c = (torch.randn(batch, length, n, m, dtype=torch.float64) for n, m in
               ((heads, width), (groups, entries), (groups, entries)))  # fmt: skip
    dt, decay = torch.rand(batch, length, heads).double(), -torch.rand(heads).double()
    state = start = torch.randn(batch, heads, width, entries, dtype=torch.float64)
    expected = []
    for t in range(length):
        of_head = [h * groups // heads for h in range(heads)]
        for_b, for_c = b[:, t, of_head], c[:, t, of_head]
        state = state * torch.exp(dt[:, t] * decay)[..., None, None]
        state = state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], for_b)
        expected.append(torch.einsum("bhpn,bhn->bhp", state, for_c))
    for chunk in (1, 8, 37, 100):
        y, end = ssd_chunked(x, dt, decay, b, c, start, chunk)
        assert torch.allclose(y, torch.stack(expected, 1), atol=1e-12) and torch.allclose(end, state, atol=1e-12)
    y, _ = ssd_step(x[:, 0], dt[:, 0], decay, b[:, 0], c[:, 0], start)
    assert torch.allclose(y, expected[0], atol=1e-12)


def test_selective_scan_step_is_the_recurrence_it_claims():
    torch.manual_seed(0)
    x, dt, b, c = torch.randn(2, 6), torch.rand(2, 6), torch.randn(2, 3), torch.randn(2, 3)
    decay, state = -torch.rand(6, 3), torch.randn(2, 6, 3)
    y, after = selective_scan_step(x, dt, decay, b, c, state)
    for i in range(2):
        for e in range(6):
            h = torch.exp(dt[i, e] * decay[e]) * state[i, e] + dt[i, e] * b[i] * x[i, e]
            assert torch.allclose(after[i, e], h, atol=1e-6) and torch.allclose(y[i, e], h @ c[i], atol=1e-5)


def copied(state):
    return mixers.map_state(torch.clone, state)


def rows(state, chosen):
    return mixers.map_state(lambda t: t[chosen], state)


def joined(*states):
    """The states of several streams as one batch."""
    parts = [tensors(state) for state in states]
    whole = iter([torch.cat(same) for same in zip(*parts, strict=True)])
    return mixers.map_state(lambda _: next(whole), states[0])


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_kept_state_restores_the_run_from_the_middle(mixer):
    model, x = core(mixer), torch.randn(1, 60, 32)
    _, state = model(x[:, :25])
    before = [t.clone() for t in tensors(state)]
    first, _ = feed(model, x[:, 25:], [1, 9, 10], state)
    model(torch.randn(1, 7, 32), state)  # another future from the same state must not disturb it
    for _ in range(2):
        again, _ = feed(model, x[:, 25:], [1, 9, 10], state)
        assert torch.equal(again, first)
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), before, strict=True))


@pytest.mark.parametrize("mixer", MIXERS)
def test_two_futures_from_one_state_do_not_mix(mixer):
    """Without any snapshot: a state is a value, whatever was continued from it."""
    model, x = core(mixer), torch.randn(2, 3, 9, 32)
    _, state = model(x[0])
    alone, _ = model(x[1], copied(state))
    _, other = model(-x[1], state)
    model(torch.randn(3, 4, 32), other)
    shared, _ = model(x[1], state)
    assert torch.equal(shared, alone)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_streams_batch_and_split(mixer):
    model, x = core(mixer), torch.randn(3, 20, 32)
    states = [model(x[i : i + 1, :12])[1] for i in range(3)]
    some, _ = model(x[[2, 0], 12:], rows(joined(*states), torch.tensor([2, 0])))
    whole, _ = model(x)
    assert error(some, whole[[2, 0], 12:]) <= TOLERANCE


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_pass_through_carried_states(mixer):
    """Full back-propagation through a cut sequence equals that through the whole; detached states cut it."""
    model = core(mixer, chunk_size=8).requires_grad_(True)
    x = torch.randn(1, 24, 32, requires_grad=True)
    (whole,) = torch.autograd.grad(model(x)[0].square().sum(), x)
    (parts,) = torch.autograd.grad(feed(model, x, [1, 10, 11])[0].square().sum(), x)
    assert error(parts, whole) <= 1e-3
    _, state = model(x[:, :10])
    (cut,) = torch.autograd.grad(model(x[:, 10:], mixers.map_state(torch.Tensor.detach, state))[0].square().sum(), x)
    assert float(cut[:, :10].abs().max()) == 0.0 and float(cut[:, 10:].abs().max()) > 0.0


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_state_keeps_its_size_and_stays_finite(mixer):
    model = core(mixer)
    _, state = model(torch.randn(1, 8, 32))
    size = sum(t.numel() for t in tensors(state))
    with torch.no_grad():
        for _ in range(8):
            _, state = model(100 * torch.randn(1, 500, 32), state)
    assert sum(t.numel() for t in tensors(state)) == size
    assert all(t.isfinite().all() for t in tensors(state))


@pytest.mark.parametrize("sizes", [(192, 4, 64, 64), (256, 3, 64, 32), (1024, 48, 128, 64), (2560, 64, 128, 64)])
def test_twin_has_the_same_parameter_count(sizes):
    d_model, n_layer, d_state, headdim = sizes
    with torch.device("meta"):
        a, b = (SequenceCore(d_model, n_layer, m, d_state, headdim) for m in ("mamba2", "attention"))
    counts = [sum(p.numel() for p in model.parameters()) for model in (a, b)]
    assert abs(counts[1] / counts[0] - 1) <= 0.05


def test_bfloat16_stays_near_float32_and_keeps_the_state_in_float32():
    model, x = core("mamba2"), torch.randn(1, 40, 32)
    exact, _ = model(x)
    rounded, state = core("mamba2").bfloat16()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16 and state[0].ssm.dtype == torch.float32
    assert error(rounded.float(), exact) < 0.05


def test_wrong_sizes_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="heads of 48"):
        Mamba2(32, headdim=48)
    with pytest.raises(ValueError, match="not one of mamba2, mamba1, attention"):
        SequenceCore(32, 1, mixer="lstm")
    assert Mamba1(40).dt_rank == 3


def test_kernel_backend_says_why_it_cannot_run(monkeypatch):
    from vla_nodes.policy.mamba import kernels

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.why_unavailable.cache_clear()
    with pytest.raises(RuntimeError, match="no CUDA device"):
        kernels.set_backend("mamba_ssm")
    with pytest.raises(ValueError, match="not one of"):
        kernels.set_backend("fast")
    assert "reference" in kernels.backend_report()
    kernels.why_unavailable.cache_clear()


def scan_inputs(kind: str, length: int, batch: int = 2) -> list[torch.Tensor]:
    """Inputs of a scan in float64, all with gradients: x, dt, decay, b, c, state."""
    generator = torch.Generator().manual_seed(length)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "ssd":
        shapes = (batch, length, 4, 3), (batch, length, 4), (4,), (batch, length, 2, 5), (batch, length, 2, 5)
        state = noise(batch, 4, 3, 5)
    else:
        shapes = (batch, length, 6), (batch, length, 6), (6, 5), (batch, length, 5), (batch, length, 5)
        state = noise(batch, 6, 5)
    x, dt, decay, b, c = (noise(*shape) for shape in shapes)
    return [t.requires_grad_(True) for t in (x, dt.abs().detach(), -decay.abs().detach(), b, c, state)]


@settings(max_examples=12, deadline=None)
@given(kind=st.sampled_from(["ssd", "scan"]), length=st.integers(1, 33), chunk=st.integers(1, 40))
def test_gradients_of_the_chunked_forms_equal_the_sequential_reference_in_float64(kind, length, chunk):
    """Every input's gradient, the state's among them, through outputs and last state; chunks shorter and longer."""
    chunked, step = {"ssd": (ssd_chunked, ssd_step), "scan": (selective_scan_chunked, selective_scan_step)}[kind]
    results = []
    for sequential in (False, True):
        x, dt, decay, b, c, state = inputs = scan_inputs(kind, length)
        if sequential:
            out = []
            for t in range(length):
                y, state = step(x[:, t], dt[:, t], decay, b[:, t], c[:, t], state)
                out.append(y)
            y, end = torch.stack(out, 1), state
        else:
            y, end = chunked(x, dt, decay, b, c, state, chunk)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        gradients = torch.autograd.grad((y * weight).sum() + end.square().sum(), inputs)
        results.append([y, end, *gradients])
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, atol=1e-10, rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(mixer=st.sampled_from(["mamba2", "mamba1"]), chunk=st.integers(1, 256), cut=st.integers(1, 29),
       groups=st.sampled_from([1, 2]), seed=st.integers(0, 1000))  # fmt: skip
def test_laws_of_the_state_in_the_middle(mixer, chunk, cut, groups, seed):
    """Keep, continue, go back; batch and split: at any cut, chunk size and number of groups."""
    extra = {"ngroups": groups} if mixer == "mamba2" else {}
    model = core(mixer, seed, chunk_size=chunk, **extra)
    x = torch.randn(3, 30, 32, generator=torch.Generator().manual_seed(seed))
    whole, _ = model(x)
    _, state = model(x[:, :cut])
    saved = copied(state)
    tail, _ = model(x[:, cut:], state)
    model(torch.ones(3, 3, 32), state)
    again, _ = model(x[:, cut:], saved)
    assert error(tail, whole[:, cut:]) <= TOLERANCE and torch.equal(again, tail)
    some, _ = model(x[[2, 0], cut:], joined(*(rows(saved, [i]) for i in (2, 0))))
    assert error(some, whole[[2, 0], cut:]) <= TOLERANCE

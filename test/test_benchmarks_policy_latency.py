"""The benchmark: what it refuses before allocating, that contenders are what they say, that it writes a report."""

import json

import pytest
import torch
from policy_tiny import CONFIG, CONTRACT, write_checkpoint

from vla_nodes.benchmarks import contenders, latency_plot, policy_latency
from vla_nodes.policy.mamba import mixers
from vla_nodes.policy.modeling import VlaPolicy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--device", "cuda"], "cuda"), (["--history", "10,many"], "many"), (["--history", "0"], "at least 1"),
    (["--engine", "tensorrt"], "tensorrt"), (["--precision", "f64"], "f64"), (["--ticks", "1"], "x>=2"),
    (["--checkpoint", "/nowhere"], "nowhere")], ids=str)  # fmt: skip
def test_wrong_requests_are_one_line(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert policy_latency.main([*arguments, "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("vla_nodes bench: ") and words in lines[-1] and "Traceback" not in "".join(lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mamba2-2b", "mamba2-3b"])
def test_what_does_not_fit_is_refused_before_allocating(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(contenders, "free_bytes", lambda _: 4 << 30)
    monkeypatch.setattr(VlaPolicy, "eval", lambda _: pytest.fail("it was built"))
    assert policy_latency.main(["--preset", name, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{name} needs" in error and "4096 are free" in error and "--no-twin" in error


def test_a_cache_that_does_not_fit_is_left_out(monkeypatch):
    twin = VlaPolicy(policy_latency.replace(CONFIG, mixer="attention"), CONTRACT)
    size = contenders.cache_bytes(twin, 1000)
    state = contenders.history(twin, 1000, "cpu")[0]
    assert size == sum(t.numel() * 4 for t in contenders.engines.flatten(state))
    assert contenders.cache_bytes(VlaPolicy(CONFIG, CONTRACT), 1000) == 0
    monkeypatch.setattr(contenders, "free_bytes", lambda _: 2 * size)
    assert "its cache needs" in contenders.too_long(twin, 1000, "cpu") and not contenders.too_long(twin, 500, "cpu")


def test_the_windowed_twin_is_the_twin():
    """With the whole history in its window it gives the core's numbers, tick by tick."""
    torch.manual_seed(0)
    core = mixers.SequenceCore(32, 4, "attention", 8, 16).eval().requires_grad_(False)
    x = torch.randn(1, 6 * 5, 32)
    _, state = core(x[:, :20])
    cache = [t for layer in state for t in (layer.keys, layer.values)]
    for position in (20, 25):
        tokens = x[:, position : position + 5]
        wanted, state = core(tokens, state)
        found, *new = contenders.TwinWindow(core)(tokens, torch.tensor([float(position)]), *cache)
        assert float((found - wanted).abs().max()) <= 1e-4
        cache = [torch.cat([kept, fresh], 2) for kept, fresh in zip(cache, new, strict=True)]


def test_a_report_of_a_tiny_checkpoint(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint), "--engine", "none", "--ticks", "3", "--history", "2,20"]
    assert policy_latency.main([*arguments, "--threads", "1", "--out", str(out)]) == 0
    report = json.loads((out / "nano-cpu.json").read_text())
    assert {(row["name"], row["history"]) for row in report["results"] if "tick" in row} == {
        (name, length) for name in ("mamba2 torch", "transformer torch") for length in (2, 20)
    }
    for row in report["results"]:
        if "tick" not in row:
            continue
        parts = row["vision"]["p50"] + row["core"]["p50"] + row["head"]["p50"]
        assert 0 < parts and 0 < row["tick"]["least"] <= row["tick"]["p50"] <= row["tick"]["p99"]
        assert 0 < row["bandwidth_share"] and row["filled"] in ("run", "made up")
    sizes = {(r["name"], r["history"]): r["state_mb"] for r in report["results"] if "tick" in r}
    assert sizes["mamba2 torch", 2] == sizes["mamba2 torch", 20]
    assert sizes["transformer torch", 20] > 1.5 * sizes["transformer torch", 2]  # each timed tick adds to both
    assert any("20 ticks to 2" in name for name in report["ratios"])
    assert report["language"]["p50"] > 0 and report["peak_memory_mb"] > 0
    assert (out / "nano-cpu.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr()
    assert "transformer torch" in printed.out and "carrying a history" in printed.err
    assert latency_plot.table(report) in printed.out


def test_history_is_the_state_after_that_many_ticks():
    torch.manual_seed(0)
    model = VlaPolicy(CONFIG, CONTRACT).eval()
    state, how = contenders.history(model, 3, "cpu")
    again, _ = contenders.history(model, 3, "cpu")
    other, _ = contenders.history(model, 4, "cpu")
    assert how == "run"
    first, same, longer = (contenders.engines.flatten(s) for s in (state, again, other))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, longer, strict=True))


def test_ratios_say_what_they_divide():
    def row(name, history, core, tick=None):
        return {"name": name, "history": history, "core": {"p50": core}} | ({"tick": {"p50": tick}} if tick else {})

    rows = [row("mamba2 torch", 10, 6.0, 30.0), row("mamba2 openvino f32", 10, 1.5, 8.0),
            row("mamba2 huggingface", 10, 24.0), row("mamba2 torch", 1000, 6.3, 31.0)]  # fmt: skip
    found = policy_latency.ratios(rows)
    assert found["core of mamba2 torch to mamba2 openvino f32"] == 4.0
    assert found["core of mamba2 huggingface to mamba2 openvino f32"] == 16.0
    assert found["core of mamba2 torch, 1000 ticks to 10"] == pytest.approx(1.05)

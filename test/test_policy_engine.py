"""Exported engines: equal to eager or not used, states as values, caches that heal, and failures that are heard."""

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from policy_tiny import CONFIG, observation, tiny_model, write_checkpoint

from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.inference import graphs
from vla_nodes.policy.inference.engine import EngineError, TorchEngine
from vla_nodes.policy.mamba import mixers
from vla_nodes.policy.runtime import PolicyRuntime


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module", params=["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def exported(request, model, tmp_path_factory):
    pytest.importorskip(request.param)
    if request.param == "onnxruntime":
        pytest.importorskip("onnxscript")  # exporting needs it, running does not
    folder = tmp_path_factory.mktemp(request.param)
    return engines.load(model, request.param, 1, folder), folder


def test_equal_to_eager(exported, model):
    engine, _ = exported
    assert 0 < engine.error <= 1e-4  # the stated tolerance is wider: it also holds for large trained weights
    wanted, _ = engines.run_ticks(TorchEngine(model), model, 12)
    found, _ = engines.run_ticks(engine, model, 12)
    assert engines.difference(found, wanted) <= 1e-3


def seen(engine, model, seed):
    """What `forward` takes of one made-up tick."""
    step = engines.example_instruction(model)
    images, tool, state = engines.example(model, seed)
    return state, engines.one_tick(engine.encode_observation(images, tool, step)), step


def test_states_are_values(exported, model):
    """An old state continues to the same numbers after newer ticks ran, in either engine."""
    engine, _ = exported
    body, view, prepared = seen(engine, model, 0)
    _, early = engine.forward(body, view, prepared.summary, None)
    kept = mixers.map_state(torch.clone, early)
    first, _ = engine.forward(body, view, prepared.summary, early)
    later = early
    for _ in range(3):
        _, later = engine.forward(body, view, prepared.summary, later)
    for state in (early, kept):
        again, _ = engine.forward(body, view, prepared.summary, state)
        assert torch.equal(again.actions, first.actions)
    other, _ = TorchEngine(model).forward(body, view, prepared.summary, early)
    assert torch.allclose(other.actions, first.actions, atol=1e-4)
    assert not torch.equal(engine.forward(body, view, prepared.summary, later)[0].actions, first.actions)


def test_what_passes_through_is_right_and_a_value(exported, model):
    """The feasibility is an input of `forward` and an output: not lost, and not the input's own memory."""
    engine, _ = exported
    body, view, prepared = seen(engine, model, 2)
    output, _ = engine.forward(body, view, prepared.summary, None)
    kept = view.feasibility.clone()
    assert torch.equal(output.feasibility, kept) and torch.equal(output.object_center, view.points[..., 0, :])
    view.feasibility.add_(1)
    assert torch.equal(output.feasibility, kept)


def test_bytes_and_fractions_are_the_same_image(exported, model):
    engine, _ = exported
    prepared = engines.example_instruction(model)
    (image,), tool, _ = engines.example(model, 1)
    for one in (engine, TorchEngine(model)):
        colors = (engines.in_bytes(image.color), image.color)
        as_bytes, as_floats = (one.encode_observation((image._replace(color=c),), tool, prepared) for c in colors)
        assert engines.difference(engines.flatten(as_floats), engines.flatten(as_bytes)) <= 1e-6


def test_second_load_reads_the_cache(exported, model, monkeypatch):
    engine, folder = exported
    monkeypatch.setattr(graphs, "write", lambda *_, **__: pytest.fail("exported again"))
    assert engines.load(model, engine.name, 1, folder).error == engine.error


def test_damaged_cache_is_exported_anew(exported, model, caplog):
    engine, folder = exported
    (graph,) = folder.glob("engines/*/core" + graphs.SUFFIX[engine.name])
    graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    again = engines.load(model, engine.name, 1, folder)
    assert again.error <= 1e-4 and "exporting anew" in caplog.text


def test_other_weights_get_another_graph(exported, model):
    engine, folder = exported
    other = tiny_model(seed=5)
    assert graphs.folder_for(engine.name, other, folder) != graphs.folder_for(engine.name, model, folder)


def test_wrong_graph_is_caught_by_the_proof(exported, model, monkeypatch):
    """A graph that is slightly another policy, in the right place, is not used."""
    engine, folder = exported
    other = tiny_model()
    with torch.no_grad():
        other.head.shared.bias += 0.01
    parts = engines.parts(other, engines.structure(other)[0])
    monkeypatch.setattr(engines, "parts", lambda *_: parts)
    name = engine.name
    place = graphs.folder_for(name, model, folder)
    kept = {f: f.read_bytes() for f in place.iterdir()}
    try:
        graphs.write(name, place, parts, anew=True)
        with pytest.raises(EngineError, match="differ from torch"):
            engines.load(model, name, 1, folder)
    finally:
        for file, data in kept.items():
            file.write_bytes(data)


def test_runtime_uses_it(exported, model, tmp_path, monkeypatch):
    name = exported[0].name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_checkpoint(tmp_path / "tiny")
    chunks = {}
    for which in ("torch", name):
        runtime = PolicyRuntime.load(folder, "cpu", 1, which)
        assert runtime.engine.name == which
        runtime.set_instruction("pick up the red block")
        runtime.gate.start()
        seen = [observation(i) for i in range(6)]
        seen[3].cameras["camera"].depth = None
        chunks[which] = np.stack([runtime.step(o).actions for o in seen])
    scale = np.abs(chunks["torch"]).max(axis=(0, 1))
    assert (np.abs(chunks[name] - chunks["torch"]).max(axis=(0, 1)) <= 1e-3 * scale).all()


def test_importing_openvino_reports_to_nobody():
    """Its telemetry is not even imported: a robot calls no web service."""
    pytest.importorskip("openvino")
    code = """if True:
        import sys, torch
        from vla_nodes.policy.inference.graphs import openvino_silent
        graph = openvino_silent().convert_model(torch.nn.Linear(2, 2), example_input=torch.zeros(1, 2))
        print("openvino_telemetry" in sys.modules, len(graph.outputs))"""
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["False", "1"], run.stderr


# -- without any exported engine -------------------------------------------------------------------------------------
def test_nothing_installed_warns_and_runs(model, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "version", lambda _: "")
    with caplog.at_level(logging.WARNING):
        engine = engines.load(model, "auto")
    assert engine.name == "torch"
    assert "plain torch" in caplog.text and "pip install openvino" in caplog.text


def test_named_engine_that_is_missing_is_an_error(model, monkeypatch):
    monkeypatch.setattr(graphs, "version", lambda _: "")
    with pytest.raises(EngineError, match="pip install onnxruntime"):
        engines.load(model, "onnxruntime")


@pytest.mark.parametrize("name", ["tensorrt", "", None])
def test_unknown_engine(model, name):
    with pytest.raises(EngineError, match="none of auto, torch"):
        engines.load(model, name)


def test_failing_export_falls_back_loudly(model, monkeypatch, caplog, tmp_path):
    def broken(*_):
        raise RuntimeError("cannot translate aten::frobnicate\nand a long trace")

    monkeypatch.setattr(graphs, "version", lambda _: "0")
    monkeypatch.setattr(graphs, "EXPORTERS", dict.fromkeys(engines.EXPORTED, broken))
    with caplog.at_level(logging.WARNING):
        assert engines.load(model, "auto", 1, tmp_path).name == "torch"
    assert "aten::frobnicate" in caplog.text and "long trace" not in caplog.text
    with pytest.raises(EngineError, match="frobnicate"):
        engines.load(model, "openvino", 1, tmp_path)
    assert not [p for p in Path(tmp_path).rglob("*") if p.is_file() or p.name.startswith(".new-")]


def test_twin_stays_in_torch(monkeypatch, caplog):
    monkeypatch.setattr(graphs, "version", lambda _: "0")
    twin = tiny_model(dataclasses.replace(CONFIG, mixer="attention"))
    assert engines.load(twin, "auto").name == "torch" and "growing cache" in caplog.text


def test_read_only_checkpoint_uses_the_users_cache(model, monkeypatch, tmp_path):
    """A file where the folder should be: refuses writing even for root."""
    monkeypatch.setattr(graphs, "version", lambda _: "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "engines").write_text("in the way")
    place = graphs.folder_for("openvino", model, tmp_path)
    assert place.parent == tmp_path / "cache" / "vla_nodes" / "engines"


def test_old_graphs_are_removed(tmp_path):
    def export(_, __, path):
        path.with_suffix(".xml").write_text("x")

    for i in range(graphs.KEPT + 3):
        place = tmp_path / f"openvino-{i}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(graphs.EXPORTERS, "openvino", export)
            graphs.write("openvino", place, dict.fromkeys(graphs.PARTS, (None, ())))
        os.utime(place, (i, i))
    assert len(list(tmp_path.iterdir())) == graphs.KEPT
    assert place.is_dir()

"""The engine command: what it compares, what it keeps, what it says when something is missing."""

import numpy as np
import pytest
import torch
from policy_tiny import observation, robot, tiny_model, write_checkpoint

from vla_nodes.evaluation import export_engine as command
from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.inference import graphs, quantize
from vla_nodes.policy.runtime import PolicyOutput, PolicyRuntime


def output(shift: float = 0.0, acts: bool = True, certain: float = 0.9) -> PolicyOutput:
    rows = np.zeros((4, 7))
    rows[:, 0] = shift
    return PolicyOutput(rows if acts else None, "", certain, "reach", target=np.array([0.4, 0.0, 0.1 + 2 * shift]))


def test_differences_are_in_millimetres_and_over_whole_chunks():
    wanted = [output(), output(), output(acts=False)]
    rows = command.compare([output(1e-3), output(), output()], wanted)
    assert rows["translation of a row, mm"]["max"] == pytest.approx(1.0)
    assert rows["end of a chunk, mm"]["max"] == pytest.approx(4.0)  # four rows, each off the same way
    assert rows["target, mm"]["max"] == pytest.approx(2.0) and rows["target, mm"]["p50"] == pytest.approx(1.0)
    assert rows["ticks in which only one acts"] == {"count": 1, "of": 3}
    assert "1 of 3" in command.difference_table(rows)
    with pytest.raises(ValueError, match="acts in no tick"):
        command.compare([output(acts=False)], [output()])


def test_recorder_keeps_some_looks_and_changes_nothing():
    model = tiny_model()
    recorder = command.Recorder(model)
    runtimes = [PolicyRuntime(model, robot(), engine=e) for e in (recorder, engines.TorchEngine(model))]
    for runtime in runtimes:
        runtime.follow(engines.example_instruction(model))
    for tick in range(2 * command.EVERY):
        first, second = (runtime.step(observation(tick)) for runtime in runtimes)
        assert np.array_equal(first.actions, second.actions)
    assert len(recorder.frames) == 2
    ranges = quantize.calibrate(model, recorder.frames)
    assert set(ranges) == set(quantize.heavy(model)) and all(high > low for low, high in ranges.values())


def test_missing_things_are_one_line(tmp_path, capsys, monkeypatch):
    assert command.main(["--checkpoint", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("vla_nodes engine: ") and not list(tmp_path.iterdir())
    folder = write_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(graphs, "version", lambda _: "")
    assert command.main(["--checkpoint", str(folder), "--calibrate"]) == 2
    assert "pip install openvino" in capsys.readouterr().err
    assert not (folder / quantize.FILE).exists()


def test_it_says_what_will_run(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "tiny")
    assert command.main(["--checkpoint", str(folder), "--engine", "torch"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said and torch.__version__ in said and "ms a tick" in said

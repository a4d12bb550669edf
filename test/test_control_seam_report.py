"""The seam report: what is recorded comes back, what is reported is what happened, and nonsense is refused."""

import json
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
import robots
import soak

from vla_nodes.benchmarks import executor_cost
from vla_nodes.control import seam_plot, seam_report
from vla_nodes.control.executor import ChunkExecutor, ExecutorOutput
from vla_nodes.control.seam_report import SeamRecord
from vla_nodes.control.settings import ExecutorSettings
from vla_nodes.control.trajectory import sample

LATENCY = 0.12
CHUNKS = soak.amount(400, 100_000)


@pytest.fixture(scope="module")
def robot():
    return robots.panda()


@pytest.fixture(scope="module")
def run(robot):
    """Twelve chunks as carried out, and one refused."""
    executor, records, outputs = ChunkExecutor(robot), [], []
    for k, chunk in enumerate(executor_cost.chunks(robot, 12)):
        if k == 0:
            executor.observe(chunk.stamp, robot.rest, np.zeros(7), 0.04)
        now = chunk.stamp + LATENCY
        outputs.append(executor.submit(chunk, now))
        records.append(SeamRecord.of(outputs[-1], now))
        for t in chunk.stamp + np.arange(0.02, 0.11, 0.02):
            q, qd, _ = executor.reference(t)
            executor.observe(t, q, qd)
    broken = replace(chunk, actions=chunk.actions[:, :3])
    records.append(SeamRecord.of(executor.submit(broken, now), now))
    return records, outputs


def test_a_record_comes_back_as_it_was(run):
    for record in run[0]:
        again = SeamRecord.parse(record.line())
        assert again.line() == record.line()
        arm, before = again.trajectory(), record.trajectory()
        assert (arm is None) == (before is None) == (not record.mode)
        if arm is not None:
            np.testing.assert_array_equal(arm.positions, before.positions)


def test_the_reference_of_a_run_is_what_the_controller_followed(run):
    records, outputs = run
    t, q, qd = seam_report.reference(records)
    assert len(t) > 250 and np.all(np.diff(t) > 0.0)
    for k in range(0, len(t), 17):
        came = [r.time for r in records if r.mode and r.time <= t[k]]
        arm = outputs[len(came) - 1].arm
        np.testing.assert_allclose(q[k], sample(arm, t[k] - arm.stamp)[0], atol=1e-7)  # nine digits kept
    assert np.abs(np.diff(q, axis=0)).max() < 0.02  # no jump at any seam: at most 2 rad/s at 100 Hz
    assert np.abs(qd[-1]).max() < 0.02  # it ends at rest


def test_the_numbers_are_those_of_the_run(run):
    text = seam_report.report(run[0])
    modes = Counter(r.mode for r in run[0] if r.mode)
    assert "12 carried out (" in text and f"{modes['moving']} moving" in text and "1 malformed" in text
    worst = max(r.gap for r in run[0])
    assert worst > 1e-3 and f"most {worst:.3g} rad;" in text
    latency = [r.latency * 1e3 for r in run[0] if r.mode]
    assert LATENCY * 1e3 < min(latency) and f"p50 {np.percentile(latency, 50):.3g}" in text


def test_starvation_and_stretching_are_reported(robot):
    executor = ChunkExecutor(robot, ExecutorSettings(velocity_scale=0.05))
    first, *_, last = executor_cost.chunks(robot, 120)
    executor.observe(first.stamp, robot.rest, np.zeros(7), 0.04)
    outputs = [executor.submit(first, first.stamp)]
    executor.observe(last.stamp, executor.reference(last.stamp)[0], np.zeros(7), 0.04)
    ended = executor.plan.end
    outputs.append(executor.submit(last, last.stamp))
    records = [SeamRecord.of(o, c.stamp) for o, c in zip(outputs, (first, last), strict=True)]
    assert records[0].stretched > 0.5 and records[1].starved == pytest.approx(last.stamp - ended)
    assert records[1].starved > 0.5 and f"{records[1].starved:.2f} s in 1 chunks" in seam_report.report(records)


def test_an_empty_run_is_reported_as_empty():
    assert "0 carried out" in seam_report.report([])
    refused = [SeamRecord.of(ExecutorOutput(refused="x", cause="too_late"), 1.0)]
    assert "1 too_late" in seam_report.report(refused)


def test_the_picture_shows_the_run(run, tmp_path, capsys):
    path, png = tmp_path / "run.jsonl", tmp_path / "seams.png"
    path.write_text("\n".join(r.line() for r in run[0]) + "\n")
    assert seam_report.main([str(path), "--out", str(png)]) == 0
    assert "12 carried out" in capsys.readouterr().out
    image = cv2.imread(str(png))
    assert image.shape[0] > 800 and image.shape[1] > 1000
    inked = (image < 200).any(axis=2)
    part = len(image) // 5
    assert all(inked[k * part : (k + 1) * part].sum() > 1000 for k in range(5))  # every panel has its curves


def test_scales_have_round_numbers():
    for low, high in ((-2.85, 3.09), (0.0, 106.0), (-12.0, -1.5), (0.0, 0.1), (7.0001, 7.0002)):
        marks = seam_plot.ticks(low, high)
        assert 3 <= len(marks) <= 7 and marks[0] >= low - 1e-9 and marks[-1] <= high + 1e-9
        steps = np.diff(marks)
        np.testing.assert_allclose(steps, steps[0])
        assert round(steps[0] / 10.0 ** np.floor(np.log10(steps[0] * 1.0001)), 6) in (1, 2, 5)


@pytest.mark.parametrize(
    "line",
    ["", "{}", "[1, 2]", "not json", '{"time": 1}', "NUMBERS", "NAN", "SHAPE", "BACKWARD"],
)
def test_a_file_that_is_no_recording_is_refused_with_its_line(run, tmp_path, line, capsys):
    good = json.loads(run[0][0].line())
    bad = {
        "NUMBERS": good | {"latency": "soon"},
        "NAN": good | {"gap": float("nan")},
        "SHAPE": good | {"positions": good["positions"][:-1]},
        "BACKWARD": good | {"times": good["times"][::-1]},
    }
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(good) + "\n" + (json.dumps(bad[line]) if line in bad else line) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        seam_report.read(path)
    assert seam_report.main([str(path)]) == 2 and "line 2" in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path, capsys):
    assert seam_report.main([str(tmp_path / "nothing.jsonl")]) == 2
    assert "nothing.jsonl" in capsys.readouterr().err


def test_the_cost_is_that_of_chunks_carried_out(robot):
    cost = executor_cost.measure(robot, 30)
    assert sum(cost.modes.values()) == 30 and set(cost.modes) <= {"moving", "stopping", "rest"}
    assert cost.ms.min() > 0.0 and cost.growth is None and "30 chunks" in str(cost)


def test_growth_is_what_is_kept(robot):
    flat = [1000, 900, 1100] * 40
    assert abs(executor_cost._growth(flat)) < 200
    assert executor_cost._growth([x + 50 * k for k, x in enumerate(flat)]) > 1500


@pytest.mark.timeout(300 + CHUNKS // 10)
def test_the_executor_keeps_nothing_per_chunk(robot):
    """./check --soak -k keeps_nothing looks longer: ten minutes."""
    cost = executor_cost.measure(robot, 300, memory=True)
    assert cost.growth is not None and cost.growth < 30_000  # one kept trajectory per chunk would be 700 kB
    cost = executor_cost.measure(robot, CHUNKS)
    print(cost)
    # One kept trajectory per chunk would be four blocks and 5 kB for each: 500 and 700 kB over a third of 400. Of
    # 100,000 chunks the last third may hold 1000 more: less than a block for 30 chunks.
    assert cost.blocks < max(CHUNKS // 100, 100) and cost.resident < 512

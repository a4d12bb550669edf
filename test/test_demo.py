"""./run's parts: children that never outlive it, the command line, the film, the log."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vla_nodes.demo import cli, jobs
from vla_nodes.demo.film import FRAME_PERIOD, Film, StepLog
from vla_nodes.demo.processes import Child, Processes, free_domain

PARENT = """
import os, sys
from pathlib import Path
from vla_nodes.demo.processes import Processes
processes = Processes(Path(sys.argv[1]), dict(os.environ))
stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
for name in ("a", "b"):
    print(processes.start(name, [sys.executable, "-c", stubborn]).process.pid, flush=True)
sys.stdin.read()
"""


def alive(pid: int) -> bool:
    """Running and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_children_die_with_a_parent_that_is_killed(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    children = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(map(alive, children))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    assert gone(children)


def test_stop_asks_first_and_kills_what_does_not_end(tmp_path):
    processes = Processes(tmp_path, dict(os.environ))
    polite = "import time\nprint('up', flush=True)\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('goodbye')"
    ignore = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"
    stubborn = f"{ignore}\nprint('up', flush=True)\ntime.sleep(60)"
    kind = processes.start("polite", [sys.executable, "-c", polite])
    rude = processes.start("stubborn", [sys.executable, "-c", stubborn])
    deadline = time.monotonic() + 30
    while not (kind.log.read_text() and rude.log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    processes.stop(patience=8.0)
    assert kind.process.returncode == 0 and "goodbye" in kind.tail()
    assert rude.process.returncode == -signal.SIGKILL
    assert len(processes.ended()) == 2
    processes.stop()  # a second time does nothing


def test_warnings_are_told_twice_and_complete_lines_only(tmp_path):
    log = tmp_path / "node.log"
    log.write_text("[INFO] [1.5] [n]: fine\n" + "".join(f"[WARN] [{i}.5] [n]: silent for {i}.0 s\n" for i in range(9)))
    child = Child("n", None, log)
    assert child.new_notes() == ["WARN silent for 0.0 s", "WARN silent for 1.0 s"]
    with log.open("a") as file:
        file.write("[ERROR] [2.5] [n]: cannot conf")
        file.flush()
        assert child.new_notes() == []
        file.write("igure: why\n")
    assert child.new_notes() == ["ERROR cannot configure: why"]


def test_a_free_domain_is_one_whose_port_can_be_bound():
    domain = free_domain()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("", 7410 + 250 * domain))


@pytest.mark.parametrize(
    "arguments",
    [("--seed", "-1"), ("--episodes", "0"), ("--time-limit", "0"), ("--time-limit", "nan"), ("--checkpoint", "/none")],
)
def test_wrong_options_are_refused_by_name(arguments, capsys):
    assert cli.main(["pick up the red block", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


def asked(monkeypatch, *arguments: str) -> str | None:
    """The instruction that a command line comes to."""
    found = []
    monkeypatch.setattr(cli.command, "run", lambda options: found.append(cli.instruction_of(options)))
    assert cli.main(list(arguments)) == 0
    return found[0]


def test_without_a_terminal_the_default_is_taken(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert asked(monkeypatch) == cli.DEFAULT
    assert asked(monkeypatch, "") == "", "an empty instruction is the policy's to refuse"


@pytest.mark.parametrize(
    ("answer", "chosen"), [("", cli.MENU[0]), ("3", cli.MENU[2]), ("99", "99"), ("wave at me", "wave at me")]
)
def test_the_menu_takes_a_number_or_words(answer, chosen, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    assert cli.choose() == chosen


def test_every_line_of_the_menu_is_a_task_of_the_simulator():
    from vla_nodes.envs.tabletop.instructions import parse
    from vla_nodes.envs.tabletop.scene import Scene

    for text in cli.MENU:
        task = parse(text)
        assert task is not None and task.missing(Scene.demo(0)) == "", text


def test_an_instruction_gets_a_scene_that_allows_it_and_time_for_each_step():
    from vla_nodes.envs.tabletop.instructions import parse
    from vla_nodes.envs.tabletop.scene import Scene
    from vla_nodes.envs.tabletop.suites import obstacle

    for text in cli.MENU:
        (job,) = jobs.jobs(text, None, None, 1, None)
        steps = len(list(parse(text).steps))
        assert (job.scene, job.text, job.limit) == ("demo", text, jobs.PATIENT * steps)
        assert obstacle(parse(text), Scene.demo(job.seed)) == "", text
    (job,) = jobs.jobs("put the red block left of the bowl", None, 3, 1, 7.0)
    assert (job.seed, job.limit) == (3, 7.0), "what was asked for is not changed"
    assert [j.seed for j in jobs.jobs("wave at me", None, 5, 2, None)] == [5, 6]


def test_a_suite_is_the_one_that_eval_measures():
    from vla_nodes.envs import base as envs
    from vla_nodes.envs.tabletop import suites
    from vla_nodes.evaluation import evaluate

    todo = jobs.jobs(None, "full", 3, 1, None)
    assert [(j.scene, j.seed) for j in todo] == evaluate.jobs_of(envs.make("tabletop"), "full", 1, 3)
    for job in todo:
        _, task, text = suites.episode(job.scene, job.seed)
        assert job.text == text and job.idle == (job.scene in suites.IDLE)
        assert job.limit == (suites.IDLE_LIMIT if job.idle else suites.time_limit(task))


def test_an_instruction_and_a_suite_are_too_much(capsys, monkeypatch):
    assert cli.main(["open the drawer", "--suite", "drawer"]) == 2
    assert "not both" in capsys.readouterr().err
    assert asked(monkeypatch, "--suite", "drawer") is None, "nobody is asked"


def test_a_result_tells_why_in_the_words_of_eval():
    job = jobs.Job("drawer", 4, "open the drawer", 25.0, family="drawer")
    truth = {"reason": "missed grasp", "progress": "drawer open 0.0 cm", "touched": ["drawer"], "wrong": [],
             "mean_jerk": 8.0, "p99_jerk": 20.0, "steps_done": 0}  # fmt: skip
    told = jobs.result(job, truth, False, 25.04, "")
    assert (told.reason, told.detail, told.touched, told.p99_jerk) == (
        "missed grasp", "drawer open 0.0 cm", ["drawer"], 20.0)  # fmt: skip
    assert jobs.result(job, truth, False, 9.0, "lost sight").reason == "gave up"
    still = {**truth, "touched": [], "mean_jerk": 0.0}
    assert jobs.result(job, still, False, 9.0, "not in view").detail == "not in view; drawer open 0.0 cm"
    assert jobs.result(job, still, False, 9.0, "not in view").reason == "refused"
    assert jobs.result(job, truth, True, 6.0, "").reason == ""
    absent = jobs.Job("absent", 4, "pick up the red block", 20.0, idle=True)
    assert jobs.result(absent, truth, False, 20.0, "").reason == "touched something"


def test_an_instruction_of_noise_is_shown_on_one_line():
    noise = "pick\n\x1b[2J" * 2000
    assert cli.shown(noise).isprintable() and len(cli.shown(noise)) < 120


def test_the_film_has_a_steady_rate_and_the_images(tmp_path):
    from PIL import Image

    film = Film()
    for step in range(100):  # 20 Hz for 5 s
        image = np.zeros((32, 128, 3), np.uint8)
        image[:, step : step + 8] = (255, 0, 0)
        film.add(0.05 * step, image, ["pick up", "reach"])
    assert len(film.frames) == pytest.approx(5.0 / FRAME_PERIOD, abs=1)
    assert film.write(tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as gif:
        assert gif.n_frames == len(film.frames) and gif.info["duration"] == 1000 * FRAME_PERIOD
        gif.seek(gif.n_frames - 1)
        red = np.asarray(gif.convert("RGB"))[20, :, 0] > 128
    assert 2 * 90 < np.flatnonzero(red).mean() < 2 * 108  # enlarged twice; where the bar was at the end


def test_no_frame_no_film(tmp_path):
    assert not Film().write(tmp_path / "film.gif") and not (tmp_path / "film.gif").exists()


def test_the_step_log_is_strict_json_and_survives_a_kill(tmp_path):
    log = StepLog(tmp_path / "steps.jsonl")
    log.write(latency_ms=float("nan"), target=np.array([0.5, np.inf, 0.1]), state="RUNNING", ticks=np.int64(3))
    line = (tmp_path / "steps.jsonl").read_text()  # before close
    assert json.loads(line, parse_constant=pytest.fail) == {
        "latency_ms": None, "target": [0.5, None, 0.1], "state": "RUNNING", "ticks": 3,
    }  # fmt: skip
    log.close()

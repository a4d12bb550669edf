"""Training goes on after a kill as if nothing had been, draws what its step says, refuses settings it does not know."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import training_tiny
from accelerate.state import AcceleratorState

from vla_nodes.benchmarks import ablations
from vla_nodes.policy import checkpoint
from vla_nodes.training import cli, closed_loop_score, initialize, recipe, run_log, state, trainer
from vla_nodes.training import config as settings
from vla_nodes.training.stages.action import ActionStage, carried, split
from vla_nodes.training.stages.grounding import GroundingStage

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
QUICK = {"device": "cpu", "batch": 2, "log_steps": 1, "save_steps": 5, "measure_batches": 1, "questions": 2,
         "window_ticks": 4,
         "carried": [1, 2], "state_dropout": 0.5, "held_out": 5, "cache_workers": 1, "learning_rate": 1e-3}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    training_tiny.write_checkpoint(folder / "checkpoint")
    training_tiny.write_data(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def another_process():
    """Precision and devices are chosen once for a process; every test is one of its own in that."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def command(place, stage: str, out: str, *more: str, **changed) -> list[str]:
    keys = {**QUICK, "start": str(place / "checkpoint"), "grounded": None, "language": None, **changed}
    if stage == "grounding":
        keys = {k: v for k, v in keys.items() if k in settings.GroundingSettings.__dataclass_fields__}
    else:
        keys = {k: v for k, v in keys.items() if k in settings.ActionSettings.__dataclass_fields__}
        keys["cache"] = str(place / "cache")
    pairs = [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return [f"{stage}.yaml", "--data", str(place / "data"), "--out", str(place / out), *pairs, *more]


def losses(folder) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in run_log.rows(folder / run_log.LOG) if "loss" in row]


@pytest.mark.parametrize("stage", ["grounding", "action"])
def test_a_killed_run_continues_to_the_same_curve(place, stage):
    """SIGKILL at about step 17 of 40, then the same command: step by step the losses of a run left alone."""
    straight, killed = f"{stage}-straight", f"{stage}-killed"
    assert cli.main(command(place, stage, straight, "--steps", "40")) == 0
    argv = command(place, stage, killed, "--steps", "40")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(5):  # on a busy machine the run may be through before this process looks again: then once more
        shutil.rmtree(place / killed, ignore_errors=True)
        child = subprocess.Popen([sys.executable, "-m", "vla_nodes", "train", *argv], env=environment,
                                 stdout=subprocess.DEVNULL)  # fmt: skip
        log, end = place / killed / run_log.LOG, time.monotonic() + 240
        while len(losses(place / killed)) < 17 and child.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        child.kill()
        if child.wait() == -signal.SIGKILL and len(losses(place / killed)) < 40:
            break
    assert child.returncode == -signal.SIGKILL and 17 <= len(losses(place / killed)) < 40, log.read_text()
    stopped = state.read(place / killed / state.STATE)[1]
    assert 15 <= stopped["step"] < 40 and stopped["step"] % 5 == 0 and not stopped["finished"]
    assert cli.main(argv) == 0
    for (step, loss), (other, wanted) in zip(losses(place / killed), losses(place / straight), strict=True):
        assert step == other and loss == pytest.approx(wanted, rel=1e-5)
    ended = [state.read(place / name / state.WEIGHTS)[0] for name in (straight, killed)]
    for name, tensor in ended[0].items():
        torch.testing.assert_close(ended[1][name], tensor, rtol=1e-4, atol=1e-6)
    assert trainer.finished(place / killed) and (place / killed / run_log.CURVES).stat().st_size > 10_000
    assert not list((place / killed).glob("*.partial"))


def test_a_finished_run_says_so_and_more_steps_go_on(place, capsys):
    argv = command(place, "action", "more", "--steps", "3")
    assert cli.main(argv) == 0 and cli.main(argv) == 0
    assert "finished before, after 3 steps" in capsys.readouterr().out
    assert cli.main([*argv, "--steps", "5"]) == 0
    assert [step for step, _ in losses(place / "more")] == [1, 2, 3, 4, 5]


def test_another_setting_is_another_run(place, capsys):
    assert cli.main(command(place, "action", "one", "--steps", "2")) == 0
    assert cli.main(command(place, "action", "one", "--steps", "2", batch=3)) == 2
    assert "batch: 2 there, 3 now" in capsys.readouterr().err


def test_a_damaged_state_is_one_line(place, capsys):
    argv = command(place, "action", "torn", "--steps", "2")
    assert cli.main(argv) == 0
    path = place / "torn" / state.STATE
    path.write_bytes(path.read_bytes()[:1000])
    assert cli.main(argv) == 2
    assert "delete it to begin anew" in capsys.readouterr().err


def test_act_leaves_a_checkpoint_that_loads_and_differs_only_where_it_learnt(place):
    assert cli.main(command(place, "action", "left", "--steps", "4")) == 0
    before, _ = checkpoint.load(place / "checkpoint")
    after, config = checkpoint.load(place / "left" / "checkpoint")
    changed = {n.split(".")[0] for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])}
    assert {"core", "head", "embed_state"} <= changed and not changed & {
        "vision",
        "queries",
        "feasibility_head",
        "language",
    }
    assert config.contract == checkpoint.read_config(place / "checkpoint").contract
    assert config.provenance["steps"] == 4 and config.provenance["settings"]["batch"] == 2


def test_fine_tuning_takes_episodes_without_labels(place, capsys):
    data = training_tiny.write_data(place / "bags", 3, labels=False)
    argv = command(place, "finetune", "tuned", "--steps", "3", held_out=100, cache=str(place / "bagcache"))
    argv[2] = str(data)
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "2 of 2 episodes have no primitive labels" in said and "2 of 2 episodes have no done labels" in said
    assert all(np.isfinite(loss) for _, loss in losses(place / "tuned"))


def test_bf16_descends_as_float32_does(place):
    """Also behind a carried state, whose weights autocast must not remember as cast without gradient."""
    for name, precision in (("wide", "32"), ("narrow", "bf16")):
        argv = command(
            place, "action", name, "--steps", "12", precision=precision, state_dropout=0.0, learning_rate=3e-3
        )
        assert cli.main(argv) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
    wide, narrow = (np.array([loss for _, loss in losses(place / name)]) for name in ("wide", "narrow"))
    np.testing.assert_allclose(narrow, wide, rtol=0.05)


def stage(place, kind, **changed):
    name = "grounding" if kind is GroundingStage else "action"
    argv = command(place, name, "unused", **changed)
    values = {**settings.read(settings.find(argv[0])), "data": str(place / "data"), "out": str(place / "unused")}
    values |= dict(settings.assignment(pair) for flag, pair in zip(argv, argv[1:], strict=False) if flag == "--set")
    made = settings.build(values)
    model = initialize.begin(made, lambda _: None).model
    if kind is GroundingStage:
        return GroundingStage(model, made)
    return ActionStage(model, made, sorted((place / "cache" / "data").glob("*.safetensors")), lambda _: None)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) if a.is_floating_point() else torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("kind", [GroundingStage, ActionStage])
def test_a_batch_follows_from_its_step_alone(place, kind):
    first, second = stage(place, kind), stage(place, kind)
    with trainer.feed(lambda k: first.batch(k, 0), 3, 3) as take:
        fed = [take() for _ in range(4)]
    alone = [second.batch(k, 0) for k in (6, 5, 4, 3)][::-1]
    assert all(map(same, fed, alone))
    assert not same(fed[0], fed[1]) and not same(alone[0], second.batch(3, 1))  # other steps and ranks see other ones


def test_damaged_files_cost_the_same_draws_however_they_are_met(place, tmp_path):
    data = training_tiny.write_data(tmp_path / "data", 4)
    raw = (data / "002.safetensors").read_bytes()
    (data / "002.safetensors").write_bytes(raw.replace(b"IHDR", b"IHDX"))
    argv = {"stage": "grounding", "env": "tabletop", "data": str(data), "out": "x", "steps": 1,
            "held_out": 100, "batch": 6, "questions": 2,
            "start": str(place / "checkpoint")}  # fmt: skip
    fresh, used = (GroundingStage(initialize.begin(settings.build(argv)).model, settings.build(argv)) for _ in range(2))
    for step in range(4):
        used.batch(step, 0)
    assert used.frames.damaged and same(fresh.batch(9, 0), used.batch(9, 0))


def forward(model, rows, carried):
    from vla_nodes.training import losses_action

    return model(losses_action.state_of(model, rows), losses_action.view_of(rows), rows["summary"], carried)


def test_carried_state_is_that_of_the_ticks_before(place):
    """A window behind a carried state gives what it gives within one long pass, and no gradient flows back."""
    made = stage(place, ActionStage, state_dropout=0.0, window_ticks=3)
    model = made.model.eval()
    (batch, before) = next(b for b in (made.batch(k, 0) for k in range(9)) if b[1] == 2)
    past, window = split(batch, before)
    assert window["actions"].shape[1] == 3 and past["actions"].shape[1] == 2
    tokens = {k: v.requires_grad_(v.is_floating_point()) for k, v in past.items() if k.startswith("state_")}
    left = carried(model, {**past, **tokens})
    assert all(not part.requires_grad for layer in left for part in layer)

    def actions(rows, start):
        return forward(model, rows, start)[0].actions

    with torch.no_grad():
        torch.testing.assert_close(actions(window, left), actions(batch, None)[:, before:], rtol=1e-4, atol=1e-5)
        assert (actions(window, left) - actions(window, None)).abs().max() > 1e-4


def test_without_memory_a_tick_knows_nothing_of_the_ones_before(place):
    model = stage(place, ActionStage, memory=False).model.eval()
    tokens = stage(place, ActionStage, state_dropout=1.0).batch(0, 0)[0]
    with torch.no_grad():
        together, left = forward(model, tokens, None)
        for t in range(tokens["actions"].shape[1]):
            one, left = forward(model, {k: v[:, t : t + 1] for k, v in tokens.items()}, left)
            torch.testing.assert_close(one.actions[:, 0], together.actions[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("text", "said"), [
    ("stage: action\nlearning_rat: 1\nlenght: 2\n", "unknown key learning_rat, lenght"),
    ("stage: dance\n", "stage 'dance' is none of"),
    ("stage: action\nbatch: many\n", "batch = 'many' must be of type int"),
    ("stage: action\nbatch: 2.5\n", "must be of type int"),
    ("stage: action\nmemory: 1\n", "must be of type bool"),
    ("stage: action\ndata: [a]\nout: b\n", "set steps"),
    ("stage: action\nsteps: 1\nout: b\n", "set data"),
    ("stage: action\nsteps: 1\ndata: a\nout: b\nprecision: 16\n", "precision '16' is none of"),
    ("[1, 2]\n", "not a mapping"),
    ("a: [\n", "while parsing"),
    ("base: self.yaml\n", "in a circle"),
    ("stage: !!python/object/apply:os.system [\"true\"]\n", "could not determine a constructor"),
])  # fmt: skip
def test_settings_that_are_wrong_are_one_line(tmp_path, capsys, text, said):
    (tmp_path / "self.yaml").write_text(text)
    assert cli.main([str(tmp_path / "self.yaml")]) == 2
    error = capsys.readouterr().err
    assert said in error and "self.yaml" in error and error.count("\n") == 1


def test_settings_read_numbers_as_people_write_them(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "stage: action\nlearning_rate: 3e-3\ndata: a\nout: b\nminutes: 5\nweights: {done: 0}\n"
    )
    (tmp_path / "on_top.yaml").write_text("base: base.yaml\nminutes: null\nsteps: 7\n")
    made = settings.build(settings.read(tmp_path / "on_top.yaml"))
    assert (made.learning_rate, made.data, made.minutes, made.steps) == (3e-3, (Path("a"),), None, 7)
    assert made.weights == {"done": 0.0} and made.out == Path("b")
    json.dumps(settings.plain(made))


def test_every_shipped_configuration_is_valid():
    files = sorted((ROOT / "config/train").rglob("*.yaml"))
    assert len(files) >= 4
    for path in files:
        values = settings.read(path)
        if values["stage"] == "recipe":
            recipe.steps_of(values, str(path))
        else:
            settings.build({**values, "data": "somewhere", "out": values.get("out", "out")}, str(path))


def test_the_closed_loop_score_comes_from_a_child_while_training_goes_on(place, monkeypatch):
    """The child gets a checkpoint that loads; what it writes ends in the log; one that fails is told and not fatal."""
    asked = []

    def start(arguments, nice, **options):
        asked.append(arguments)
        where = Path(arguments[arguments.index("--out") + 1])
        checkpoint.load(Path(arguments[arguments.index("--checkpoint") + 1]))
        rows = json.dumps({"episodes": [{"success": True}, {"success": False}]})
        text = f"open({str(where / 'eval.json')!r}, 'w').write({rows!r})" if len(asked) == 1 else "raise SystemExit(3)"
        child = subprocess.Popen([sys.executable, "-c", text], **options)
        child.wait()
        return child

    monkeypatch.setattr(closed_loop_score.subprocess_cli, "start", start)
    argv = command(place, "action", "scored", "--steps", "8", score_minutes=1e-9, score_args="--suite drawer")
    assert cli.main(argv) == 0
    assert asked[0][0] == "eval" and asked[0][-2:] == ["--suite", "drawer"]
    found = [row for row in run_log.rows(place / "scored" / run_log.LOG) if "closed loop/success" in row]
    assert len(found) == 1 and found[0]["closed loop/success"] == 0.5 and len(asked) > 1


def test_a_recipe_does_each_step_once(tmp_path, monkeypatch, capsys):
    called, fails = [], {"export"}

    def call(words):
        called.append(words)
        return 3 if words[0] in fails else 0

    monkeypatch.setattr(recipe, "_call", call)
    (tmp_path / "r.yaml").write_text("""{stage: recipe, out: here, vars: {n: 4}, steps: [
        "collect-static-scenes --out {out}/scenes --scenes {n}", "collect  --out {out}/data",
        "export --out {out}/x"]}""")
    argv = [str(tmp_path / "r.yaml"), "--out", str(tmp_path / "my work")]
    assert cli.main(argv) == 3
    assert (
        called[0] == ["collect-static-scenes", "--out", f"{tmp_path}/my work/scenes", "--scenes", "4"]
        and len(called) == 3
    )
    assert "ended with status 3" in capsys.readouterr().err
    fails.clear()
    assert cli.main(argv) == 0 and [words[0] for words in called[3:]] == ["export"]
    assert cli.main(argv) == 0 and len(called) == 4
    assert cli.main([*argv, "--set", "vars={n: 5}"]) == 0 and len(called) == 7  # and all that may depend on it
    assert cli.main([*argv, "--show"]) == 0 and len(called) == 7
    for text, said in (("steps: [dance]", "is no command"), ('steps: ["eval {who}"]', "no value for 'who'"),
                       ("step: []", "unknown key step"), ("steps: eval", "needs out")):  # fmt: skip
        (tmp_path / "bad.yaml").write_text(f"stage: recipe\nout: here\n{text}\n")
        assert cli.main([str(tmp_path / "bad.yaml")]) == 2 and said in capsys.readouterr().err


def test_ablations_differ_in_what_they_say(tmp_path, capsys):
    argv = ["--data", "d", "--out", str(tmp_path), "--static-scenes", "s", "--show"]
    assert ablations.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    eyes = [line for line in lines if "grounding.yaml" in line]
    assert len(eyes) == 2 and sum("no-depth" in line for line in eyes) == 1  # shared by all others
    assert sum(" eval " in line for line in lines) == sum("/ablations/" in line for line in lines) - 1 >= 6
    full = settings.read(ROOT / "config/train/ablations/full.yaml")
    for name, values in ablations.read(ROOT / "config/train/ablations").items():
        differing = {k for k in {*full, *values} if full.get(k) != values.get(k)} - {"what"}
        assert len(differing) == (name != "full"), (name, differing)
    assert ablations.main(argv[:4]) == 2 and "give --static-scenes" in capsys.readouterr().err
    for name, won in (("full", 3), ("no-memory", 1)):
        rows = [{"success": i < won} for i in range(4)]
        made = {"held out": {"end mm": 12.4}} if name == "full" else {"held out": {}}
        for file, content in (("eval/eval.json", {"episodes": rows}), ("checkpoint/config.json", {"provenance": made})):
            (tmp_path / name / file).parent.mkdir(parents=True)
            (tmp_path / name / file).write_text(json.dumps(content))
    table = ablations.table(ablations.read(ROOT / "config/train/ablations"), tmp_path)
    assert "| the full design | 3/4 = 75% | 30% to 95% |  | 12 mm off |" in table
    assert "| 1/4 = 25% | 5% to 70% | -50 points |  |" in table and "| transformer twin | not done | | | |" in table


def test_the_rate_rises_and_falls():
    class Stage:
        objective, data = torch.nn.Linear(1, 1), {}
        trained = list(objective.named_parameters())

    made = settings.build({"stage": "action", "data": "a", "out": "/nowhere/out", "steps": 100, "learning_rate": 1.0,
                           "warmup": 10, "min_lr_ratio": 0.1, "device": "cpu"})  # fmt: skip
    run = trainer.Loop(Stage(), made, type("Alone", (), {"is_main_process": False, "device": torch.device("cpu")}))
    rates = []
    for run.step in range(101):
        rates.append(run.learning_rate())
    assert rates[0] == pytest.approx(0.1, rel=0.01) and np.argmax(rates) == 9 and np.all(np.diff(rates[9:]) < 0)
    assert rates[-1] == pytest.approx(0.1)


def test_averages_come_and_go():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    averages = trainer.Ema([parameter], 0.5)
    with torch.no_grad():
        parameter.fill_(3.0)
    averages.update(100)
    with averages.applied():
        assert parameter.item() == pytest.approx(2.0)
    assert parameter.item() == 3.0
    off = trainer.Ema([parameter], 0.0)
    off.update(1)
    with off.applied():
        assert parameter.item() == 3.0


def test_a_state_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    state.write(path, {"a": torch.ones(3)}, {"step": 1})

    def torn(tensors, where, metadata):
        Path(where).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(state, "save_file", torn)
    with pytest.raises(OSError, match="no space"):
        state.write(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, header = state.read(path)
    assert header == {"step": 1} and tensors["a"].tolist() == [1, 1, 1] and len(list(tmp_path.iterdir())) == 1


def test_minutes_stop_it_early_and_the_same_command_goes_on_to_the_same_curve(place, capsys):
    """The learning rate follows the step: a cap that ends a run changes nothing of what comes after it."""
    assert cli.main(command(place, "action", "uncapped", "--steps", "9")) == 0
    argv = command(place, "action", "capped", "--steps", "9")
    codes = [cli.main([*argv, "--minutes", "1e-9"]), cli.main(argv)]
    assert codes == [1, 0]
    assert "stopped early, at step 1 of 9, because minutes is 1e-09" in capsys.readouterr().out
    assert losses(place / "capped") == losses(place / "uncapped")


def test_fine_tuning_on_recorded_data_loads_no_simulator(place):
    data = training_tiny.write_data(place / "recorded", 3, labels=False)
    argv = command(place, "finetune", "apart", "--steps", "2", held_out=100, cache=str(place / "recordedcache"))
    argv[2] = str(data)
    code = ("import sys; from vla_nodes.training import cli; assert cli.main(sys.argv[1:]) == 0; "
            "assert 'mujoco' not in sys.modules, 'mujoco was imported'")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *argv], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (place / "apart" / "checkpoint" / "config.json").is_file()

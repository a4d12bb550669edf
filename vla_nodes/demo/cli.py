"""Run the whole graph in simulation and carry one instruction out: what ./run starts.

Starts sim_node, camera_node, policy_node and action_node as processes of their own, brings them up, publishes the
instruction like any operator would, and tells what happens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from vla_nodes import cli
from vla_nodes.demo.jobs import Job, jobs, result
from vla_nodes.envs.tabletop.suites import GIVEN_UP, LAYOUT
from vla_nodes.evaluation.contact_sheet import pick
from vla_nodes.evaluation.evaluate import Outcome, save
from vla_nodes.evaluation.metrics import table
from vla_nodes.share import share_path

NODES = ["sim_node", "camera_node", "policy_node", "action_node"]
DEFAULT = "pick up the red block"
MENU = [
    DEFAULT,
    "pick up the blue block",
    "put the green block in the bowl",
    "put the yellow block on the tray",
    "open the drawer",
    "put the red block left of the bowl",
    "stack the red block on the blue block",
    "open the drawer and put the blue block in it",
]
WALL_FACTOR = 10.0
"""Steady seconds allowed per simulated second: a machine slower than that is told so."""
START_UP = 120.0


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP came; the number is the argument."""


def instruction_of(options: cli.Options) -> str | None:
    """What is asked for: on the command line, by a person at the terminal, or the default; None for a suite."""
    if options.suite and options.instruction:
        raise click.UsageError("give an INSTRUCTION or a --suite, not both")
    if options.suite or options.instruction is not None:
        return options.instruction
    return choose() if sys.stdin.isatty() else DEFAULT


def choose() -> str:
    """Ask a person; a number takes the menu's line, anything else is the instruction itself."""
    print("What is the arm to do?")
    for number, text in enumerate(MENU, 1):
        print(f"  {number}  {text}")
    answer = input(f"number, or an instruction in your own words [1: {MENU[0]}]: ").strip()
    if not answer:
        return MENU[0]
    return MENU[int(answer) - 1] if answer.isdecimal() and 1 <= int(answer) <= len(MENU) else answer


def shown(text: str, limit: int = 80) -> str:
    """An instruction as one printable line."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= limit else f"{line[:limit]}... ({len(text)} characters)"


def run(options: cli.Options, say: Any) -> int:
    """Start the graph, run the episodes, stop the graph; the exit status."""
    from vla_nodes.demo.processes import Processes, node_command, ros_environment

    folder = options.out or Path("out") / datetime.now().strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    environment = ros_environment()
    os.environ.update(environment)
    params = share_path(f"config/{options.robot}/params.yaml")
    nodes = [*NODES, *(["recorder_node"] if options.record else [])]
    common = ["--params-file", str(params), "-p", "use_sim_time:=true"]
    todo = jobs(options.instruction, options.suite, options.seed, options.episodes, options.time_limit, options.short)
    own = {
        "sim_node": ["-p", f"seed:={todo[0].seed}", "-p", f"scene:={todo[0].scene}"],
        "policy_node": ["-p", f"device:={options.device}", "-p", "resume_instruction:=true"],
    }
    if options.checkpoint is not None:
        own["policy_node"] += ["-p", f"checkpoint:={options.checkpoint.resolve()}"]

    if options.record:
        own["recorder_node"] = ["-p", f"out:={options.record.resolve()}", "-p", "record_at_start:=false"]

    processes = Processes(folder, environment)
    try:
        say(f"starting {', '.join(nodes)} (ROS_DOMAIN_ID={environment['ROS_DOMAIN_ID']}, logs in {folder}/)")
        for name in nodes:  # before rclpy starts threads here, which a fork would not carry over
            processes.start(name, node_command(name, [*common, *own.get(name, [])]))
        return conduct(options, todo, nodes, processes, folder, say)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # nothing may cut the end short: it is bounded
        processes.stop()


def conduct(options: cli.Options, todo: list[Job], nodes: list[str], processes: Any, folder: Path,
            say: Any) -> int:  # fmt: skip
    """Everything between the start of the processes and their end."""
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    from vla_nodes.demo.client import Client, DemoError
    from vla_nodes.demo.film import plain

    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    client = Client()

    def alive() -> None:
        for child in processes.children.values():
            for note in child.new_notes():
                say(f"{child.name}: {note}")
        if dead := processes.ended():
            child = dead[0]
            raise DemoError(
                f"{child.name} has ended ({child.process.returncode}); the end of {child.log}:\n{child.tail()}"
            )

    client.alive = alive
    results: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    try:
        client.bring_up(nodes, START_UP)
        say("all nodes active")
        client.spin_until(lambda: client.frames > 0, 30.0, "no camera frame came")
        say("first camera frame")
        for index, job in enumerate(todo):
            if index:
                client.reset(job.seed, job.scene)
            if options.record:
                say(client.record("start"))
            values, outcome = episode(options, client, job, folder, say)
            results.append(values)
            outcomes.append(outcome)
            if options.record:
                say(client.record("success" if values["success"] else "failure"))
    except DemoError as error:
        say(f"failed: {error}")
        return cli.ExitStatus.FAILED
    finally:
        for child in processes.children.values():
            for note in child.new_notes():
                say(f"{child.name}: {note}")
        checkpoint = client.status.checkpoint if client.status else None
        summary = {"instruction": options.instruction, "checkpoint": checkpoint, "episodes": results}
        (folder / "summary.json").write_text(json.dumps(plain(summary), indent=1))
        if options.suite and outcomes:
            say(
                f"{len(outcomes)} of {len(todo)} episodes of {options.suite}\n{table([r for r, _ in outcomes], LAYOUT)}"
            )
            about = {"checkpoint": checkpoint, "suite": options.suite, "seed": options.seed or 0, "through": "ros"}
            for path in save(folder, outcomes, LAYOUT, **about):
                say(f"wrote {path}")
        client.destroy_node()
        rclpy.try_shutdown()
    succeeded = sum(r["success"] for r in results)
    if len(todo) > 1:
        say(f"{succeeded} of {len(todo)} episodes succeeded")
    return cli.ExitStatus.DONE if succeeded == len(todo) or options.suite else cli.ExitStatus.FAILED


def episode(options: cli.Options, client: Any, job: Job, folder: Path, say: Any
            ) -> tuple[dict[str, Any], Outcome]:  # fmt: skip
    """One instruction in one scene; records it and says how it went."""
    from vla_nodes.demo.client import STATES, finite
    from vla_nodes.demo.film import Film, StepLog
    from vla_nodes.msg import PolicyStatus

    text = job.text
    name = f"seed{job.seed}" if not options.suite else f"{job.scene.replace('/', '-')}-{job.seed}"
    film, log = Film(), StepLog(folder / f"steps-{name}.jsonl")
    frames: list[Any] = []
    last = {"state": None, "told": "", "obstacle": ""}
    begin = {"now": client.now, "moving": client.now}
    said = shown(text)

    def on_status(status: Any) -> None:
        log.write(
            time=client.now,
            state=STATES.get(status.state, str(status.state)),
            reason=status.reason,
            instruction=status.instruction,
            primitive=status.primitive,
            grounding=status.grounding,
            target=[status.target.x, status.target.y, status.target.z],
            latency_ms=status.latency_ms,
            observation_age=status.observation_age,
            ticks=status.ticks,
            dropped_frames=status.dropped_frames,
            joints=client.joints,
            task=client.task.get("progress"),
            success=client.task.get("success"),
        )
        if status.state == PolicyStatus.RUNNING:
            begin["moving"] = client.now
        state = STATES.get(status.state, str(status.state)).lower().replace("_", " ")
        told = f"{state} {status.primitive if status.state == PolicyStatus.RUNNING else status.reason}".strip()
        if told != last["told"]:
            last["told"] = told
            times = (status.latency_ms, status.latency_p50_ms, status.latency_p99_ms)
            latency = "policy {} ms, p50 {} ms, p99 {} ms".format(*map(finite, times))
            say(f"t={client.now - begin['now']:5.1f} s  {told}  [{latency}; {client.task.get('progress', '')}]")

    def on_frame(stamp: float, image: Any) -> None:
        film.add(stamp, image, [said, f"{max(0.0, stamp - begin['now']):5.1f} s   {last['told']}"])

    def on_suite_frame(stamp: float, image: Any) -> None:
        stamp -= begin["now"]
        if stamp >= 0 and (not frames or stamp - frames[-1][0] >= 0.5):
            frames.append((stamp, image))

    client.on_status = on_status
    if options.suite:
        client.on_frame = on_suite_frame
    elif not (options.no_video or options.short):
        client.on_frame = on_frame
    client.active_instruction = ""
    begin["now"] = begin["moving"] = client.now
    say(f"scene {f'{job.scene} ' if options.suite else ''}{job.seed}, instruction: {said!r}")
    client.instruct(text)

    def succeeded() -> bool:
        # judged from what the simulator reported after the instruction was given, for this instruction
        task = client.task
        return bool(task.get("success")) and task.get("instruction") == text and task.get("time", 0.0) > begin["now"]

    def over() -> bool:
        if client.active_instruction and not last["state"]:
            last["state"] = "accepted"
            say("instruction accepted")
        if not last["obstacle"] and client.task.get("instruction") == text and client.task.get("obstacle"):
            last["obstacle"] = client.task["obstacle"]
            if not job.idle:
                say(f"this scene does not allow it: {last['obstacle']}")
        if client.now - begin["now"] > job.limit:
            return True
        return not job.idle and (succeeded() or client.now - begin["moving"] > GIVEN_UP)

    wall = time.monotonic()
    try:
        client.spin_until(over, WALL_FACTOR * job.limit + 30.0, f"{job.limit:g} simulated seconds did not pass")
        elapsed, truth = client.now - begin["now"], dict(client.task)
        success = succeeded() if not job.idle else truth.get("instruction") == text and not truth.get("touched")
        if success and film.frames:  # a last look for the film
            until = client.now + 0.5
            client.spin_until(lambda: client.now > until, 20.0, "the simulation stood still")
    finally:
        client.on_status, client.on_frame = (lambda status: None), (lambda stamp, image: None)
        log.close()
        gif = folder / f"{name}.gif"
        if film.write(gif):
            say(f"wrote {gif} ({len(film.frames)} frames) and {log.count} steps")
    status = client.status
    held = status.reason if status and not job.idle and client.now - begin["moving"] > GIVEN_UP else ""
    outcome = result(job, truth, success, elapsed, held)
    reason = "" if success else why_not(client, job, elapsed)
    speed = elapsed / max(1e-6, time.monotonic() - wall)
    say(
        f"{'SUCCESS' if success else 'NO SUCCESS'} after {elapsed:.1f} s (simulated; {speed:.2f} x real time)"
        + (f": {reason}" if reason else "")
    )
    values = {
        "seed": job.seed,
        "instruction": text,
        "success": success,
        "seconds": elapsed,
        "reason": reason,
        "progress": client.task.get("progress"),
        "real_time_factor": round(speed, 3),
        "steps": log.count,
        "dropped_frames": None if status is None else int(status.dropped_frames),
        "latency_p50_ms": None if status is None else round(float(status.latency_p50_ms), 2),
        "latency_p99_ms": None if status is None else round(float(status.latency_p99_ms), 2),
    }
    return values, (outcome, [] if success else [frames[i] for i in pick(len(frames))])


def why_not(client: Any, job: Job, elapsed: float) -> str:
    """Why an episode ended without success, in one line."""
    status, progress = client.status, client.task.get("progress", "the simulator said nothing")
    if status is None:
        return "policy_node published no status"
    if job.idle:
        return f"touched {', '.join(client.task.get('touched', []))}"
    if elapsed <= job.limit:
        return f"the policy holds: {status.reason or 'no reason given'}; in truth: {progress}"
    return f"time limit of {job.limit:g} s; {client.task.get('reason', '')}; {progress}"


def demo(options: cli.Options) -> int:
    """The command."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(number)

    if options.episodes + (options.seed or 0) >= 2**31:
        raise click.UsageError(f"--seed {options.seed} and --episodes: seeds end at {2**31 - 1}")
    options.instruction = instruction_of(options)
    try:
        import rclpy  # noqa: F401

        import vla_nodes.msg  # noqa: F401
    except ImportError as error:
        remedy = "start it as ./run, or source a workspace"
        raise cli.CommandError(f"needs ROS 2 and the built package ({error}): {remedy}") from None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        return run(options, say)
    except Interrupted as interrupted:
        number = interrupted.args[0]
        say(f"stopped by {signal.Signals(number).name}; every node has been ended")
        return 128 + number


command = cli.Command(
    "run",
    """
    A simulated robot arm carries out an instruction, through the real ROS 2 graph.

    The status is 0 only if the simulator's own state says that the task succeeded (and stayed so for 1 s) in every
    episode, else 1; with --suite it is 0 if every episode was run.
    """,
    demo,
    cli.argument("[INSTRUCTION]", f"what the arm is to do; a terminal asks, else '{DEFAULT}'", required=False),
    *cli.section(
        "What to do",
        cli.seed("scene: where the objects stand; without it the first that allows the instruction", default=None),
        cli.count("--episodes", "scenes, of seeds from --seed on", 1, most=1000),
        cli.option("--suite", type=click.Choice(LAYOUT.choices), metavar="SUITE",
                   help="an evaluation suite in place of an instruction, --episodes of each: what eval measures "
                   "without ROS, measured here"),
        cli.number("--time-limit", "simulated time of an episode [s]; without it for each step 40, with --short or "
                   "--suite 25", least=1.0, most=3600.0),
        cli.flag("--short", "a quick check: no GIF, shorter time limit"),
    ),
    *cli.section(
        "Robot and policy",
        cli.checkpoint(),
        cli.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto",
                   help="where the policy computes"),
        cli.option("--robot", metavar="NAME", default="panda", help="folder of config/"),
    ),
    *cli.section(
        "Results",
        cli.out("folder for the GIF and the logs; without it out/<time>"),
        cli.option("--record", type=cli.PATH, metavar="DIR",
                   help="record each episode in DIR (rosbag2), marked with its outcome"),
        cli.flag("--no-video", "write no GIF"),
    ),
    cli.version(),
    examples="""
    ./run "pick up the red block"
    ./run --seed 3 --record recordings "put the green block in the bowl"
    ./run --suite drawer --episodes 10
    """,
    errors=(FileNotFoundError, RuntimeError),
    program="./run",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    sys.exit(main())

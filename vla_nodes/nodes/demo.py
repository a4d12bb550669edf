"""Run the whole graph in simulation and carry one instruction out: what ./run starts.

Starts sim_node, camera_node, policy_node and action_node as processes of their own, brings them up, publishes the
instruction like any operator would, and tells what happens. The exit status is 0 only if the simulator's own state
says that the task succeeded (and stayed so for 1 s) in every episode.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from vla_nodes.share import share_path

NODES = ["sim_node", "camera_node", "policy_node", "action_node"]
DEFAULT = "pick up the red block"
MENU = [
    DEFAULT,
    "pick up the blue block",
    "put the green block in the bowl",
    "put the yellow block on the tray",
    "open the drawer",
]
HELD_TOO_LONG = 8.0
"""s of simulated time without a chunk after which a run is given up: the policy has said why it holds."""
WALL_FACTOR = 10.0
"""Steady seconds allowed per simulated second: a machine slower than that is told so."""
START_UP = 120.0


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP came; the number is the argument."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; checked, with the instruction chosen where none was given."""
    parser = argparse.ArgumentParser(
        prog="./run", description="A simulated robot arm carries out an instruction, through the real ROS 2 graph."
    )
    parser.add_argument("instruction", nargs="?", help=f"what the arm is to do (without a terminal: '{DEFAULT}')")
    parser.add_argument("--seed", type=int, default=0, help="scene: where the objects stand (default 0)")
    parser.add_argument(
        "--episodes", type=int, default=1, help="run this many scenes, seeds seed, seed+1, ... (default 1)"
    )
    parser.add_argument("--time-limit", type=float, help="simulated seconds per episode (default 40, with --short 25)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where the policy computes")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the one the package ships)")
    parser.add_argument("--robot", default="panda", help="folder of config/ (default panda)")
    parser.add_argument("--out", type=Path, help="folder for the GIF and the logs (default out/<time>)")
    parser.add_argument("--short", action="store_true", help="a quick check: no GIF, shorter time limit")
    parser.add_argument(
        "--record", type=Path, metavar="DIR", help="record each episode in DIR (rosbag2), marked with its outcome"
    )
    parser.add_argument("--no-video", action="store_true", help="write no GIF")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**31 - 1 - max(0, options.episodes):
        parser.error(f"--seed {options.seed}: must be 0 .. 2147483646")
    if not 1 <= options.episodes <= 1000:
        parser.error(f"--episodes {options.episodes}: must be 1 .. 1000")
    if options.time_limit is None:
        options.time_limit = 25.0 if options.short else 40.0
    if not 1.0 <= options.time_limit <= 3600.0:  # NaN too
        parser.error(f"--time-limit {options.time_limit:g}: must be 1 .. 3600 simulated seconds")
    if options.checkpoint is not None and not options.checkpoint.is_dir():
        parser.error(f"--checkpoint {options.checkpoint}: no such folder")
    if options.instruction is None:
        options.instruction = choose() if sys.stdin.isatty() else DEFAULT
    return options


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


def run(options: argparse.Namespace, say: Any) -> int:
    """Start the graph, run the episodes, stop the graph; the exit status."""
    from vla_nodes.nodes.demo_processes import Processes, node_command, ros_environment

    folder = options.out or Path("out") / datetime.now().strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    environment = ros_environment()
    os.environ.update(environment)
    params = share_path(f"config/{options.robot}/params.yaml")
    nodes = [*NODES, *(["recorder_node"] if options.record else [])]
    common = ["--params-file", str(params), "-p", "use_sim_time:=true"]
    own = {"sim_node": ["-p", f"seed:={options.seed}"], "policy_node": ["-p", f"device:={options.device}"]}
    if options.checkpoint is not None:
        own["policy_node"] += ["-p", f"checkpoint:={options.checkpoint.resolve()}"]

    if options.record:
        own["recorder_node"] = ["-p", f"out:={options.record.resolve()}", "-p", "record_at_start:=false"]

    processes = Processes(folder, environment)
    try:
        say(f"starting {', '.join(nodes)} (ROS_DOMAIN_ID={environment['ROS_DOMAIN_ID']}, logs in {folder}/)")
        for name in nodes:  # before rclpy starts threads here, which a fork would not carry over
            processes.start(name, node_command(name, [*common, *own.get(name, [])]))
        return conduct(options, nodes, processes, folder, say)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # nothing may cut the end short: it is bounded
        processes.stop()


def conduct(options: argparse.Namespace, nodes: list[str], processes: Any, folder: Path, say: Any) -> int:
    """Everything between the start of the processes and their end."""
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    from vla_nodes.nodes.demo_client import Client, DemoError
    from vla_nodes.nodes.demo_record import plain

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
    try:
        client.bring_up(nodes, START_UP)
        say("all nodes active")
        client.spin_until(lambda: client.frames > 0, 30.0, "no camera frame came")
        say("first camera frame")
        for index in range(options.episodes):
            seed = options.seed + index
            if index:
                client.reset(seed)
            if options.record:
                say(client.record("start"))
            results.append(episode(options, client, seed, folder, say))
            if options.record:
                say(client.record("success" if results[-1]["success"] else "failure"))
    except DemoError as error:
        say(f"failed: {error}")
        return 1
    finally:
        for child in processes.children.values():
            for note in child.new_notes():
                say(f"{child.name}: {note}")
        summary = {
            "instruction": options.instruction,
            "checkpoint": client.status.checkpoint if client.status else None,
            "episodes": results,
        }
        (folder / "summary.json").write_text(json.dumps(plain(summary), indent=1))
        client.destroy_node()
        rclpy.try_shutdown()
    succeeded = sum(r["success"] for r in results)
    if options.episodes > 1:
        say(f"{succeeded} of {options.episodes} episodes succeeded")
    return 0 if succeeded == options.episodes else 1


def episode(options: argparse.Namespace, client: Any, seed: int, folder: Path, say: Any) -> dict[str, Any]:
    """One instruction in one scene; records it and says how it went."""
    from vla_nodes.msg import PolicyStatus
    from vla_nodes.nodes.demo_client import STATES, finite
    from vla_nodes.nodes.demo_record import Film, StepLog

    text = options.instruction
    film, log = Film(), StepLog(folder / f"steps-seed{seed}.jsonl")
    last = {"state": None, "told": ""}
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

    client.on_status = on_status
    if not (options.no_video or options.short):
        client.on_frame = on_frame
    client.active_instruction = ""
    begin["now"] = begin["moving"] = client.now
    say(f"scene {seed}, instruction: {said!r}")
    client.instruct(text)

    def succeeded() -> bool:
        # judged from what the simulator reported after the instruction was given, for this instruction
        task = client.task
        return bool(task.get("success")) and task.get("instruction") == text and task.get("time", 0.0) > begin["now"]

    def over() -> bool:
        if client.active_instruction and not last["state"]:
            last["state"] = "accepted"
            say("instruction accepted")
        return (
            succeeded()
            or client.now - begin["now"] > options.time_limit
            or client.now - begin["moving"] > HELD_TOO_LONG
        )

    wall = time.monotonic()
    try:
        client.spin_until(
            over, WALL_FACTOR * options.time_limit + 30.0, f"{options.time_limit:g} simulated seconds did not pass"
        )
        success, elapsed = succeeded(), client.now - begin["now"]
        if success:  # a last look for the film
            until = client.now + 0.5
            client.spin_until(lambda: client.now > until, 20.0, "the simulation stood still")
    finally:
        client.on_status, client.on_frame = (lambda status: None), (lambda stamp, image: None)
        log.close()
        gif = folder / f"seed{seed}.gif"
        if film.write(gif):
            say(f"wrote {gif} ({len(film.frames)} frames) and {log.count} steps")
    status = client.status
    reason = "" if success else why_not(client, options, elapsed)
    speed = elapsed / max(1e-6, time.monotonic() - wall)
    say(
        f"{'SUCCESS' if success else 'NO SUCCESS'} after {elapsed:.1f} s (simulated; {speed:.2f} x real time)"
        + (f": {reason}" if reason else "")
    )
    return {
        "seed": seed,
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


def why_not(client: Any, options: argparse.Namespace, elapsed: float) -> str:
    """Why an episode ended without success, in one line."""
    status, progress = client.status, client.task.get("progress", "the simulator said nothing")
    if status is None:
        return "policy_node published no status"
    if elapsed <= options.time_limit:
        return f"the policy holds: {status.reason or 'no reason given'}; in truth: {progress}"
    return f"time limit of {options.time_limit:g} s; {progress}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; see the module's docstring for the exit status. 130 after Ctrl-C."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(number)

    try:
        import rclpy  # noqa: F401

        import vla_nodes.msg  # noqa: F401
    except ImportError as error:
        print(
            f"./run needs ROS 2 and the built package ({error}): start it as ./run, or source a workspace",
            file=sys.stderr,
        )
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        return run(parse_arguments(arguments), say)
    except Interrupted as interrupted:
        number = interrupted.args[0]
        say(f"stopped by {signal.Signals(number).name}; every node has been ended")
        return 128 + number
    except (EOFError, KeyboardInterrupt):
        return 130
    except (FileNotFoundError, RuntimeError) as error:
        print(f"./run: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

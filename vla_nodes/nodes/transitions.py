"""A lifecycle transition that is not legal in the node's present state is refused with one line; the node lives on.

rclpy's own change_state service lets the RCLError of such a request out of the callback, which ends the process
(https://github.com/ros2/rclpy/issues/1209), so that anybody's slip, or a second launch, stops a robot at work.
"""

from __future__ import annotations

from typing import Any

from rclpy.lifecycle import LifecycleNode

MAX_LABEL = 40
"""Most characters of a requested label repeated in the log."""


def refuse_illegal(node: LifecycleNode) -> None:
    """Check every request of the node's change_state service before rclpy serves it. For before the node is spun."""
    service = node._service_change_state
    serve = service.callback

    def checked(request: Any, response: Any) -> Any:
        machine = node._state_machine
        legal = {label: number for number, label, *_ in machine.available_transitions}
        why = problem(request.transition.id, request.transition.label, machine.current_state[1], legal)
        if not why:
            return serve(request, response)
        node.get_logger().warning(why)
        response.success = False
        return response

    service.callback = checked


def problem(number: int, label: str, state: str, legal: dict[str, int]) -> str:
    """Why a requested transition is refused, or "".

    Args: number, label: of the request; a label, where there is one, goes before the number, as in rcl; state: the
    node's present one; legal: {label: number} of the transitions from it.
    """
    if label in legal if label else number in legal.values():
        return ""
    asked = repr(label[:MAX_LABEL]) if label else f"with id {number}"
    there = " or ".join(f"{name} ({number})" for name, number in legal.items()) or "nothing: start the node anew"
    return f"transition {asked} refused: the node is {state}, where this is legal: {there}"

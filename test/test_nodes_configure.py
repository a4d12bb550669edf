"""What is wrong is an error at configure that names the thing; the lifecycle goes round; Ctrl-C is clean."""

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in this environment: run ./check, or source a ROS 2 installation")
import nodes_support as support
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from sensor_msgs.msg import JointState

from vla_nodes.nodes.base import NODES
from vla_nodes.nodes.parameters import unknown_sections

pytestmark = pytest.mark.timeout(600)
wait_for = support.wait_for
T = Transition


@pytest.fixture(scope="module")
def graph():
    graph = support.Graph()
    try:
        yield graph
    finally:
        graph.close()


def state(graph, name: str) -> int:
    return graph.call(GetState, f"{name}/get_state").current_state.id


def change(graph, name: str, transition: int) -> bool:
    return graph.call(ChangeState, f"{name}/change_state", ChangeState.Request(transition=T(id=transition))).success


def put(graph, name: str, parameter: str, value: int):
    given = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)
    request = SetParameters.Request(parameters=[Parameter(name=parameter, value=given)])
    return graph.call(SetParameters, f"{name}/set_parameters", request).results[0]


def test_wrong_parameters_are_errors_that_name_them(graph):
    """Five nodes at once, since a start costs seconds; each stays alive and unconfigured."""
    typo = graph.folder / "typo.yaml"
    typo.write_text("/**/camera_node:\n  ros__parameters:\n    depth_encodign: 16UC1\n")
    section = graph.folder / "section.yaml"
    section.write_text("/**/action_nod:\n  ros__parameters:\n    dry_run: true\n")
    truncated = support.write_checkpoint(graph.folder / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    expected = {
        "sim_node": "unknown parameter 'seeed': did you mean 'seed'?",
        "camera_node": "unknown parameter 'depth_encodign': did you mean 'depth_encoding'?",
        "action_node": "parameter velocity_scale is 7.5, must be from 0.01 to 1.0",
        "policy_node": "truncated",
        "recorder_node": f"{section}: section '/**/action_nod' is for no node: did you mean 'action_node'?",
    }
    started = {
        "sim_node": graph.start("sim_node", "seeed:=3"),
        "camera_node": graph.start("camera_node", extra=("--params-file", str(typo))),
        "action_node": graph.start("action_node", "velocity_scale:=7.5"),
        "policy_node": graph.start("policy_node", f"checkpoint:={truncated}"),
        "recorder_node": graph.start("recorder_node", extra=("--params-file", str(section))),
    }
    for name, text in expected.items():
        refusal = lambda n=name: [x for x in started[n].log.splitlines() if "cannot configure" in x]  # noqa: E731
        line = wait_for(refusal, f"{name} refusing", support.START)
        assert text in line[0] and "ERROR" in line[0]
        assert state(graph, name) == State.PRIMARY_STATE_UNCONFIGURED
    # The operator puts one right and goes on, without a restart.
    request = SetParameters.Request()
    value = ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=0.5)
    request.parameters = [Parameter(name="velocity_scale", value=value)]
    assert graph.call(SetParameters, "action_node/set_parameters", request).results[0].successful
    assert change(graph, "action_node", T.TRANSITION_CONFIGURE)
    for process in started.values():
        assert process.interrupt() == 0 and "Traceback" not in process.log


@pytest.mark.parametrize(
    ("section", "near"),
    [("/**/action_nod", "action_node"), ("polcy_node", "policy_node"), ("/left/camara_node", "camera_node"),
     ("/**/simnode", "sim_node"), ("/**/action_node", ""), ("/**/left_action_node", ""), ("/**", ""),
     ("controller_manager", ""), ("/camera/camera", ""), ("/**/*", "")],
)  # fmt: skip
def test_a_mistyped_section_is_named_with_the_nearest_node(tmp_path, section, near):
    """In a file that is shared with nodes of others; nested or not."""
    file = tmp_path / "params.yaml"
    nested = "".join(
        f"{'  ' * k}{part}:\n" for k, part in enumerate(section.replace("/**/", "w/").strip("/*").split("/"))
    )
    for head, depth in ((f"{section}:\n", 1), (nested, nested.count("\n"))):
        file.write_text(f"'{head[:-2]}':\n" if depth == 1 else head)
        with file.open("a") as out:
            out.write(f"{'  ' * depth}ros__parameters:\n{'  ' * (depth + 1)}dry_run: true\n")
        wrong = unknown_sections([file], NODES)
        assert len(wrong) == bool(near) and all(f"did you mean '{near}'?" in line for line in wrong)


def test_every_node_is_one_that_a_section_may_name():
    assert set(NODES) == {file.name for file in (support.ROOT / "resource/executables").iterdir()}


def test_checkpoint_that_is_missing_or_of_another_robot(graph):
    import json

    foreign = support.write_checkpoint(graph.folder / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config["contract"]["robot"]["joints"][0] = "elbow"
    (foreign / "config.json").write_text(json.dumps(config))
    other = graph.start("policy_node", f"checkpoint:={foreign}")
    wait_for(lambda: "cannot configure" in other.log, "the refusal", support.START)
    assert "does not fit this robot" in other.log and "elbow" in other.log
    other.interrupt()
    missing = graph.start("policy_node", "checkpoint:=/nowhere/at/all")
    wait_for(lambda: "cannot configure" in missing.log, "the refusal", support.START)
    assert "/nowhere/at/all" in missing.log and "checkpoint parameter" in missing.log
    assert missing.interrupt() == 0


def test_lifecycle_goes_round(graph):
    joints = graph.hear(JointState, "joint_states")
    node = graph.start("sim_node", autostart=False, clock=False)
    assert state(graph, "sim_node") == State.PRIMARY_STATE_UNCONFIGURED
    for _ in range(2):
        assert change(graph, "sim_node", T.TRANSITION_CONFIGURE)
        assert change(graph, "sim_node", T.TRANSITION_ACTIVATE)
        before = len(joints)
        wait_for(lambda b=before: len(joints) > b + 20, "joint states while active")
        assert put(graph, "sim_node", "seed", 5).successful
        refused = put(graph, "sim_node", "seed", -5)
        assert not refused.successful and "seed out of range" in refused.reason
        assert change(graph, "sim_node", T.TRANSITION_DEACTIVATE)
        assert change(graph, "sim_node", T.TRANSITION_CLEANUP)
        assert state(graph, "sim_node") == State.PRIMARY_STATE_UNCONFIGURED
    assert node.interrupt() == 0 and "Traceback" not in node.log


def test_every_parameter_file_entry_exists_and_is_the_default():
    """config/panda/params.yaml says that it holds all parameters at their defaults, but the robot: it must."""
    import yaml

    from vla_nodes.nodes.action_node import ActionNode
    from vla_nodes.nodes.camera_node import CameraNode
    from vla_nodes.nodes.policy_node import PolicyNode
    from vla_nodes.nodes.sim_node import SimNode
    from vla_nodes.share import share_path

    sections = yaml.safe_load(share_path("config/panda/params.yaml").read_text())
    kinds = {"camera_node": CameraNode, "policy_node": PolicyNode, "action_node": ActionNode, "sim_node": SimNode}
    for name, kind in kinds.items():
        given = sections[f"/**/{name}"]["ros__parameters"]
        defaults = {param.name: param.default for param in kind.params}
        if "contract" in defaults:
            assert defaults.pop("contract") == "" and given.pop("contract") == "config/panda/contract.yaml"
        assert given == defaults
        assert all(len(param.description) > 10 for param in kind.params)

"""What the package's executables do around a node; needs no ROS."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENDED = """
import sys, types
node = types.ModuleType("vla_nodes.nodes.ended")
node.main = lambda: 7
sys.modules["vla_nodes.nodes.ended"] = node
from vla_nodes.nodes.executable import start
status = start("ended")


class TakenDownLast:
    def __del__(self, number=int(sys.argv[1]), raise_signal=__import__("signal").raise_signal):
        raise_signal(number)


sys.modules["taken_down_last"] = TakenDownLast()  # modules go after the signal handlers
sys.exit(status)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_after_the_end_of_a_node_changes_nothing(number):
    result = subprocess.run([sys.executable, "-c", ENDED, str(int(number))], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 7 and not result.stderr

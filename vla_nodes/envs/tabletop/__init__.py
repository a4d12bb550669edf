"""The MuJoCo world, its tasks, the scripted expert and its camera."""

import os
import sys

if sys.platform == "linux":  # read by mujoco and Mesa when they are first imported, so set before either is
    os.environ.setdefault("MUJOCO_GL", "egl")  # needs no display
    os.environ.setdefault("LP_NUM_THREADS", "1")  # software rendering leaves the other core to the robot

"""vla_nodes: a robot arm that obeys a sentence, from RGB-D images, with a state space model on ROS 2."""

__version__ = "0.1.0"

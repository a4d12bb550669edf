"""The ROS 2 nodes: parameters, topics, timers, lifecycle. Thin shells over the ROS-free rooms below."""

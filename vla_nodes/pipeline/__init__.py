"""What happens between two topics, from messages to trajectories, without ROS: the nodes and replay run it alike."""

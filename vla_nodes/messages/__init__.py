"""What messages say, as plain values: images decoded, joints by name, stamps paired, frames; no ROS needed."""

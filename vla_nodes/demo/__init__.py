"""`./run`: starts the graph in simulation, instructs it and films it."""

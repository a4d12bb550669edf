"""From action chunks to limited, timed joint trajectories."""

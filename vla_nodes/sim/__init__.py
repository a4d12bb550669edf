"""The MuJoCo world, its tasks, the scripted expert and its camera."""

"""Episodes on disk, LeRobot folders in and out, and recordings made into episodes."""

"""Images, observations and episodes as plain numpy, and their statistics."""

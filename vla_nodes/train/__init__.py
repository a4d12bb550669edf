"""Demonstrations, two-stage training and closed-loop evaluation."""

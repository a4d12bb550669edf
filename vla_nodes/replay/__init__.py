"""Bags in, the same pipeline, a report out."""

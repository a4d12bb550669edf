"""Environments that a policy acts in: one interface, one folder or file per task family."""

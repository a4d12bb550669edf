"""Sequence mixers: Mamba 1 and 2, attention as their twin, kernels, and published weights."""

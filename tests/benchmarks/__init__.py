"""Measurements, run by hand: `python -m tests.benchmarks.noise`. No test depends on a time."""

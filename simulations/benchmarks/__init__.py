"""Measurements, run by hand: `python -m simulations.benchmarks.noise`. No test depends on a time."""

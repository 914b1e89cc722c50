"""Sweeps: one federation, run with many settings and seeds."""

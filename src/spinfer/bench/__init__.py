"""Timing: protocols and baselines."""

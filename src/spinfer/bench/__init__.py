"""Benchmarks of what the package ships."""

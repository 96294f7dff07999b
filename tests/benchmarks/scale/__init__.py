"""Benchmarks of a million cells: see bench_scale.py."""

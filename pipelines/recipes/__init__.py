"""Whole jobs: sequences of stages with their defaults."""

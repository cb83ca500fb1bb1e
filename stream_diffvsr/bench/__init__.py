"""Benchmarks of the time per frame and per stage, and comparisons with the plain computation."""

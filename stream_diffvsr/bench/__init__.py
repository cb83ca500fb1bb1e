"""Benchmarks of the time per frame and per stage, and comparisons with a plain pipeline."""

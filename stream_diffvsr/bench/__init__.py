"""Benchmarks of the time per frame and per stage, compared with that of the plain computation."""

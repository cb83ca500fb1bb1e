"""Benchmarks of the time per frame and per stage, with a comparison with the plain computation."""

"""Benchmarks of the time per frame and stage, compared with the plain way of computing."""

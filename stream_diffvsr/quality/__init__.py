"""Measures of how close a result is to the ground truth, for single pictures and over time."""

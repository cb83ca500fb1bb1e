"""Measures of how close a result is to the ground truth, picture by picture and over time."""

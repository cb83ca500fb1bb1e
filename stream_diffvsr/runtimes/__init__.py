"""What computes networks."""

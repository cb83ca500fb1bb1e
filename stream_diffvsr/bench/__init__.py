"""What a frame costs, stage by stage, against the plain way of computing it."""

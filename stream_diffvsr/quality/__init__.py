"""How near a result is to the truth, picture by picture and over time."""

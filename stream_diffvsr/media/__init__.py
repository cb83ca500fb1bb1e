"""Files in and out: knows no model."""

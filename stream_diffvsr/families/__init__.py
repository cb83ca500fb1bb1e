"""Model families, each of which implements the types of `upscaler.py`."""

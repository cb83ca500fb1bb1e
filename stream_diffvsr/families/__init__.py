"""Model families, each of which implements the types defined in `upscaler.py`."""

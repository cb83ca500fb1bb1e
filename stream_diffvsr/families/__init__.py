"""Model families: each answers to the types of `upscaler.py`."""

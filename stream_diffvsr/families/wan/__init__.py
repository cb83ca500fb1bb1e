"""Shared code of the families built on Wan: its transformer, TAEHV's blocks, and processing in chunks."""

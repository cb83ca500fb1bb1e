"""What the families built on Wan share: its transformer, TAEHV's blocks, and sequences taken in chunks."""

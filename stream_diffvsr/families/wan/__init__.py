"""Code shared by the families built on Wan: its transformer, TAEHV's blocks, and processing in chunks."""

"""A file, or many, with what shall become of it."""

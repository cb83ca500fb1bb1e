"""Jobs: one file or many, from source to result."""
